"""Names in pictures."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cat import figures
from cat.figures.canvas import figure, save, text_of

REPOSITORY = Path(__file__).parents[3]
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")


@pytest.mark.parametrize("name", ["caf\udce9.wav", "\ud800", "$x^", "_silence_", "a\nb", "\x00", "🐕"])
def test_names_of_any_text_can_be_shown(is_picture, tmp_path, name):
    rows = [{"step": t, "loss": 1.0, "pred_std": 1.0, "target_std": 1.0} for t in range(3)]
    path = figures.write_loss_curves(tmp_path / "loss.png", {name: rows, "other": rows})
    assert is_picture(path)
    spec, visible = np.zeros((32, 32), np.float32), np.array([[0, 1]])
    assert is_picture(figures.write_patches(tmp_path / "patches.png", spec, visible, patch_size=16, title=name))
    embeddings = np.random.default_rng(0).standard_normal((8, 4))
    drawn = {name: (embeddings, [(name,), ("other",)] * 4)}
    assert is_picture(figures.write_projection(tmp_path / "projection.png", drawn))


def test_what_no_font_has_is_shown_as_its_escape(tmp_path):
    unknown = "\U000f0000"  # for private use
    assert text_of(f"a{unknown}b\x00") == r"a\U000f0000b\x00"
    drawing, axis = figure(4, 3)
    axis.set_title(text_of(f"a{unknown}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing, and draws a box
        save(drawing, tmp_path / "a.png")


def test_another_font_is_taken_for_what_the_usual_one_lacks(tmp_path):
    character = "\u2a03"  # comes with matplotlib, but not in DejaVu Sans
    drawing, axis = figure(4, 3)
    axis.barh([0, 1], [1, 2])
    axis.set_yticks([0, 1], [text_of(f"a{character}"), "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(drawing, tmp_path / "a.png")
    usual, other = (label.get_fontfamily() for label in reversed(axis.get_yticklabels()))
    assert (other[:1], len(usual), len(other)) == (usual, 1, 2)


def test_long_names_end_early():
    assert text_of("a" * 11, 10) == "a" * 10 + "…"
    assert text_of("a" * 10, 10) == "a" * 10


def test_a_backend_that_is_not_here_changes_nothing(tmp_path):
    """A notebook sets MPLBACKEND for the commands that it starts, which may be of another Python."""
    code = (
        "import os, sys\nfrom cat.figures.canvas import figure, save, text_of\n"
        "text_of('a')\nsave(figure(4, 3)[0], sys.argv[1])\nprint(os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        env=os.environ | {"MPLBACKEND": "nosuch", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "nosuch\n", done.stderr
    assert figures.is_figure(tmp_path / "a.png")
