"""Names in pictures."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cat import figures
from cat.figures.canvas import figure, save, text_of

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
