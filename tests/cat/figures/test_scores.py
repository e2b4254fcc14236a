"""Pictures of scores, of few classes and of many."""

from __future__ import annotations

import numpy as np
import pytest

from cat.figures import scores as scores_figures
from cat.figures.scores import Panel, most_confused, write_class_scores, write_confusion, write_curves, write_mistakes

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def names(classes: int) -> list[str]:
    return ["$x^2$", "_silence_", "狗叫声", "a name, " * 20, *(f"class {c}" for c in range(4, classes))][:classes]


@pytest.mark.parametrize("classes", [2, 12, 30])
def test_every_number_of_classes(tmp_path, is_picture, monkeypatch, classes):
    for name, most in (("_BARS", 20), ("_CELLS", 15), ("_MOST_CONFUSED", 8)):  # 30 are as many as 527 then
        monkeypatch.setattr(scores_figures, name, most)
    random = np.random.default_rng(0)
    targets = np.eye(classes, dtype=bool)[random.integers(classes, size=200)]
    targets[:, 1] = False  # a class without a clip
    scores = random.normal(size=(200, classes)) + 2 * targets
    values = random.random(classes)
    values[1] = np.nan
    intervals = [None if np.isnan(value) else (value / 2, value) for value in values]
    assert is_picture(
        write_class_scores(tmp_path / "a.png", names(classes), values, range(classes), intervals=intervals, title="$")
    )
    confusion = random.poisson(0.1, size=(classes, classes))
    assert is_picture(write_confusion(tmp_path / "b.png", confusion, names(classes), title="_"), wider_than=400)
    assert is_picture(write_curves(tmp_path / "c.png", scores, targets, names(classes)))


def test_most_confused_by_hand():
    confusion = np.array([[9, 0, 1, 0], [0, 5, 0, 0], [4, 0, 2, 0], [0, 1, 0, 3]])
    smaller, kept = most_confused(confusion, 2)
    assert kept == [0, 2]
    np.testing.assert_array_equal(smaller, [[9, 1, 0], [4, 2, 0], [0, 0, 5 + 3 + 1]])
    assert smaller.sum() == confusion.sum()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_mistakes(tmp_path, is_picture, count):
    """Among them silence, which is one value everywhere, and a clip that ends before its spectrogram."""
    spec = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    ending = np.concatenate([spec[:20], np.full((44, 32), 0.467, np.float32)])
    panels = [Panel(one, ("a.wav", "true: $x$", "_b_ 0.9")) for one in (np.zeros_like(spec), spec, ending, spec)][
        :count
    ]
    path = write_mistakes(tmp_path / "mistakes.png", panels, title="the worst mistakes")
    assert is_picture(path, wider_than=400)
