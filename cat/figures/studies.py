"""Pictures of studies: arms with several seeds, as curves over training or as what they end at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cat.figures.canvas import COLOURS, MARKERS, figure, legend_below, save, text_of

Lines = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]  # arm -> a (steps, scores in 0..1) a seed


def write_study_curves(
    path: Path, panels: Mapping[str, Lines], bounds: Mapping[str, Mapping[str, float]], *, metric: str, columns: int
) -> Path:
    """Panels in rows of so many: mean over seeds and their range, and `bounds` (panel -> name -> score) as levels."""
    rows, levels = -(-len(panels) // columns), _levels(bounds)
    drawing, axes = figure(4.9 * columns, 0.6 + 3.4 * rows, rows=rows, columns=columns, squeeze=False)
    for axis, (panel, lines) in zip(axes.flat, panels.items(), strict=True):
        for n, (arm, runs) in enumerate(lines.items()):
            colour, steps = COLOURS[n % len(COLOURS)], runs[0][0]
            scores = 100 * np.array([scores for _, scores in runs])
            axis.plot(steps, scores.mean(0), color=colour, marker=MARKERS[n % len(MARKERS)], label=text_of(arm))
            axis.fill_between(steps, scores.min(0), scores.max(0), color=colour, alpha=0.15, linewidth=0)
        for name, score in bounds.get(panel, {}).items():
            axis.axhline(100 * score, **levels[name])
        axis.set_title(text_of(panel), fontsize=10)
        axis.set_xlabel("step (updates)")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    legend_below(drawing, axes[0, 0])
    return save(drawing, path)


def write_study_ends(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    bounds: Mapping[str, Mapping[str, float]],
    *,
    metric: str,
    columns: int,
) -> Path:
    """Panels in rows of so many: of every arm (-> scores in 0..1) a dot a seed and the mean, and `bounds` as levels."""
    arms = list(next(iter(panels.values())))
    rows, levels = -(-len(panels) // columns), _levels(bounds)
    size = 3.2 + 3.0 * columns, 0.6 + rows * (1.0 + 0.28 * len(arms))
    drawing, axes = figure(*size, rows=rows, columns=columns, squeeze=False, sharey=True)
    for axis, (panel, ends) in zip(axes.flat, panels.items(), strict=True):
        for place, scores in enumerate(ends.values()):
            values = 100 * np.asarray(scores)
            axis.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.45, markersize=4)
            axis.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=COLOURS[1], linewidth=2)
        for name, score in bounds.get(panel, {}).items():
            axis.axvline(100 * score, **levels[name])
        axis.set_title(text_of(panel), fontsize=10)
        axis.set_xlabel(metric)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(arms)), [text_of(arm, 40) for arm in arms], fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
    if any(bounds.values()):
        legend_below(drawing, axes[0, 0])
    return save(drawing, path)


def _levels(bounds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """How every bound's line is drawn, the same in all panels."""
    styles = (":", "--", "-.", (0, (1, 3)), (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)))
    names = dict.fromkeys(name for levels in bounds.values() for name in levels)
    lines = zip(names, itertools.cycle(styles), strict=False)
    alike = {"color": COLOURS[7], "linewidth": 1.1}
    return {name: {**alike, "linestyle": style, "label": f"{text_of(name)}"} for name, style in lines}
