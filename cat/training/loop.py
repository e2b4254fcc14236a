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
import dataclasses
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat.checkpoints import store as checkpoints
from cat.checkpoints.background import BackgroundWriter
from cat.checkpoints.store import Checkpoint, CheckpointError
from cat.config import ConfigError, to_mapping
from cat.data import Batch, Failure
from cat.parts import part
from cat.progress import say
from cat.training.identity import check_same_data
from cat.training.journal import Journal
from cat.training.parallel import finished, is_sharded, joint, load_whole, whole
from cat.training.recipe import check_same_run
from cat.training.skipped import finite, path_of
from cat.training.stopping import Stop
from cat.training.task import Task
from cat.training.watching import Watch, told

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
    skipped: int = 0  # updates whose loss or gradient was not finite

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the signal by its name."""
        stopped_by = None if self.stopped_by is None else signal.Signals(self.stopped_by).name
        return {**dataclasses.asdict(self), "stopped_by": stopped_by}


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
        run = self.config.run
        self._writer = BackgroundWriter(
            run_dir / "checkpoints", keep_last=run.keep_last, keep_best=run.keep_best, keep_every=run.keep_every
        )
        self._saved: int | None = None  # the step whose checkpoint is written, or being written
        self._log = torch.zeros(run.log_every, len(task.values), device=self.device)
        self._rows: list[dict[str, Any]] = []  # of the updates whose losses are still on the device
        self._clips: list[Tensor] = []  # of theirs, by indices
        self._since_checkpoint: list[float] = []
        self._validated: tuple[int, float] | None = None  # step and score of the latest evaluation
        self._watch = Watch(self.device, self.precision, end=self.config.end, workers=self.config.data.num_workers)
        self._progress = progress
        self._stop = Stop(self.world)

    @property
    def checkpoint(self) -> Path | None:
        """The newest that is whole; waits for one that is being written."""
        self._writer.settle()
        return self._writer.newest

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
        try:
            load_whole(self.task.model, saved.model, str(saved.path))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {checkpoints.remedy(saved.path)}") from None
        try:
            if saved.step:
                self.task.restore_optimizer(saved.optimizer)
        except ValueError as error:
            raise CheckpointError(
                f"{saved.path / checkpoints.OPTIMIZER}: {error}; {checkpoints.remedy(saved.path)}"
            ) from None
        self.step = self._saved = saved.step
        self._writer.newest = saved.path
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
            self.journal = Journal(self.task, self.run_dir, self.step, records, progress=self._progress)
            records.callback(self._settle)
            self._begun_at = self.step
            self._watch.begin(self.step)
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
        self.journal.warn(self.step, self.task.advice())
        validates = self.task.valid is not None
        if validates and self._validation_due(self.step):
            self._make_up()
        self.task.train_mode()
        self._watch.restart()
        batches = self.task.batches(self.step, end - self.step, self.journal.progress.say)
        while self.step < end and not self._stop.received and not self._enough():
            pieces = self._next(batches)
            if pieces is None:
                break
            self._update(pieces)
            self._writer.check()
            if self.step % run.log_every == 0:
                self._flush()
            if validates and run.eval_every and self.step % run.eval_every == 0:
                self._evaluate()
            asked = self._stop.save_asked() and self.step < end
            if asked or self.step % run.checkpoint_every == 0:
                self._save(hurried=self.step % run.checkpoint_every != 0)
                if asked:
                    self._writer.wait()
                    self.journal.progress.say(f"step {self.step}: saved {self.checkpoint}, as SIGUSR1 asked")
        self._save()
        self._writer.wait()

    def _settle(self) -> None:
        """A second signal does not cost a checkpoint that is being written."""
        if self._writer.busy:
            self.journal.progress.say("waiting for the checkpoint that is being written")
        self._writer.settle()

    def _next(self, batches: Iterator[list[Batch]]) -> list[Batch] | None:
        """The pieces of the next update; None when a signal came, to whichever process."""
        with self._watch.waiting():
            pieces = self._stop.wait(lambda: next(batches))
        failed = [failure for batch in pieces or () for failure in batch.failures]
        some_failed = self._stop.agree(bool(failed))
        if pieces is None or (self.world.several and self._stop.received):
            return None
        if some_failed:
            self.journal.add_failures(failed, self.step + 1)
        return pieces

    def _validation_due(self, step: int) -> bool:
        """Whether a run that is not disturbed evaluates at this step."""
        every = (self.config.run.eval_every, self.config.run.checkpoint_every)
        return step == self.config.end or any(n and step and step % n == 0 for n in every)

    def _make_up(self) -> None:
        """For an evaluation that a signal or an error kept the run from, and the score that its checkpoint lacks."""
        rows = self.journal.metrics.validations
        done = rows and rows[-1]["step"] == self.step
        score = self.task.score(rows[-1]) if done else self._evaluate()
        regular = self.step == self.config.end or self.step % self.config.run.checkpoint_every == 0
        scored = self._data["valid"] is not None and self.world.main
        if self.checkpoint and regular and score is not None and scored:
            checkpoints.add_score(self.checkpoint, score)

    def _enough(self) -> bool:
        """Judged by the evaluations that every run of this recipe has: none where one was stopped by hand."""
        return self.task.enough([row for row in self.journal.metrics.validations if self._validation_due(row["step"])])

    def _rescue(self, error: Exception) -> None:
        """Save the updates since the last checkpoint before an error ends the run; ``error`` says what became of it."""
        done = finished(self.device, _DEVICE_SECONDS)
        if error is self._writer.error:  # there is no more room, or no permission, for the next one either
            error.add_note(f"the last good checkpoint: {self.checkpoint or 'none'}; {self._how_to_go_on()}")
            return
        if self.step == self._begun_at or isinstance(error, TrainingError) or not self.world.main:
            return
        try:
            if not done:
                raise TrainingError(f"{self.device} waits for another process")
            if not self.task.whole:
                raise TrainingError("the error came in the middle of an update")
            if is_sharded(self.task.model):
                raise TrainingError("with run.parallel=fsdp its weights lie in all processes")
            self._save(hurried=True, prune=False)
            self._writer.wait()
        except Exception as second:
            last = self.checkpoint or "none"
            error.add_note(f"step {self.step} could not be saved ({second}); the last checkpoint: {last}")
        else:
            error.add_note(f"step {self.step} is saved; {self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        return f"go on with: {self.task.command} --resume {self.run_dir}"

    def unrecorded(self, count: int) -> Iterator[int]:
        """For profiling: ``count`` updates from where the run stands, one a turn, that leave no records. Yields their
        numbers of clips."""
        self.task.train_mode()
        batches = self.task.batches(self.step, count, say)
        for _ in range(count):
            with part("data wait"):
                pieces = next(batches)
            self._update(pieces)
            self._rows.clear()
            self._clips.clear()
            yield sum(len(batch.clips) for batch in pieces)

    def _update(self, pieces: list[Batch]) -> None:
        """One optimiser step. Nothing here waits for the device."""
        self._log[len(self._rows)], rates = self.task.train(pieces, self.step)
        self.step += 1
        self._rows.append(rates)
        self._clips.append(torch.cat([batch.clips for batch in pieces]))
        flops = sum(map(self.task.flops, pieces)) if self._watch.peak else None
        self._watch.updated(self.task.share.clips, flops)

    # ------------------------------------------------------------ records

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
        speed = self._watch.measured(self.step)
        self.journal.metrics.train(rows, speed)
        clips, self._rows, self._clips = self._clips, [], []  # not before the rows are written: see `_save`
        self.journal.note_skipped(rows, clips, self._about)
        self._check_skipped()
        good = [row for row in rows if finite(row)]
        self._since_checkpoint += [row["loss"] for row in good]
        losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
        loss = sum(losses) / len(losses) if losses else math.nan
        self.journal.progress.advance(self.step, f"loss {loss:.4f}, {told(speed)}")
        self.journal.warn(self.step, [*self.task.warnings(good), *self._watch.warnings()])
        self._watch.restart()

    def _about(self) -> dict[str, Any]:
        """What a checkpoint and a batch that is written down hold of the run."""
        return {"config": to_mapping(self.config), "made_with": self.task.made_with, "data": self._data}

    def _check_skipped(self) -> None:
        """Raises: `TrainingError` when too many updates in a row were skipped."""
        streak, most = self.journal.skips.streak, self.config.run.max_bad_steps
        if len(streak) < most:
            return
        first = streak[0]
        raise TrainingError(
            f"the loss or its gradient is not finite at step {first['step']} ({self.journal.values(first)})"
            + (f" and in all of the {most} updates from there (run.max_bad_steps)" if most > 1 else "")
            + f"; {self._remedy()}. What is not finite: {self.task.command} --replay "
            f"{path_of(self.run_dir, first['step'])}"
        )

    def _check_parameters(self) -> None:
        """An update can spoil the weights though its own loss was finite; that must not become a checkpoint."""
        norm = joint(torch.nn.utils.get_total_norm(self.task.parameters.values()))
        if not math.isfinite(norm.item()):
            raise TrainingError(f"the weights are not finite after step {self.step}; {self._remedy()}")

    def _remedy(self) -> str:
        good = self._last_good()
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
        fp32 = ", or run.precision=fp32" if self.precision != "fp32" else ""
        return f"{kept}. Start another run (run.name=OTHER) with a lower optim.lr or a longer optim.warmup_steps{fp32}"

    def _last_good(self) -> Path | None:
        """The newest checkpoint; of before the latest updates in a row that were skipped, since nobody knows whether it
        was not the weights."""
        streak = self.journal.skips.streak
        if self.checkpoint is None or not streak:
            return self.checkpoint
        first = checkpoints.step_name(streak[0]["step"])
        there = checkpoints.list_checkpoints(self.run_dir / "checkpoints")
        return next((path for path in reversed(there) if path.name < first), None)

    def _evaluate(self) -> float | None:
        """The validation score. None when a signal ends it; the run that goes on makes up for it."""
        self._flush()
        try:
            values = self.task.evaluate(self._heeded(self.task.scoring_batches(self.journal.progress.say)))
        except _Stopped:
            return None
        finally:
            self.task.train_mode()
        values = self.world.from_main(values)  # on other machines the last digit may differ
        self.journal.metrics.valid({"step": self.step, **values})
        self.journal.progress.say(f"step {self.step}: validation {self.task.told(values)}")
        score = self.task.score(values)
        self._validated = (self.step, score)
        self._watch.restart()
        return score

    def _heeded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of an evaluation, until a signal."""
        failed: list[Failure] = []
        while (batch := self._stop.wait(lambda: next(batches, None))) is not None:
            failed += batch.failures
            yield batch
        self._stop.agree()
        self.journal.add_failures(failed, self.step, "valid")
        if self._stop.received:
            raise _Stopped

    def _save(self, *, hurried: bool = False, prune: bool = True) -> None:
        """Have a checkpoint written, in the background, unless this step has one. ``hurried``: without a score, which
        may need an evaluation.

        Amid updates that are skipped nothing is written that need not be, and no older one is deleted: the weights may
        be why."""
        if self._saved == self.step:
            return
        self._flush()
        self._check_parameters()
        hurried = hurried or self._stop.received is not None
        if self.journal.skips.streak:
            if not hurried and self.step < self.config.end:
                return
            prune = False
        score = None if hurried else self._score()
        self._writer.wait()  # before there are copies of another one
        model, optimizer = (
            whole(part, self.world) for part in (self.task.model.state_dict(), self.task.optimizer_tensors())
        )
        if self.world.main:
            self._write_checkpoint(model, optimizer, score, prune)
        else:
            self._writer.newest = self.run_dir / "checkpoints" / checkpoints.step_name(self.step)
        self._saved = self.step
        if not hurried:
            self._since_checkpoint = []
        self._watch.restart()

    def _write_checkpoint(
        self, model: dict[str, Tensor], optimizer: dict[str, Tensor], score: float | None, prune: bool
    ) -> None:
        self.journal.metrics.sync()
        about = self._about()
        self._writer.save(
            step=self.step,
            model=model,
            optimizer=optimizer,
            copied=is_sharded(self.task.model),
            config=about.pop("config"),
            score=score,
            extra=about,
            prune=prune,
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
        first_loss, last_loss, failed = self.journal.summary()
        return RunResult(
            self.run_dir,
            self.step,
            self.checkpoint,
            first_loss,
            last_loss,
            failed,
            self._stop.received,
            early=self.step < self.config.end and self._enough(),
            skipped=self.journal.skips.count,
        )
