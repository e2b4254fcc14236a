"""The training loop of every task, on the CPU or on GPUs: one process, or several that do the same (`cat.distributed`).

It owns what does not depend on what is trained: records, checkpoints, signals, errors. What does is a `Task`. Every
random number of a task is a function of the seed and the step, so a checkpoint holds no generator states, and a run
that was killed and resumed gives the same losses as one that was not: bit for bit on the CPU, with the same number of
threads.

Of several processes all take every step and decide the same: their numbers are those of the whole batch, and what one
of them alone is told, a signal, they agree on before an update. The first writes.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints import store as checkpoints
from cat.checkpoints.store import Checkpoint, CheckpointError
from cat.config import ConfigError, to_mapping, write_yaml
from cat.data import Batch, Failure
from cat.parts import part
from cat.progress import Progress, say
from cat.signals import StopSignals
from cat.training.failures import FailureLog
from cat.training.identity import check_same_data
from cat.training.parallel import finished
from cat.training.recipe import check_same_run
from cat.training.records import Metrics, NoMetrics, read_rows
from cat.training.task import Task

_DEVICE_SECONDS = 10.0  # after an error: a GPU that has not done its work by then waits for a process that has gone


class TrainingError(RuntimeError):
    """Training cannot go on; the checkpoints written so far are good."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    step: int
    checkpoint: Path | None
    first_loss: float  # mean of the run's first log_every updates
    last_loss: float  # and of its last
    failed_clips: int
    stopped_by: int | None  # signal number
    early: bool = False  # the task had enough before the end of its schedule


class _Stopped(Exception):
    """A signal came in the middle of an evaluation."""


