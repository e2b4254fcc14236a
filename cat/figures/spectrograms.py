"""A spectrogram, and what the student sees of it.

Shapes: T frames, F mel bins, P patch, H = T/P, W = F/P, M masks, K visible patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cat.figures.canvas import figure, save, text_of


def write_patches(
    path: Path,
    spec_TF: np.ndarray,
    visible_MK: np.ndarray,
    *,
    patch_size: int,
    frame_shift_ms: float = 10.0,
    title: str = "",
    max_masks: int = 2,
) -> Path:
    """A spectrogram, and below it what the student sees of it under each of the first `max_masks` masks."""
    frames, bins = spec_TF.shape
    shown = visible_MK[:max_masks]
    drawing, axes = figure(9, 1.0 + 1.9 * (1 + len(shown)), rows=1 + len(shown), sharex=True, squeeze=False)
    extent = (0.0, frames * frame_shift_ms / 1000, -0.5, bins - 0.5)
    low, high = np.percentile(spec_TF, [1, 99.8])
    for axis, visible_K in zip(axes[:, 0], [None, *shown], strict=True):
        picture = spec_TF
        if visible_K is not None:
            picture = np.ma.masked_where(~visible_grid(visible_K, frames, bins, patch_size), spec_TF)
        axis.set_facecolor("#d9d9d9")
        image = paint(axis, picture, extent, low, high)
        axis.set_ylabel("mel bin")
        axis.spines[["top", "right"]].set_visible(False)
    patches = (frames // patch_size) * (bins // patch_size)
    axes[0, 0].set_title(text_of(title), fontsize=10, loc="left")
    padding = trailing_padding(spec_TF)
    if padding:
        middle = (frames - padding / 2) * frame_shift_ms / 1000
        axes[0, 0].text(middle, bins / 2, "padding", rotation=90, ha="center", va="center", fontsize=9, color="#444444")
    for m, axis in enumerate(axes[1:, 0]):
        count = shown.shape[1]
        axis.set_title(
            f"mask {m + 1}: the student sees {count} of {patches} patches ({100 * count / patches:.0f} %)",
            fontsize=10,
            loc="left",
        )
    axes[-1, 0].set_xlabel("time (s)")
    drawing.colorbar(image, ax=axes[:, 0].tolist(), label="normalised log-mel energy", shrink=0.6, pad=0.01)
    return save(drawing, path)


def trailing_padding(spec_TF: np.ndarray) -> int:
    """Frames at the end that are one constant: zeros put in before the normalisation, which makes them bright."""
    real = np.flatnonzero((spec_TF != spec_TF[-1, 0]).any(axis=1))
    return 0 if len(real) == 0 else len(spec_TF) - 1 - int(real[-1])


def visible_grid(visible_K: np.ndarray, frames: int, bins: int, patch_size: int) -> np.ndarray:
    """(T, F) bool: which points of the spectrogram lie in a visible patch (index h * W + w)."""
    grid = np.zeros((frames // patch_size, bins // patch_size), dtype=bool)
    grid.reshape(-1)[visible_K] = True
    return grid.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def paint(axis: Any, spec_TF: np.ndarray, extent: tuple[float, float, float, float], low: float, high: float) -> Any:
    """A spectrogram on an axis, time to the right, from ``low`` (dark) to ``high``; returns matplotlib's image."""
    return axis.imshow(
        spec_TF.T,
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap="magma",
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
