"""Charts of the numbers of several runs, as the page draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cat.report.runs import Run

POINTS = 600  # of a curve at most; each stands for as many updates, with their smallest and largest number

# Kind of row, keys that share a chart, title, unit. Keys that are not named here have charts of their own behind them.
CHARTS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("train", ("loss",), "loss, as optimised", ""),
    ("train", ("regression",), "regression of masked patches (L_p)", ""),
    ("train", ("global",), "global, CLS to mean target (L_g)", ""),
    ("train", ("regularisation",), "representation regularisation (L_r)", ""),
    ("train", ("regularisation_explained",), "share of L_r explained beyond a constant", ""),
    ("train", ("pred_std", "target_std"), "deviation over tokens (0: collapse)", ""),
    ("train", ("grad_norm",), "norm of the gradient before clipping", ""),
    ("train", ("lr",), "learning rate", ""),
    ("train", ("ema_decay",), "decay of the teacher's average", ""),
    ("train", ("scale",), "scale of the loss (fp16)", ""),
    ("speed", ("clips_per_s",), "rate", "clips/s"),
    ("speed", ("matrix_share",), "share of the matrix rate", "%"),
    ("speed", ("data_wait",), "time spent waiting for data", "%"),
    ("speed", ("memory_bytes",), "memory, most so far", "GB"),
)
_FACTORS = {"%": 100.0, "GB": 1e-9}
_UNSEEN = {"step", "seconds", "left_s", "flops_per_s"}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """``{"group", "title", "unit", "series": [{"run", "name", "points"}], "marks": [{"run", "steps"}]}``; points are
    [step, mean, least, most]. A chart without points is left out."""
    known = {(kind, key) for kind, keys, _, _ in CHARTS for key in keys}
    others = [
        (kind, (key,), _title(kind, key), "")
        for kind in ("train", "valid")
        for key in dict.fromkeys(key for run in runs for key in run.columns[kind])
        if (kind, key) not in known and key not in _UNSEEN
    ]
    train = [chart for chart in CHARTS if chart[0] == "train"] + [chart for chart in others if chart[0] == "train"]
    valid = [chart for chart in others if chart[0] == "valid"]
    speed = [chart for chart in CHARTS if chart[0] == "speed"]
    made = [_chart(runs, *chart) for chart in [*train, *valid, *speed]]
    return [chart for chart in made if chart["series"]]


def _title(kind: str, key: str) -> str:
    if key.startswith("regularisation."):
        return f"L_r towards {key.partition('.')[2]}"
    return key if kind == "train" else f"validation {key}"


def _chart(runs: Sequence[Run], kind: str, keys: tuple[str, ...], title: str, unit: str) -> dict[str, Any]:
    series = []
    for number, run in enumerate(runs):
        columns = run.columns[kind]
        for key in keys:
            if key in columns and np.nan_to_num(columns[key]).any():  # a part of the loss that is off is 0 throughout
                values = columns[key] * _FACTORS.get(unit, 1.0)
                points = thinned(columns["step"], values, POINTS)
                series.append({"run": number, "name": key if len(keys) > 1 else "", "points": points})
    marks = []
    if keys == ("loss",) and kind == "train":
        marks = [{"run": n, "steps": run.skipped[:POINTS].tolist()} for n, run in enumerate(runs) if len(run.skipped)]
    groups = {"train": "Training", "valid": "Validation", "speed": "Speed"}
    return {"group": groups[kind], "title": title, "unit": unit, "series": series, "marks": marks}


def thinned(steps: np.ndarray, values: np.ndarray, most: int) -> list[list[float]]:
    """[step, mean, least, most] of so many stretches of a curve, or of every point; without those that are NaN."""
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    parts = np.array_split(np.arange(len(values)), min(most, len(values)) or 1)
    return [
        [float(steps[part[-1]]), *(_short(float(f(values[part]))) for f in (np.mean, np.min, np.max))]
        for part in parts
        if len(part)
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
