"""What a run reports while it trains: JSON Lines, the collapse check; and to `cat.training.sinks`.

``metrics.jsonl`` has one JSON object a line. Here are those of pre-training; fine-tuning has loss, gradient norm and
the head's rate of every update, and in an evaluation the metrics of its task:

- ``{"kind": "train", "step": s, "loss": ..., "regression": ..., "global": ..., "regularisation": ...,
  "pred_std": ..., "target_std": ..., "grad_norm": ..., "lr": ..., "ema_decay": ...}`` for every update; s counts
  updates done, so the first is 1; with "regularisation_weight" where that has a schedule, and
  "regularisation_explained" where the embeddings are known beforehand (`cat.training.guidance`). "regularisation" is
  the L_r of the guide that data.train names; with other guides there are also "regularisation.NAME", the L_r of each,
  not weighted, and the other two with ".NAME"
- ``{"kind": "valid", "step": s, "loss": ..., ...}`` for every evaluation after update s
- ``{"kind": "speed", "step": s, "clips_per_s": ..., "seconds": ..., "data_wait": ..., "memory_bytes": ...,
  "left_s": ...}`` every ``log_every`` updates: the share of the seconds that went by waiting for batches, the most
  memory so far, the seconds until the end; on a GPU whose peak is known also "flops_per_s" of matrix products and
  convolutions, and "matrix_share", how much of the peak that is (`cat.training.watching`)
- ``{"kind": "warning", "step": s, "text": ...}`` for every warning of the trainer, the same one once

Rows of kind train and valid are reproducible: a run that was killed and resumed has the same ones, digit for digit, on
the CPU. A value that is not finite is written as null; an update without a "grad_norm" was skipped
(`cat.training.skipped`). With run.precision=fp16 there is also "scale".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cat.files import append, replacing
from cat.progress import say
from cat.training.sinks import Sinks
from cat.training.skipped import finite


def read_rows(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics or failures file, of one kind if given; a last line cut short by a kill is left out.

    Raises: ValueError naming the line when one in the middle is not JSON.
    """
    return list(each_row(path, kind))


def each_row(path: str | os.PathLike[str], kind: str | None = None) -> Iterator[dict[str, Any]]:
    """As `read_rows`, one at a time."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line == "\n":
                continue
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith("\n"):
                    break
                raise ValueError(f"{path}, line {number}: not JSON: {line[:60].rstrip()!r}; delete the line") from None
            if kind is None or row.get("kind") == kind:
                yield row


def truncate_rows(path: str | os.PathLike[str], step: int) -> list[dict[str, Any]]:
    """Drop the rows after ``step`` from a file (a resumed run writes them again); returns the rows that stay."""
    if not Path(path).exists():
        return []
    rows = [row for row in read_rows(path) if row["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


class JsonLines:
    """An append-only file of JSON objects. A write is there as soon as it returns, or, on a full disk, not at all."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append(self._file, "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows).encode())

    def sync(self) -> None:
        """Put on disk what was written; a checkpoint must not be newer than the rows before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


class Metrics:
    """metrics.jsonl of one run directory, and the `Sinks` beside it.

    Args:
        config: every field of the recipe, for the sinks.
        loggers: of `cat.training.sinks.NAMES`.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = say,
    ) -> None:
        run_dir = Path(run_dir)
        rows = truncate_rows(run_dir / "metrics.jsonl", start_step)
        self.validations = [row for row in rows if row["kind"] == "valid"]
        self._warnings = {row["text"] for row in rows if row["kind"] == "warning"}
        self._sinks = Sinks(run_dir, config, start_step=start_step, tensorboard=tensorboard, loggers=loggers, warn=warn)
        self._file = JsonLines(run_dir / "metrics.jsonl")

    def train(self, rows: list[dict[str, Any]], speed: Mapping[str, float]) -> None:
        """Every update's row to the file; the means of those that were not skipped, once, to the sinks."""
        step = rows[-1]["step"]
        self._file.write([*({"kind": "train", **row} for row in rows), {"kind": "speed", "step": step, **speed}])
        good = [row for row in rows if finite(row)]
        means = {key: sum(row[key] for row in good) / len(good) for key in rows[0] if key != "step" and good}
        self._sinks.scalars("train", {**means, **speed}, step)

    def valid(self, row: dict[str, Any]) -> None:
        row = {"kind": "valid", **row}
        self._file.write([row])
        self.validations.append(row)
        values = {k: v for k, v in row.items() if k not in ("kind", "step") and finite({k: v})}
        self._sinks.scalars("valid", values, row["step"])

    def warning(self, step: int, text: str) -> None:
        """A run that goes on says again what it said at its start; that has a row already."""
        if text not in self._warnings:
            self._warnings.add(text)
            self._file.write([{"kind": "warning", "step": step, "text": text}])

    def sync(self) -> None:
        self._file.sync()
        self._sinks.flush()

    def close(self) -> None:
        self._file.close()
        self._sinks.close()


class NoMetrics:
    """In place of `Metrics` in processes that do not write."""

    def __init__(self) -> None:
        self.validations: list[dict[str, Any]] = []

    def train(self, rows: list[dict[str, Any]], speed: Mapping[str, float]) -> None: ...

    def valid(self, row: dict[str, Any]) -> None:
        self.validations.append({"kind": "valid", **row})

    def warning(self, step: int, text: str) -> None: ...

    def sync(self) -> None: ...


class CollapseCheck:
    """Warns when predictions or targets hardly differ between tokens any more.

    A collapsed run still has a falling loss: everything predicts the same constant. The standard deviations show it
    first. The released code stops below 0.01 (predictions) and 0.1 (targets); here a warning comes after ``steps``
    updates in a row below.
    """

    def __init__(self, *, pred_std: float, target_std: float, steps: int) -> None:
        self._limits = {"pred_std": pred_std, "target_std": target_std}
        self._steps = steps
        self._below = dict.fromkeys(self._limits, 0)

    def update(self, rows: Iterable[Mapping[str, float]]) -> list[str]:
        """Count the updates in ``rows``; the warnings that are due, each once until the value recovers."""
        warnings = []
        for row in rows:
            for key, limit in self._limits.items():
                self._below[key] = self._below[key] + 1 if row[key] < limit else 0
                if self._steps and self._below[key] == self._steps:
                    name = {"pred_std": "predictions", "target_std": "targets"}[key]
                    warnings.append(
                        f"the {name} may have collapsed: {key} is {row[key]:.4f} at step {row['step']}, below "
                        f"{limit:g} for {self._steps} steps; try a lower optim.lr or a longer optim.warmup_steps"
                    )
        return warnings
