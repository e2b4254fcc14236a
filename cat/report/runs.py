"""What the directory of a run says: its configuration, and its numbers as columns."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cat.config import ConfigError, flatten, read_yaml
from cat.training.records import each_row

KINDS = ("train", "valid", "speed")


@dataclass(frozen=True)
class Run:
    """A run and its records. ``columns``: of every kind of row, a float64 array a key, NaN where a row lacks it or has
    null; "step" is among the keys."""

    name: str
    path: Path
    config: dict[str, Any]
    columns: Mapping[str, Mapping[str, np.ndarray]]
    warnings: list[tuple[int, str]] = field(default_factory=list)
    unreadable: int = 0  # clips

    @property
    def pretraining(self) -> bool:
        return "masks" in self.config

    @property
    def settings(self) -> dict[str, Any]:
        """All fields by dotted names."""
        return flatten(self.config)

    @property
    def skipped(self) -> np.ndarray:
        """Steps of updates that were skipped because they were not finite; not those for which fp16's scale was too
        large."""
        train = self.columns["train"]
        if "grad_norm" not in train:
            return np.empty(0)
        scale = train.get("scale", np.zeros_like(train["step"]))
        overflowed = np.isfinite(train["loss"]) & (scale > 1)
        return train["step"][np.isnan(train["grad_norm"]) & ~overflowed]

    @property
    def last_step(self) -> int:
        steps = self.columns["train"].get("step", np.zeros(0))
        return int(steps[-1]) if len(steps) else 0


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories, with names that tell them apart.

    Raises: `ConfigError` for a directory that is no run's.
    """
    real = [path.resolve() for path in paths]
    if twice := [path for path, where in zip(paths, real, strict=True) if real.count(where) > 1]:
        raise ConfigError(f"{twice[0]} is given twice; expected every run once")
    names = [path.name for path in real]
    unique = [
        name if names.count(name) == 1 else str(Path(path.parent.name, name))
        for path, name in zip(real, names, strict=True)
    ]
    if len(set(unique)) < len(unique):
        unique = [str(path) for path in real]
    return [_read(path, name) for path, name in zip(paths, unique, strict=True)]


def _read(path: Path, name: str) -> Run:
    metrics, config = path / "metrics.jsonl", path / "config.yaml"
    if not metrics.is_file() or not config.is_file():
        missing = metrics.name if config.is_file() else config.name
        raise ConfigError(f"{path} has no {missing}; expected the directory of a run that has begun")
    found: dict[str, dict[str, array[float]]] = {kind: defaultdict(lambda: array("d")) for kind in KINDS}
    counts = dict.fromkeys(KINDS, 0)
    warnings = []
    for row in each_row(metrics):
        kind = row.pop("kind", None)
        if kind == "warning":
            warnings.append((int(row["step"]), str(row["text"])))
        elif kind in found:
            columns, count = found[kind], counts[kind]
            for key, value in row.items():
                column = columns[key]
                column.extend([math.nan] * (count - len(column)))
                column.append(math.nan if value is None else float(value))
            counts[kind] = count + 1
    return Run(
        name, path, read_yaml(config), {k: _even(found[k], counts[k]) for k in KINDS}, warnings, _unreadable(path)
    )


def _even(columns: Mapping[str, array[float]], count: int) -> dict[str, np.ndarray]:
    """As arrays of one length."""
    return {
        key: np.concatenate([np.frombuffer(column), np.full(count - len(column), np.nan)])
        for key, column in columns.items()
    }


def _unreadable(path: Path) -> int:
    log = path / "failures.jsonl"
    return sum(1 for _ in each_row(log)) if log.is_file() else 0


def data_report(run: Run) -> str | None:
    """What `cat-audio prepare` wrote, for people, beside the manifest or the shards that the run was trained on."""
    train = Path(str(run.config.get("data", {}).get("train") or ""))
    for folder in (train, train.parent):
        try:
            about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            if str(about.get("format", "")).startswith("cat-audio prepare"):
                return (folder / "report.md").read_text(encoding="utf-8")
        except (OSError, ValueError, AttributeError):
            continue
    return None
