"""Pictures of studies."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from cat.figures import studies
from cat.figures.canvas import figure, legend_below

PANELS = {"a, mean": ["log-mel", "untrained"], "a, cls": ["untrained"]}
BOUNDS = {panel: {name: 0.1 * (n + 1) for n, name in enumerate(names)} for panel, names in PANELS.items()}


@pytest.fixture
def drawn(monkeypatch):
    """The figure that would be saved."""
    kept = []
    monkeypatch.setattr(studies, "save", lambda drawing, path: kept.append(drawing) or path)
    return kept


@pytest.mark.parametrize("kind", ["curves", "ends"])
def test_a_bound_looks_the_same_in_all_panels(kind, drawn, tmp_path):
    """Also where a panel lacks one: the legend is the first panel's."""
    if kind == "curves":
        lines = {panel: {"none": [([1, 2], [0.3, 0.4])]} for panel in PANELS}
        studies.write_study_curves(tmp_path / "x.png", lines, BOUNDS, metric="%", columns=2)
    else:
        dots = {panel: {"none": [0.3, 0.4]} for panel in PANELS}
        studies.write_study_ends(tmp_path / "x.png", dots, BOUNDS, metric="%", columns=2)
    styles = [{line.get_label(): line.get_linestyle() for line in axis.lines} for axis in drawn[0].axes]
    assert styles[0]["untrained"] == styles[1]["untrained"] != styles[0]["log-mel"]
    assert "log-mel" not in styles[1]


@pytest.mark.parametrize("width", [3, 30])
def test_a_legend_is_no_wider_than_its_figure(width):
    drawing, axis = figure(width, 4)
    for n in range(6):
        axis.plot([0, 1], label=f"an arm of some length, the {n}th")
    legend_below(drawing, axis)
    (legend,) = drawing.legends
    drawing.draw_without_rendering()
    assert legend.get_window_extent().width <= drawing.bbox.width
    assert legend._ncols == (1 if width == 3 else 6)
