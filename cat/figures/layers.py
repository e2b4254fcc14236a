"""What each layer of an encoder knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cat.figures.canvas import COLOURS, MARKERS, figure, legend_below, save, text_of


def write_layers(
    path: Path,
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    gates: Mapping[str, Mapping[int, float]],
    *,
    metric: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """What each layer of an encoder knows: a panel a probe, and one for the gates of the gated probe.

    Args:
        scores: panel title -> encoder -> layer -> score in 0..1.
        gates: encoder -> layer -> weight.
        levels: panel title -> name -> a score that has no layers, as a dotted line.
    """
    panels = len(scores) + bool(gates)
    drawing, axes = figure(4.8 * panels, 3.8, columns=panels, squeeze=False)
    encoders = list(dict.fromkeys(name for lines in [*scores.values(), gates] for name in lines))
    look = {name: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(encoders)}
    for axis, (title, lines) in zip(axes[0], scores.items(), strict=False):
        for name, points in lines.items():
            colour, marker = look[name]
            axis.plot(
                list(points),
                [100 * score for score in points.values()],
                color=colour,
                marker=marker,
                label=text_of(name),
            )
        for n, (name, score) in enumerate((levels or {}).get(title, {}).items()):
            axis.axhline(
                100 * score, color=COLOURS[7], linewidth=1.2, linestyle=(":", "--")[n % 2], label=text_of(name)
            )
        axis.set_title(f"{title} probe of each layer", fontsize=10)
        axis.set_ylabel(f"{metric} on test (%)")
        axis.set_ylim(bottom=0)
    if gates:
        width = 0.8 / len(gates)
        for n, (name, weights) in enumerate(gates.items()):
            places = [layer + (n - (len(gates) - 1) / 2) * width for layer in weights]
            axes[0, -1].bar(places, list(weights.values()), width, color=look[name][0], label=text_of(name))
        axes[0, -1].set_title("gates of the gated probe", fontsize=10)
        axes[0, -1].set_ylabel("weight (sum 1)")
    for axis in axes[0]:
        axis.set_xlabel("layer (0: what the first block sees)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    legend_below(drawing, axes[0, 0])
    return save(drawing, path)
