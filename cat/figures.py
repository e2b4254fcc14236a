"""Pictures of a run: loss curves, a spectrogram with its visible patches, a projection of embeddings.

Everything is drawn with matplotlib's Agg canvas, without a display, and written whole or not at all.
Shapes: n clips, d embedding width, T frames, F mel bins, P patch, H = T/P, W = F/P, K visible patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cat.data import load_manifest, pretrain_batches
from cat.files import replacing
from cat.training.recipe import load_recipe
from cat.training.records import read_rows

SOFTWARE = "cat-audio (matplotlib)"  # in every picture, to know it by
EXTRA = "figures need matplotlib and scikit-learn: pip install 'cat-kernels[train]'"
# The colours of Okabe and Ito, which colour-blind readers can tell apart, and four more for larger label sets.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#444444", "#9467BD", "#7FBC41")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
PARTS = {
    "loss": "total, as optimised",
    "regression": "regression of masked patches (L_p)",
    "global": "global, CLS to mean target (L_g)",
    "regularisation": "representation regularisation (L_r)",
}


def write_run_figures(run_dir: str | Path) -> list[Path]:
    """Draws ``figures/loss.png`` and ``figures/patches.png`` of a pre-training run and returns their paths.

    Reads the run's metrics.jsonl and config.yaml; the clip is the first of the run's last step that has a mask. Raises
    FileNotFoundError for a directory without metrics.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{run_dir} has no metrics.jsonl; expected the directory of a pre-training run.")
    config = load_recipe(run_dir / "config.yaml")
    return [
        write_loss_curves(
            run_dir / "figures" / "loss.png", {run_dir.name: read_rows(run_dir / "metrics.jsonl", "train")}
        ),
        _write_run_patches(run_dir / "figures" / "patches.png", config),
    ]


