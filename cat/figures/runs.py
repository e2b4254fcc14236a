"""Pictures of runs: loss curves, how far runs are apart, and a clip with the masks it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cat.data import load_manifest, pretrain_batches
from cat.figures.canvas import COLOURS, figure, legend_below, save, text_of
from cat.figures.spectrograms import write_patches
from cat.training.recipe import load_recipe
from cat.training.records import read_rows

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


def write_finetune_figure(run_dir: str | Path, metric: str) -> Path:
    """Draws ``figures/loss.png`` of a fine-tuning run: the loss in training and validation, and the validation metric.
    Returns its path."""
    run_dir = Path(run_dir)
    train, valid = (read_rows(run_dir / "metrics.jsonl", kind) for kind in ("train", "valid"))
    drawing, (left, right) = figure(9.2, 3.4, columns=2)
    _curve(left, train, "loss", COLOURS[0], label="training", raw=True)
    for axis, key, name in ((left, "loss", "loss"), (right, metric, f"validation {metric}")):
        known = [row for row in valid if row.get(key) is not None]
        axis.plot(_values(known, "step"), _values(known, key), "o-", color=COLOURS[1], markersize=3, label="validation")
        axis.set_ylabel(name)
        axis.set_xlabel("step (updates)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    return save(drawing, run_dir / "figures" / "loss.png")


def write_loss_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Total loss, its parts, and the deviation of predictions and targets, against the step.

    `runs` maps a name to train rows of metrics.jsonl. One run shows every step in light ink and the running mean (over
    a twentieth of the run) in full ink; several runs show their running means only. A panel a quantity, and one a guide
    besides that of the manifest.
    """
    titles = PARTS | {
        key: f"L_r towards {key.partition('.')[2]}"
        for rows in runs.values()
        for key in (rows[0] if rows else ())
        if key.startswith("regularisation.")
    }
    present = [part for part in titles if any(_has(_values(rows, part)) for rows in runs.values())]
    panels = len(present) + 1
    columns = 2 if panels <= 4 else 3
    drawing, grid = figure(4.6 * columns, 3.4 * -(-panels // columns), rows=-(-panels // columns), columns=columns)
    axes = grid.reshape(-1)[:panels]
    for unused in grid.reshape(-1)[panels:]:
        unused.set_visible(False)
    for axis, part in zip(axes, present, strict=False):
        shown = [_values(rows, part) for rows in runs.values()]
        for colour, (name, rows), values in zip(COLOURS, runs.items(), shown, strict=False):
            if _has(values):
                _curve(axis, rows, part, colour, label=text_of(name), raw=len(runs) == 1)
        positive = np.concatenate([values[values > 0] for values in shown])
        if len(positive) and positive.max() > 30 * positive.min():
            axis.set_yscale("log")
        axis.set_title(titles[part], fontsize=10)
        axis.set_ylabel("loss")
    for line, (name, rows) in zip(COLOURS, runs.items(), strict=False):
        colours = (COLOURS[0], COLOURS[1]) if len(runs) == 1 else (line, line)
        prefix = "" if len(runs) == 1 else f"{text_of(name)}: "
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
        legend_below(drawing, axes[0])
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
            steps, smoothed(values, window), style, color=colour, linewidth=widths.get(name, 1.0), label=text_of(name)
        )
    for colour, (name, _) in zip(COLOURS[1:], others, strict=False):
        gap = losses[name] - losses[first]
        right.plot(steps, np.abs(gap), color=colour, alpha=0.25, linewidth=0.7)
        right.plot(steps, np.abs(smoothed(gap, window)), color=colour, linewidth=1.5, label=text_of(name))
    right.axhline(limit, color=COLOURS[7], linewidth=1.0, linestyle=":", label="limit of the root mean square")
    right.set_yscale("log")
    left.set_title(f"loss, running mean (window: {window})", fontsize=10)
    right.set_title(f"distance from {text_of(first)}", fontsize=10)
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


def _has(values: np.ndarray) -> bool:
    """Whether a run has this part: one without has zeros, or does not know it."""
    return bool(np.nan_to_num(values).any())


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
