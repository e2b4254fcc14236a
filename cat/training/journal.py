"""What a run writes down and says while it trains: numbers, warnings, clips that failed, updates that were skipped.

Of several processes the first does; the others keep what all have to know to decide the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cat.config import to_mapping, write_yaml
from cat.data import Failure
from cat.progress import Progress
from cat.training.failures import FailureLog
from cat.training.parallel import is_sharded
from cat.training.records import Metrics, NoMetrics, read_rows
from cat.training.skipped import MOST, Skips, clear_after, path_of, telling, was_skipped, write_batch
from cat.training.task import Task


class Journal:
    """Of a run that begins, or goes on from ``step``; closed by ``records``.

    Attributes:
        progress: the display; silent in all processes but the first.
        metrics: the rows of metrics.jsonl, and where else they go.
        skips: updates that were skipped.
    """

    def __init__(
        self, task: Task, run_dir: Path, step: int, records: contextlib.ExitStack, *, progress: bool = True
    ) -> None:
        self._task, self._run_dir, self._world = task, run_dir, task.world
        config = task.config
        self.progress = Progress(
            config.end,
            step,
            label=run_dir.name,
            enabled=progress and self._world.main,
            seconds_between_lines=config.run.line_every,
        )
        records.callback(self.progress.close)
        self.metrics: Metrics | NoMetrics = NoMetrics()
        self._failures: FailureLog | None = None
        past: list[dict[str, Any]] = []
        if self._world.main:
            past = self._open(step, records)
        self.metrics.validations = self._world.from_main(self.metrics.validations)
        self.skips = Skips(self._world.from_main(telling(past)))
        size = sum(parameter.numel() for parameter in task.parameters.values()) / 1e6
        self.progress.say(
            f"{run_dir}: {size:.2f} M parameters to train on {len(task.manifest)} clips, {self._where()} in "
            f"{task.precision}"
        )

    def _open(self, step: int, records: contextlib.ExitStack) -> list[dict[str, Any]]:
        """The files; returns the rows of the updates so far."""
        config, run = self._task.config, self._task.config.run
        self._run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(config, self._run_dir / "config.yaml")
        self.metrics = Metrics(
            self._run_dir,
            start_step=step,
            tensorboard=run.tensorboard,
            loggers=run.loggers,
            config=to_mapping(config),
            warn=self.progress.say,
        )
        records.callback(self.metrics.close)
        clear_after(self._run_dir, step)
        past = read_rows(self._run_dir / "metrics.jsonl", "train") if step else []
        if past:  # a run that goes on counts on, and does not say again what it has said
            self._task.warnings([row for row in past if None not in row.values()])
        self._failures = FailureLog(
            self._run_dir / "failures.jsonl",
            max_share=config.data.max_failed_share,
            clips=len(self._task.manifest),
            batch_size=config.data.update_clips,
            start_step=step,
        )
        records.callback(self._failures.close)
        return past

    def _where(self) -> str:
        """ "cpu", or "4 processes (cpu), updates of 96 clips in 8 pieces"."""
        share, device = self._task.share, self._task.device
        how = f"{device.type}, FSDP" if is_sharded(self._task.model) else device.type
        processes = f"{self._world.size} processes ({how})" if self._world.several else str(device)
        updates = f", updates of {share.clips} clips in {share.pieces} pieces" if share.pieces > 1 else ""
        return processes + updates

    # ------------------------------------------------------------ while it trains

    def warn(self, step: int, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self.progress.say(f"warning: {warning}")
            self.metrics.warning(step, warning)

    def add_failures(self, failures: Sequence[Failure], step: int, split: str = "train") -> None:
        """Those of this process; all call it. Raises: `cat.data.loader.TooManyFailures`."""
        found = self._world.gathered([(failure.path, failure.reason) for failure in failures])
        if self._failures is not None:
            self._failures.add([Failure(*failure) for part in found for failure in part], step, split)

    def note_skipped(
        self, rows: Sequence[dict[str, Any]], clips: Sequence[Tensor], about: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Count the updates of ``rows`` that were skipped, and write down their batches.

        clips: of each row, this process's. about: of the run, what else is written.
        """
        begun = bool(self.skips.streak)
        for row in self.skips.add(rows, self._task.config.run.max_bad_steps):
            path = path_of(self._run_dir, row["step"])
            of_all = self._world.gathered(clips[row["step"] - rows[0]["step"]].tolist())
            if self.skips.count <= MOST and self._world.main:
                write_batch(self._run_dir, self._of_batch(row, [index for part in of_all for index in part], about()))
            if not begun:
                why = f"its loss or gradient is not finite ({self.values(row)})"
                what = f"What is not finite: {self._task.command} --replay {path}"
                self.warn(rows[-1]["step"], [f"step {row['step']} was skipped: {why}. {what}"])
            begun = True

    def _of_batch(self, row: Mapping[str, Any], clips: Sequence[int], about: Mapping[str, Any]) -> dict[str, Any]:
        path = self._task.manifest.path
        return {
            "step": row["step"],
            "command": self._task.command,
            "values": {name: row[name] for name in self._task.values},
            "clips": [{"index": index, "path": str(path(index))} for index in clips],
            **about,
        }

    def values(self, row: Mapping[str, Any]) -> str:
        """The numbers of an update, in words."""
        return ", ".join(
            f"{name} {'null' if row[name] is None else format(row[name], 'g')}" for name in self._task.values
        )

    # ------------------------------------------------------------ at the end

    def summary(self) -> tuple[float, float, int]:
        """Mean loss of the run's first ``log_every`` updates and of its last, distinct clips that failed."""
        every, found = self._task.config.run.log_every, None
        if self._failures is not None:
            rows = read_rows(self._run_dir / "metrics.jsonl", "train")
            losses = [row["loss"] for row in rows if row["loss"] is not None and not was_skipped(row)]
            first, last = losses[:every], losses[-every:]
            found = sum(first) / max(1, len(first)), sum(last) / max(1, len(last)), self._failures.count
        first_loss, last_loss, failed = self._world.from_main(found)
        return first_loss, last_loss, failed
