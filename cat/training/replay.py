"""The update that was skipped, again: which module was the first whose output or gradient is not finite.

The batch, its masks and its noise are functions of seed and step. The weights are those of the newest checkpoint before
the update, or of the seed, and the updates between are made again; nothing is written. Without kernels that are
compiled and without a CUDA graph, or no module could be looked at: on the CPU the numbers are otherwise those of then,
bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError, from_mapping
from cat.device import pick_device
from cat.model import CAT
from cat.progress import Progress, say
from cat.training.finiteness import Finder, Found, largest
from cat.training.identity import check_same_data
from cat.training.loop import Trainer
from cat.training.recipe import SECTION_PRESETS, Recipe
from cat.training.skipped import SkippedBatch, read_batch
from cat.training.start import repeatable
from cat.training.task import Task

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Replay:
    """What became of the update the second time."""

    batch: SkippedBatch
    begun_from: Path | None  # checkpoint; None: the seed
    again: int  # updates that were made again before it; below 0: the weights are of so many updates later
    values: dict[str, float]
    found: Found | None
    clips: tuple[str, ...]  # that are not finite where the model's input is not
    largest: tuple[str, float]  # weight, before the update

    def as_dict(self) -> dict[str, Any]:
        """For JSON; "found" is null where everything was finite this time."""
        return {
            **{"run_dir": self.batch.run_dir, "step": self.batch.step, "begun_from": self.begun_from},
            **{"again": self.again, "values": self.values, "found": self.found, "clips": self.clips},
            "largest_weight": {"name": self.largest[0], "value": self.largest[1]},
        }

    def told(self) -> str:
        weights = str(self.begun_from or "the weights of the seed")
        way = f" and {self.again} updates after it" if self.again > 0 else ""
        lines = [
            f"step {self.batch.step} of {self.batch.run_dir}, again, from {weights}{way}",
            ", ".join(f"{name} {value:g}" for name, value in self.values.items()),
            f"the largest weight before it: {self.largest[1]:.4g} in {self.largest[0]}",
        ]
        if self.again < 0:
            lines.append(
                f"note: there is no checkpoint before the step any more; these weights are {-self.again} updates newer"
            )
        if self.found is None:
            lines.append(
                "everything is finite this time. It was not the batch alone: weights, device, precision, kernels or "
                "versions were others (run.device, run.precision), or the machine made a mistake"
            )
        else:
            lines.append(f"not finite first: {self.found}")
            lines += [f"  of the clip {clip}" for clip in self.clips]
        return "\n".join(lines)


def read_replay(path: Path, kind: type[R], command: str, overrides: Sequence[str] = ()) -> tuple[SkippedBatch, R]:
    """What the file of a skipped batch says, and the configuration to run it again with.

    Raises: `ConfigError` for another file, or one of another command.
    """
    batch = read_batch(path)
    if batch.command != command:
        raise ConfigError(f"{path} is a batch of {batch.command}; expected one of {command}: use that command")
    config = from_mapping(kind, batch.config, source=str(path), overrides=overrides, presets=SECTION_PRESETS)
    run = dataclasses.replace(config.run, compile="none", cuda_graph=False)
    return batch, cast(R, dataclasses.replace(cast(Any, config), run=run))


def replay(make: Callable[[], Task], config: Recipe, batch: SkippedBatch, *, progress: bool = True) -> Replay:
    """Run a skipped update again, of the task that ``make`` makes by ``config``.

    Raises: `ConfigError` when the data are not the run's; `cat.checkpoints.CheckpointError`.
    """
    with repeatable(config.run, pick_device(config.run.device)):
        task = make()
        trainer = Trainer(task, batch.run_dir, progress=progress)
        check_same_data(batch.data, task.identity, config, batch.run_dir)
        start = _checkpoint_before(batch)
        if start is None:
            task.begin()
        else:
            for note in trainer.restore(checkpoints.load(start)):
                say(note)
        again = batch.step - 1 - trainer.step
        _catch_up(trainer, again, progress)
        return _once_more(task, batch, start, again)


def _checkpoint_before(batch: SkippedBatch) -> Path | None:
    """The newest before the step; else the oldest; none for a run that has none, or had none at the time."""
    there = checkpoints.list_checkpoints(batch.run_dir / "checkpoints")
    before = [path for path in there if path.name < checkpoints.step_name(batch.step)]
    if before:
        return before[-1]
    every = batch.config.get("run", {}).get("checkpoint_every", math.inf)
    return None if not there or batch.step <= every else there[0]


def _catch_up(trainer: Trainer, updates: int, progress: bool) -> None:
    if updates <= 0:
        return
    shown = Progress(updates, label="updates before it", unit="updates", enabled=progress)
    try:
        for done, _ in enumerate(trainer.unrecorded(updates), start=1):
            shown.advance(done)
    finally:
        shown.close()


def _once_more(task: Task, about: SkippedBatch, start: Path | None, again: int) -> Replay:
    task.train_mode()
    pieces = next(iter(task.batches(about.step - 1, 1, say)))
    biggest = largest(task.model)
    model = task.model
    low: dict[str, nn.Module] = {"teacher": model.acting_teacher} if isinstance(model, CAT) else {}
    with Finder(model, low) as finder:
        values, _ = task.train(pieces, about.step - 1)
    found = finder.first
    named = []
    if found is not None and found.kind == "input":  # not of masks, of which a clip has several
        clips = pieces[found.piece].clips.tolist()
        named = [str(task.manifest.path(clips[row])) for row in found.rows if row < len(clips)]
    return Replay(
        about, start, again, dict(zip(task.values, values.tolist(), strict=True)), found, tuple(named), biggest
    )