def write_loss_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Total loss, its parts, and the deviation of predictions and targets, against the step.

    `runs` maps a name to train rows of metrics.jsonl. One run shows every step in light ink and the running mean (over
    a twentieth of the run) in full ink; several runs show their running means only. A panel a quantity.
    """
    present = [part for part in PARTS if any(_values(rows, part).any() for rows in runs.values())]
    panels = len(present) + 1
    columns = 2 if panels <= 4 else 3
    drawing, grid = figure(4.6 * columns, 3.4 * -(-panels // columns), rows=-(-panels // columns), columns=columns)
    axes = grid.reshape(-1)[:panels]
    for unused in grid.reshape(-1)[panels:]:
        unused.set_visible(False)
    for axis, part in zip(axes, present, strict=False):
        shown = [_values(rows, part) for rows in runs.values()]
        for colour, (name, rows), values in zip(COLOURS, runs.items(), shown, strict=False):
            if values.any():  # a run without this part has zeros
                _curve(axis, rows, part, colour, label=_shown(name), raw=len(runs) == 1)
        positive = np.concatenate([values[values > 0] for values in shown])
        if len(positive) and positive.max() > 30 * positive.min():
            axis.set_yscale("log")
        axis.set_title(PARTS[part], fontsize=10)
        axis.set_ylabel("loss")
    for line, (name, rows) in zip(COLOURS, runs.items(), strict=False):
        colours = (COLOURS[0], COLOURS[1]) if len(runs) == 1 else (line, line)
        prefix = "" if len(runs) == 1 else f"{_shown(name)}: "
        _curve(axes[-1], rows, "pred_std", colours[0], label=f"{prefix}predictions", raw=False)
        _curve(axes[-1], rows, "target_std", colours[1], label=f"{prefix}targets", raw=False, style="--")
    axes[-1].set_title("deviation over tokens (0: collapse)", fontsize=10)
    axes[-1].set_ylabel("standard deviation")
    axes[-1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("step (updates)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        _legend_below(drawing, axes[0])
    axes[-1].legend(frameon=False, fontsize=8, loc="best")
    return save(drawing, path)


def write_agreement(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], *, tested: str, limit: float) -> Path:
    """The loss of some runs, and how far it is from that of the first on a logarithmic axis.

    Full ink: running means over a twentieth of the run, and their differences; light ink: every step's. `limit`: what
    the root mean square of `tested`'s differences may be.
    """
    drawing, (left, right) = figure(10, 4.2, columns=2)
    (first, base), *others = runs.items()
    losses = {name: _values(rows, "loss") for name, rows in runs.items()}
    window = max(1, len(base) // 20)
    steps, widths = _values(base, "step"), {first: 3.2, tested: 1.4}
    for colour, (name, values) in zip(COLOURS, losses.items(), strict=False):
        style = "--" if name == tested else "-"
        left.plot(
            steps, smoothed(values, window), style, color=colour, linewidth=widths.get(name, 1.0), label=_shown(name)
        )
    for colour, (name, _) in zip(COLOURS[1:], others, strict=False):
        gap = losses[name] - losses[first]
        right.plot(steps, np.abs(gap), color=colour, alpha=0.25, linewidth=0.7)
        right.plot(steps, np.abs(smoothed(gap, window)), color=colour, linewidth=1.5, label=_shown(name))
    right.axhline(limit, color=COLOURS[7], linewidth=1.0, linestyle=":", label="limit of the root mean square")
    right.set_yscale("log")
    left.set_title(f"loss, running mean (window: {window})", fontsize=10)
    right.set_title(f"distance from {_shown(first)}", fontsize=10)
    left.set_ylabel("loss")
    right.set_ylabel("absolute difference of the loss")
    for axis in (left, right):
        axis.set_xlabel("step (updates)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="best")
    return save(drawing, path)


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """float64, NaN where a row lacks the value (a step whose loss was not finite)."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _curve(
    axis: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str, *, label: str, raw: bool, style: str = "-"
) -> None:
    steps, values = _values(rows, "step"), _values(rows, key)
    if raw:
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(
        steps, smoothed(values, max(1, len(values) // 20)), color=colour, linewidth=1.8, label=label, linestyle=style
    )


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values (fewer at the beginning), NaN ignored: never looks ahead."""
    kept = np.isfinite(values)
    sums = np.cumsum(np.where(kept, values, 0.0))
    counts = np.cumsum(kept)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _write_run_patches(path: Path, config: Any) -> Path:
    """The first clip of the run's first batch, with the masks that it was trained on there."""
    batch = next(
        iter(
            pretrain_batches(
                config.data,
                config.features,
                config.masks,
                patch_size=config.model.patch_size,
                seed=config.run.seed,
                start_step=0,
                num_steps=1,
            )
        )
    )
    clip = load_manifest(config.data.train).clips[int(batch.clips[0])]
    if batch.spec is None or batch.visible is None:
        raise ValueError(f"{path.parent.parent}: the run's configuration draws no masks.")
    title = f"{Path(clip.path).name}" + (f" ({', '.join(clip.labels)})" if clip.labels else "")
    return write_patches(
        path,
        batch.spec[0, 0].numpy(),
        batch.visible[: config.masks.num_masks].numpy(),
        patch_size=config.model.patch_size,
        frame_shift_ms=config.features.frame_shift_ms,
        title=title,
    )


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
        image = axis.imshow(
            picture.T,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="magma",
            vmin=low,
            vmax=high,
            interpolation="nearest",
        )
        axis.set_ylabel("mel bin")
        axis.spines[["top", "right"]].set_visible(False)
    patches = (frames // patch_size) * (bins // patch_size)
    axes[0, 0].set_title(_shown(title), fontsize=10, loc="left")
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


def write_projection(
    path: Path, embeddings: Mapping[str, tuple[np.ndarray, Sequence[Sequence[str]]]], *, seed: int = 0
) -> Path:
    """Embeddings in two dimensions, a panel an encoder, coloured by label.

    `embeddings` maps a panel's title to ((n, d) array, the n clips' labels); of several labels the first is shown.
    Whitened PCA to at most 50 dimensions, then t-SNE; below ten clips PCA alone. The title says how many clips have a
    nearest neighbour (cosine, before t-SNE) that shares a label: distances in a t-SNE picture are not to be measured.
    """
    classes = sorted({labels[0] for _, every in embeddings.values() for labels in every if labels})
    drawing, axes = figure(5.2 * len(embeddings), 5.4, columns=len(embeddings), squeeze=False)
    for axis, (name, (rows, labels)) in zip(axes[0], embeddings.items(), strict=True):
        points, method = project(rows, seed)
        first = np.array([clip[0] if clip else "" for clip in labels])
        for c, label in enumerate(classes):
            mine = first == label
            axis.scatter(
                *points[mine].T,
                s=30,
                color=COLOURS[c % len(COLOURS)],
                marker=MARKERS[(c + c // len(COLOURS)) % len(MARKERS)],  # twenty classes and more stay apart
                label=_shown(label.replace("_", " ")),
                linewidths=0.4,
                edgecolors="white",
            )
        agreement = nearest_neighbour_agreement(whitened(rows), labels)
        axis.set_title(f"{_shown(name)}\n{100 * agreement:.0f} % of nearest neighbours share the label", fontsize=10)
        axis.set_xlabel(f"{method} 1 (no unit)")
        axis.set_ylabel(f"{method} 2 (no unit)")
        axis.set_xticks([])
        axis.set_yticks([])
    _legend_below(drawing, axes[0, 0])
    return save(drawing, path)


def project(rows: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """(n, d) -> ((n, 2), name of the method), from `whitened` features."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(EXTRA) from error
    if len(rows) < 2:
        raise ValueError(f"a projection needs at least two embeddings, got {len(rows)}.")
    reduced = whitened(rows)
    if len(rows) < 10:
        return reduced[:, :2], "PCA"
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced), "t-SNE"


def whitened(rows: np.ndarray, dimensions: int = 50) -> np.ndarray:
    """The leading principal components of the standardised columns, each of deviation 1: (n, at most `dimensions`).

    Without it one direction that every clip of an encoder shares, loudness say, stretches the picture to a line.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(rows)
    return PCA(min(dimensions, scaled.shape[1], max(1, len(rows) - 1)), whiten=True, svd_solver="full").fit_transform(
        scaled
    )


def nearest_neighbour_agreement(rows: np.ndarray, labels: Sequence[Sequence[str]]) -> float:
    """Share of clips whose nearest other clip, by cosine of the rows, has a label in common."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    sets = [set(clip) for clip in labels]
    return float(np.mean([bool(sets[i] & sets[j]) for i, j in enumerate(similarity.argmax(axis=1))]))


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
                label=_shown(name),
            )
        for n, (name, score) in enumerate((levels or {}).get(title, {}).items()):
            axis.axhline(100 * score, color=COLOURS[7], linewidth=1.2, linestyle=(":", "--")[n % 2], label=_shown(name))
        axis.set_title(f"{title} probe of each layer", fontsize=10)
        axis.set_ylabel(f"{metric} on test (%)")
        axis.set_ylim(bottom=0)
    if gates:
        width = 0.8 / len(gates)
        for n, (name, weights) in enumerate(gates.items()):
            places = [layer + (n - (len(gates) - 1) / 2) * width for layer in weights]
            axes[0, -1].bar(places, list(weights.values()), width, color=look[name][0], label=_shown(name))
        axes[0, -1].set_title("gates of the gated probe", fontsize=10)
        axes[0, -1].set_ylabel("weight (sum 1)")
    for axis in axes[0]:
        axis.set_xlabel("layer (0: what the first block sees)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _legend_below(drawing, axes[0, 0])
    return save(drawing, path)


def figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure of that many inches with its axes, on the Agg canvas."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(EXTRA) from error
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, **options)


def save(drawing: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        drawing.savefig(temporary, dpi=150, metadata={"Software": SOFTWARE})
    return path


def is_figure(path: Path) -> bool:
    """Whether a PNG file was drawn here."""
    with open(path, "rb") as file:
        return SOFTWARE.encode() in file.read(1024)


def _shown(name: str) -> str:
    """A name of the user's as matplotlib can show it: without bytes that are no text, without mathematics between
    dollar signs, and in the legend too if it begins with an underscore."""
    text = name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _legend_below(drawing: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        drawing.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9
        )