class Trainer:
    """One run: a task, its records, and the loop over its updates. `cat.training.pretrain` is a way in."""

    def __init__(self, task: Task, run_dir: Path, *, progress: bool = True) -> None:
        self.task, self.run_dir, self.config = task, run_dir, task.config
        self.world = task.world
        self.device, self.precision = task.device, task.precision
        self._data = task.identity
        self.step = self._begun_at = 0
        self.checkpoint: Path | None = None
        self._log = torch.zeros(self.config.run.log_every, len(task.values), device=self.device)
        self._rows: list[dict[str, Any]] = []  # of the updates whose losses are still on the device
        self._since_checkpoint: list[float] = []
        self._validated: tuple[int, float] | None = None  # step and score of the latest evaluation
        self._progress = progress and self.world.main
        self._stop = StopSignals()
        self._agreed_stop: int | None = None  # the signal that came to one of several processes
        self._agreed_save = False
        self._saving = False  # True after an error of saving itself

    # ------------------------------------------------------------ resuming

    def restore(self, saved: Checkpoint) -> list[str]:
        """Take up the run where a checkpoint left it; returns notes for the user.

        Raises: `ConfigError` when configuration, precision or data are not the run's; `CheckpointError` when tensors do
        not fit.
        """
        check_same_run(saved.state["config"], self.config, self.run_dir)
        made, now = saved.state.get("made_with", {}), self.task.made_with
        if made.get("precision", self.precision) != self.precision:
            raise ConfigError(
                f"{self.run_dir} was trained in {made['precision']}, and run.precision={self.config.run.precision} on "
                f"this device is {self.precision}: its numbers would change. "
                f"Resume with run.precision={made['precision']}"
            )
        self._data, notes = check_same_data(saved.state.get("data") or {}, self._data, self.config, self.run_dir)
        checkpoints.load_tensors(self.task.model, saved.model, str(saved.path))
        try:
            if saved.step:
                self.task.restore_optimizer(saved.optimizer)
        except ValueError as error:
            raise CheckpointError(
                f"{saved.path / checkpoints.OPTIMIZER}: {error}; {checkpoints.remedy(saved.path)}"
            ) from None
        self.step, self.checkpoint = saved.step, saved.path
        return notes + [
            f"{key} was {made[key]} and is now {value}: losses will agree up to rounding, not bit for bit"
            for key, value in now.items()
            if key in made and made[key] != value
        ]

    # ------------------------------------------------------------ the loop

    def run(self) -> RunResult:
        """Train from `step` to the end of the schedule or ``run.stop_at``, or until SIGINT, SIGTERM or SIGHUP. SIGUSR1
        asks for a checkpoint.

        An error does not cost the updates since the last checkpoint, unless it made them bad: they are saved first.
        """
        with contextlib.ExitStack() as records, self._stop:
            self._open_records(records)
            self._begun_at = self.step
            try:
                self._train()
            except Exception as error:
                cause = self.world.cause(error)
                self._rescue(cause)
                if cause is error:
                    raise
                raise cause from error
            return self._result()

    def _train(self) -> None:
        run, end = self.config.run, self.config.end
        self._warn(self.task.advice())
        validates = self.task.valid is not None
        if validates and self._validation_due(self.step):
            self._make_up()
        self.task.train_mode()
        self._restart_clock()
        batches = self.task.batches(self.step, end - self.step, self.progress.say)
        while self.step < end and not self._received and not self._enough():
            pieces = self._next(batches)
            if pieces is None:
                break
            self._update(pieces)
            if self.step % run.log_every == 0:
                self._flush()
            if validates and run.eval_every and self.step % run.eval_every == 0:
                self._evaluate()
            asked = self._save_asked() and self.step < end
            if asked or self.step % run.checkpoint_every == 0:
                self._save(hurried=self.step % run.checkpoint_every != 0)
                if asked:
                    self.progress.say(f"step {self.step}: saved {self.checkpoint}, as SIGUSR1 asked")
        self._save()

    def _next(self, batches: Iterator[list[Batch]]) -> list[Batch] | None:
        """The pieces of the next update; None when a signal came, to whichever process."""
        pieces = self._stop.wait(lambda: next(batches))
        failed = [failure for batch in pieces or () for failure in batch.failures]
        if self.world.several:
            asked = self._told_to_stop or 0, int(self._stop.save_asked()), int(bool(failed))
            stopped, save, any_failed = self.world.agreed(list(asked))
            self._agreed_stop, self._agreed_save = stopped or None, bool(save)
            failed = self._of_all(failed) if any_failed else []
            if stopped:
                return None
        if pieces is not None:
            self._add_failures(failed, self.step + 1)
        return pieces

    @property
    def _received(self) -> int | None:
        """The signal that ends the run."""
        return self._agreed_stop if self.world.several else self._told_to_stop

    @property
    def _told_to_stop(self) -> int | None:
        """The signal that this process was sent, or should have been."""
        return self._stop.received or (signal.SIGTERM if self.world.abandoned else None)

    def _save_asked(self) -> bool:
        return self._agreed_save if self.world.several else self._stop.save_asked()

    def _of_all(self, failures: list[Failure]) -> list[Failure]:
        """Those of all processes, in the order of their clips in the batch."""
        found = self.world.gathered([(failure.path, failure.reason) for failure in failures])
        return [Failure(*failure) for part in found for failure in part]

    def _add_failures(self, failures: list[Failure], step: int, split: str = "train") -> None:
        if self.failures is not None:
            self.failures.add(failures, step, split)

    def _validation_due(self, step: int) -> bool:
        """Whether a run that is not disturbed evaluates at this step."""
        every = (self.config.run.eval_every, self.config.run.checkpoint_every)
        return step == self.config.end or any(n and step and step % n == 0 for n in every)

    def _make_up(self) -> None:
        """For an evaluation that a signal or an error kept the run from, and the score that its checkpoint lacks."""
        rows = self.metrics.validations
        done = rows and rows[-1]["step"] == self.step
        score = self.task.score(rows[-1]) if done else self._evaluate()
        regular = self.step == self.config.end or self.step % self.config.run.checkpoint_every == 0
        scored = self._data["valid"] is not None and self.world.main
        if self.checkpoint and regular and score is not None and scored:
            checkpoints.add_score(self.checkpoint, score)

    def _enough(self) -> bool:
        """Judged by the evaluations that every run of this recipe has: none where one was stopped by hand."""
        return self.task.enough([row for row in self.metrics.validations if self._validation_due(row["step"])])

    def _rescue(self, error: Exception) -> None:
        """Save the updates since the last checkpoint before an error ends the run; ``error`` says what became of it."""
        done = finished(self.device, _DEVICE_SECONDS)
        if self.step == self._begun_at or isinstance(error, TrainingError) or self._saving or not self.world.main:
            return
        try:
            if not done:
                raise TrainingError(f"{self.device} waits for another process")
            if not self.task.whole:
                raise TrainingError("the error came in the middle of an update")
            self._save(hurried=True)
        except Exception as second:
            last = self.checkpoint or "none"
            error.add_note(f"step {self.step} could not be saved ({second}); the last checkpoint: {last}")
        else:
            error.add_note(f"step {self.step} is saved; go on with: {self.task.command} --resume {self.run_dir}")

    def unrecorded(self, count: int) -> Iterator[int]:
        """For profiling: ``count`` updates from where the run stands, one a turn, that leave no records. Yields their
        numbers of clips."""
        self.task.train_mode()
        self._restart_clock()
        batches = self.task.batches(self.step, count, say)
        for _ in range(count):
            with part("data wait"):
                pieces = next(batches)
            self._update(pieces)
            self._rows.clear()
            yield sum(len(batch.clips) for batch in pieces)

    def _open_records(self, records: contextlib.ExitStack) -> None:
        self.progress = Progress(self.config.end, self.step, label=self.run_dir.name, enabled=self._progress)
        records.callback(self.progress.close)
        self.metrics: Metrics | NoMetrics = NoMetrics()
        self.failures: FailureLog | None = None
        if self.world.main:
            self.metrics, self.failures = self._written_records(records)
        self.metrics.validations = self.world.from_main(self.metrics.validations)
        size = sum(parameter.numel() for parameter in self.task.parameters.values()) / 1e6
        self.progress.say(
            f"{self.run_dir}: {size:.2f} M parameters to train on {len(self.task.manifest)} clips, "
            f"{self._where()} in {self.precision}"
        )

    def _written_records(self, records: contextlib.ExitStack) -> tuple[Metrics, FailureLog]:
        run, data = self.config.run, self.config.data
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(self.config, self.run_dir / "config.yaml")
        metrics = Metrics(self.run_dir, start_step=self.step, tensorboard=run.tensorboard, warn=self.progress.say)
        records.callback(metrics.close)
        if self.step:  # a run that goes on counts on, and does not say again what it has said
            past = read_rows(self.run_dir / "metrics.jsonl", "train")
            self.task.warnings([row for row in past if None not in row.values()])
        failures = FailureLog(
            self.run_dir / "failures.jsonl",
            max_share=data.max_failed_share,
            clips=len(self.task.manifest),
            batch_size=data.update_clips,
            start_step=self.step,
        )
        records.callback(failures.close)
        return metrics, failures

    def _where(self) -> str:
        """ "cpu", or "4 processes (cpu), updates of 96 clips in 8 pieces"."""
        share, several = self.task.share, self.world.several
        processes = f"{self.world.size} processes ({self.device.type})" if several else str(self.device)
        return processes if share.pieces == 1 else f"{processes}, updates of {share.clips} clips in {share.pieces}"

    def _update(self, pieces: list[Batch]) -> None:
        """One optimiser step. Nothing here waits for the device."""
        self._log[len(self._rows)], rates = self.task.train(pieces, self.step)
        self.step += 1
        self._clips += self.task.share.clips
        self._rows.append(rates)

    # ------------------------------------------------------------ records

    def _restart_clock(self) -> None:
        self._clock, self._clips = time.perf_counter(), 0

    def _flush(self) -> None:
        """Fetch the losses of the updates since the last time, in one copy, and record them."""
        if not self._rows:
            return
        values = self._log[: len(self._rows)].tolist()
        first = self.step - len(self._rows) + 1
        rows = [
            {"step": first + i, **dict(zip(self.task.values, line, strict=True)), **row}
            for i, (line, row) in enumerate(zip(values, self._rows, strict=True))
        ]
        rows = [{**row, **self.task.derived(row)} for row in rows]
        seconds = time.perf_counter() - self._clock
        self.metrics.train(rows, clips_per_s=self._clips / seconds, seconds=seconds)
        self._rows = []  # not before they are written: no checkpoint without the rows of its updates
        self._check_finite(rows)
        losses = [row["loss"] for row in rows]
        self._since_checkpoint += losses
        self.progress.advance(self.step, f"loss {sum(losses) / len(losses):.4f}, {self._clips / seconds:.1f} clips/s")
        self._warn(self.task.warnings(rows))
        self._restart_clock()

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            self.progress.say(f"warning: {warning}")
            self.metrics.warning(self.step, warning)

    def _check_finite(self, rows: list[dict[str, Any]]) -> None:
        bad = next((row for row in rows if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]))), None)
        if bad is None:
            return
        parts = ", ".join(f"{name} {bad[name]:g}" for name in self.task.values)
        raise TrainingError(f"the loss or its gradient is not finite at step {bad['step']} ({parts}); {self._remedy()}")

    def _check_parameters(self) -> None:
        """An update can spoil the weights though its own loss was finite; that must not become a checkpoint."""
        norms = torch.nn.utils.get_total_norm(self.task.parameters.values())
        if not math.isfinite(norms.item()):
            raise TrainingError(f"the weights are not finite after step {self.step}; {self._remedy()}")

    def _remedy(self) -> str:
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was written yet"
        fp32 = ", or run.precision=fp32" if self.precision == "bf16" else ""
        return f"{kept}. Start another run (run.name=OTHER) with a lower optim.lr or a longer optim.warmup_steps{fp32}"

    def _evaluate(self) -> float | None:
        """The validation score. None when a signal ends it; the run that goes on makes up for it."""
        self._flush()
        try:
            values = self.task.evaluate(self._heeded(self.task.scoring_batches(self.progress.say)))
        except _Stopped:
            return None
        finally:
            self.task.train_mode()
        values = self.world.from_main(values)  # on other machines the last digit may differ
        self.metrics.valid({"step": self.step, **values})
        self.progress.say(f"step {self.step}: validation {self.task.told(values)}")
        score = self.task.score(values)
        self._validated = (self.step, score)
        self._restart_clock()
        return score

    def _heeded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of an evaluation, until a signal."""
        failed: list[Failure] = []
        while (batch := self._stop.wait(lambda: next(batches, None))) is not None:
            failed += batch.failures
            yield batch
        if self.world.several:
            self._agreed_stop = self.world.agreed([self._told_to_stop or 0])[0] or None
        self._add_failures(self._of_all(failed), self.step, "valid")
        if self._received:
            raise _Stopped

    def _save(self, *, hurried: bool = False) -> None:
        """Write a checkpoint unless this step has one. ``hurried``: without a score, which may need an evaluation."""
        if self.checkpoint is not None and self.checkpoint.name == checkpoints.step_name(self.step):
            return
        self._flush()
        self._check_parameters()
        hurried = hurried or self._received is not None
        score = None if hurried else self._score()
        if self.world.main:
            self._write_checkpoint(score)
        else:
            self.checkpoint = self.run_dir / "checkpoints" / checkpoints.step_name(self.step)
        if not hurried:
            self._since_checkpoint = []
        self._restart_clock()

    def _write_checkpoint(self, score: float | None) -> None:
        self.metrics.sync()
        self._saving = True
        self.checkpoint = checkpoints.save(
            self.run_dir / "checkpoints",
            step=self.step,
            model=self.task.model.state_dict(),
            optimizer=self.task.optimizer_tensors(),
            config=to_mapping(self.config),
            score=score,
            extra={"made_with": self.task.made_with, "data": self._data},
        )
        self._saving = False
        checkpoints.prune(
            self.run_dir / "checkpoints", keep_last=self.config.run.keep_last, keep_best=self.config.run.keep_best
        )

    def _score(self) -> float | None:
        """Validation score at this step, or the mean training loss since the last checkpoint: of one kind in a run."""
        if self._data["valid"] is None:
            losses = self._since_checkpoint
            return sum(losses) / len(losses) if losses else None
        if self.task.valid is None:
            return None
        if self._validated is not None and self._validated[0] == self.step:
            return self._validated[1]
        return self._evaluate()

    def _result(self) -> RunResult:
        run, found = self.config.run, None
        if self.failures is not None:
            losses = [row["loss"] for row in read_rows(self.run_dir / "metrics.jsonl", "train")]
            first, last = losses[: run.log_every], losses[-run.log_every :]
            found = sum(first) / max(1, len(first)), sum(last) / max(1, len(last)), self.failures.count
        first_loss, last_loss, failed = self.world.from_main(found)
        return RunResult(
            self.run_dir,
            self.step,
            self.checkpoint,
            first_loss,
            last_loss,
            failed,
            self._received,
            early=self.step < self.config.end and self._enough(),
        )
