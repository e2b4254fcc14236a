"""Which positions the stem computes, and what visible tokens depend on.

Shapes: T frames, F mel bins, P patch, K visible patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cat.figures.canvas import COLOURS, figure, save, text_of
from cat.figures.spectrograms import paint, visible_grid

HIDDEN = "#d9d9d9"
KINDS = ("zero: masked, or beyond the border", "a visible neighbour", "the patch itself")


def write_reach(
    path: Path,
    spec_TF: np.ndarray,
    visible_K: np.ndarray,
    reach_TF: np.ndarray,
    *,
    patch_size: int,
    frame_shift_ms: float = 10.0,
    title: str = "",
) -> Path:
    """A spectrogram, what of it a mask leaves, and `reach_TF`, the size of the gradient of the visible tokens towards
    every pixel: grey where it is exactly zero."""
    frames, bins = spec_TF.shape
    drawing, (whole, left, reach) = figure(9, 6.4, rows=3, sharex=True)
    extent = (0.0, frames * frame_shift_ms / 1000, -0.5, bins - 0.5)
    low, high = np.percentile(spec_TF, [1, 99.8])
    paint(whole, spec_TF, extent, low, high)
    seen = visible_grid(visible_K, frames, bins, patch_size)
    paint(left, np.ma.masked_where(~seen, spec_TF), extent, low, high)
    depends = reach_TF != 0
    sizes = np.log10(np.where(depends, reach_TF, 1.0))
    floor, top = np.percentile(sizes[depends], [1, 99.8]) if depends.any() else (0.0, 1.0)
    image = paint(reach, np.ma.masked_where(~depends, sizes), extent, floor, top)
    image.set_cmap("viridis")
    whole.set_title(text_of(title), fontsize=10, loc="left")
    left.set_title(f"what the student sees: {len(visible_K)} of {seen.size // patch_size**2} patches", fontsize=10,
                   loc="left")  # fmt: skip
    reach.set_title(
        f"gradient of its tokens, by the dense formula: not zero at {(depends & seen).sum():,} of {seen.sum():,} "
        f"visible pixels, {(depends & ~seen).sum():,} of {(~seen).sum():,} masked",
        fontsize=10,
        loc="left",
    )
    for axis in (whole, left, reach):
        axis.set_facecolor(HIDDEN)
        axis.set_ylabel("mel bin")
        axis.spines[["top", "right"]].set_visible(False)
    reach.set_xlabel("time (s)")
    drawing.colorbar(image, ax=reach, label="gradient, log10", pad=0.01)
    return save(drawing, path)


def write_halo(
    path: Path,
    halos: Mapping[int, np.ndarray],
    positions: Mapping[int, tuple[int, int]],
    multiply_adds: Mapping[str, int],
) -> Path:
    """What the depthwise convolutions of one visible patch read, a panel a resolution, and what is computed a clip.

    Args:
        halos: pixels a side of a position -> (side, side) kinds, as in `KINDS`.
        positions: pixels a side -> positions computed on all clones, and in visible patches.
        multiply_adds: of the whole stem, "dense" and "visible".
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    panels = len(halos)
    widths = {"width_ratios": [1.0] * panels + [1.5]}
    drawing, axes = figure(3.0 * panels + 4.2, 3.9, columns=panels + 1, squeeze=False, gridspec_kw=widths)
    colours = (HIDDEN, COLOURS[5], COLOURS[0])
    for axis, (r, kinds) in zip(axes[0], halos.items(), strict=False):
        side = len(kinds)
        axis.pcolormesh(kinds.T, cmap=ListedColormap(colours), vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=1)
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_xlabel("time")
        axis.set_ylabel("mel")
        axis.set_title(f"positions of {r} x {r} pixels:\na patch's {side - 4} x {side - 4} and 2 around", fontsize=10)
    last = axes[0, -1]
    places = np.arange(len(positions) + 1)
    pairs = [*positions.values(), (multiply_adds["dense"], multiply_adds["visible"])]
    shares = [100 * ours / dense for dense, ours in pairs]
    last.barh(places - 0.2, [100.0] * len(pairs), 0.36, color=HIDDEN)
    last.barh(places + 0.2, shares, 0.36, color=COLOURS[0])
    for place, (dense, ours), share in zip(places, pairs, shares, strict=True):
        last.text(2, place - 0.2, f"{_count(dense)} on all clones", va="center", fontsize=9, color="#222222")
        text = f"{_count(ours)} in visible patches ({share:.0f} %)"
        last.text(share + 2, place + 0.2, text, va="center", fontsize=9)
    last.set_yticks(places, [*(f"{r} x {r} positions" for r in positions), "multiply-adds"], fontsize=9)
    last.invert_yaxis()
    last.set_xlabel("% of the dense formula")
    last.set_title("computed a clip, all masks, forward", fontsize=10)
    last.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=kind) for colour, kind in zip(colours, KINDS, strict=True)]
    if halos:
        drawing.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(drawing, path)


def _count(number: int) -> str:
    return f"{number:,}" if number < 1e6 else f"{number / 1e9:.3g} G" if number >= 1e9 else f"{number / 1e6:.3g} M"
