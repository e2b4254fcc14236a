"""Pictures of a classifier's scores: every class, what is taken for what, precision against recall, the worst mistakes.

With many classes a picture grows, to a point, and then shows the classes that say most; its title says which.
Shapes: n clips, C classes, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.figures.canvas import COLOURS, figure, legend_below, save, text_of
from cat.figures.spectrograms import paint, trailing_padding

NAME = 40  # characters of a class's name that are shown
_BARS = 100  # in a column
_CELLS = 60  # classes of a whole confusion matrix; of more, the ones most often confused
_MOST_CONFUSED = 40
_POINTS = 300  # of a curve
_HIGHLIGHTED = 3  # best and worst classes, where there are too many for a colour each


def write_class_scores(
    path: Path,
    names: Sequence[str],
    values: np.ndarray,
    counts: Sequence[int],
    *,
    intervals: Sequence[tuple[float, float] | None] | None = None,
    metric: str = "average precision",
    title: str = "",
) -> Path:
    """A bar a class, the best first, with its interval and its number of clips; classes of value NaN are left out."""
    shown = sorted(np.flatnonzero(~np.isnan(values)), key=lambda c: (-values[c], c))
    columns = max(1, -(-len(shown) // _BARS))
    rows = max(1, -(-len(shown) // columns))
    drawing, axes = figure(
        max(6.0, 4.8 * columns),
        1.6 + 0.17 * rows,
        columns=columns,
        squeeze=False,
        sharex=True,
        gridspec_kw={"wspace": 0},
    )
    for column, axis in enumerate(axes[0]):
        mine = shown[column * rows : (column + 1) * rows]
        places = np.arange(len(mine))
        axis.barh(places, values[mine], color=COLOURS[0], height=0.75)
        for place, c in zip(places, mine, strict=True):
            interval = intervals[c] if intervals is not None else None
            if interval is not None:
                axis.plot(interval, [place, place], color="#222222", linewidth=1)
        axis.set_yticks(places, [f"{text_of(names[c], NAME)} ({counts[c]})" for c in mine], fontsize=8)
        axis.set_ylim(rows - 0.4, -0.6)
        axis.set_xlim(0, 1)
        axis.set_xlabel(metric)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    missing = len(values) - len(shown)
    without = f"; left out: {missing} without a clip" if missing else ""
    lines = [text_of(title)] if title else []
    lines.append(f"{len(shown)} classes (clips){without}" + ("; line: 95 % interval" if intervals is not None else ""))
    drawing.suptitle("\n".join(lines), fontsize=10)
    return save(drawing, path)


def write_confusion(path: Path, confusion: np.ndarray, names: Sequence[str], *, title: str = "") -> Path:
    """Of each true class (a row) the share that is taken for each class, with the numbers of clips where they fit.

    Of more than 60 classes the 40 that are most often taken for another, or another for them, and the rest as one.
    """
    names, total = [text_of(name, NAME) for name in names], len(names)
    explained = "each row: of the clips of a class, the share taken for each class"
    if total > _CELLS:
        confusion, kept = most_confused(confusion, _MOST_CONFUSED)
        names = [*(names[c] for c in kept), "all others"]
        explained = f"the {len(kept)} of {total} classes most often confused, and all others as one; {explained}"
    size, counts = len(names), confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, counts, out=np.zeros(confusion.shape), where=counts > 0)
    side = max(4.0, 0.24 * size) if size > 12 else 0.5 * size + 2.0
    longest = 0.075 * max(map(len, names))
    drawing, axis = figure(side + longest + 1.2, side + longest + 0.8)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    places = np.arange(size)
    axis.set_xticks(places, names, rotation=90, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xticks(places[1:] - 0.5, minor=True)
    axis.set_yticks(places[1:] - 0.5, minor=True)
    axis.grid(which="minor", color="#dddddd", linewidth=0.4)
    axis.tick_params(which="minor", length=0)
    for i, j in np.argwhere(confusion > 0):
        ink = "white" if shares[i, j] > 0.5 else "#222222"
        axis.text(j, i, f"{confusion[i, j]}", ha="center", va="center", fontsize=8 if size <= 12 else 5.5, color=ink)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    lines = [text_of(title)] if title else []
    drawing.suptitle("\n".join([*lines, explained]), fontsize=9, wrap=True)
    drawing.colorbar(image, ax=axis, shrink=0.6, pad=0.02, label="share of the true class")
    return save(drawing, path)


def most_confused(confusion: np.ndarray, most: int) -> tuple[np.ndarray, list[int]]:
    """The matrix of the `most` classes with the most mistakes, all others added up behind them, and which they are."""
    mistakes = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * np.diag(confusion)
    kept = sorted(np.argsort(-mistakes, kind="stable")[:most].tolist())
    place = np.full(len(confusion), len(kept))
    place[kept] = np.arange(len(kept))
    smaller = np.zeros((len(kept) + 1,) * 2, dtype=confusion.dtype)
    np.add.at(smaller, (place[:, None], place[None, :]), confusion)
    return smaller, kept


def write_curves(path: Path, scores: np.ndarray, targets: np.ndarray, names: Sequence[str], *, title: str = "") -> Path:
    """Precision against recall, scores (n, C) and targets (n, C) bool: a curve a class, those without a clip left out.

    Of more than ten classes all are grey but for the three best and the three worst; the broad one takes all classes'
    decisions together.
    """
    from sklearn.metrics import average_precision_score

    present = np.flatnonzero(targets.any(axis=0))
    ap = {int(c): float(average_precision_score(targets[:, c], scores[:, c])) for c in present}
    ranked = sorted(ap, key=lambda c: (-ap[c], c))
    many = len(ranked) > len(COLOURS)
    coloured = [*ranked[:_HIGHLIGHTED], *ranked[-_HIGHLIGHTED:]] if many else ranked
    drawing, axis = figure(7.5, 6.2)
    for c in ranked if many else []:
        axis.plot(*_curve(targets[:, c], scores[:, c]), color="#bbbbbb", linewidth=0.5, alpha=min(1, 60 / len(ranked)))
    for colour, c in zip(COLOURS, coloured, strict=False):
        label = f"{text_of(names[c], NAME)} ({ap[c]:.2f})"
        axis.plot(*_curve(targets[:, c], scores[:, c]), color=colour, linewidth=1.4, label=label)
    recall, precision = _curve(targets[:, present].reshape(-1), scores[:, present].reshape(-1))
    axis.plot(recall, precision, color="#222222", linewidth=2.6, label="all decisions together")
    axis.set_xlabel("recall")
    axis.set_ylabel("precision")
    axis.set_xlim(0, 1.005)
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    which = (
        f"{_HIGHLIGHTED} best and {_HIGHLIGHTED} worst of {len(ranked)} classes" if many else f"{len(ranked)} classes"
    )
    lines = [text_of(title)] if title else []
    axis.set_title("\n".join([*lines, f"{which} (average precision)"]), fontsize=10)
    legend_below(drawing, axis, columns=2)
    return save(drawing, path)


def _curve(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at a few hundred of the thresholds."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(targets, scores, drop_intermediate=True)
    chosen = np.unique(np.linspace(0, len(recall) - 1, min(len(recall), _POINTS)).astype(int))
    return recall[chosen], precision[chosen]


@dataclass(frozen=True)
class Panel:
    """A spectrogram with what is said above it."""

    spec_TF: np.ndarray
    lines: Sequence[str]


def write_mistakes(path: Path, panels: Sequence[Panel], *, frame_shift_ms: float = 10.0, title: str = "") -> Path:
    """Spectrograms, three in a row, each as long as its clip."""
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    drawing, axes = figure(4.6 * columns, 2.5 * rows + 0.5, rows=rows, columns=columns, squeeze=False)
    for axis, panel in zip(axes.reshape(-1), panels, strict=False):
        _spectrogram(axis, panel.spec_TF, frame_shift_ms)
        axis.set_title("\n".join(text_of(line, 52) for line in panel.lines), fontsize=8, loc="left")
    for unused in axes.reshape(-1)[len(panels) :]:
        unused.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("mel bin", fontsize=8)
    drawing.suptitle(text_of(title) if panels else f"{text_of(title)}: none", fontsize=10)
    return save(drawing, path)


def _spectrogram(axis: Any, spec_TF: np.ndarray, frame_shift_ms: float) -> None:
    real_TF = spec_TF[: len(spec_TF) - trailing_padding(spec_TF)]
    if len(real_TF) == 0:  # silence is one constant too
        real_TF = spec_TF
    low, high = np.percentile(real_TF, [1, 99.8])
    extent = (0.0, len(real_TF) * frame_shift_ms / 1000, -0.5, spec_TF.shape[1] - 0.5)
    paint(axis, real_TF, extent, low, high)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("time (s)", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
