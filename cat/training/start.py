"""How a run of any task begins: its directory, its newest checkpoint, the disk, arithmetic that can be repeated."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints import CheckpointError
from cat.checkpoints import store as checkpoints
from cat.device import pick_device
from cat.progress import say
from cat.training.directory import check_disk, delete_run, files_of_earlier_run, sole_writer, total_size
from cat.training.loop import Trainer
from cat.training.profiling import StepProfile, profile_steps
from cat.training.recipe import RunConfig
from cat.training.task import Task

MakeTask = Callable[[], Task]


@contextlib.contextmanager
def started(
    make: MakeTask, run: RunConfig, run_dir: Path, *, resume: bool, overwrite: bool, progress: bool
) -> Iterator[Trainer]:
    """The trainer of what ``make`` makes, ready to `Trainer.run`: afresh, or from the newest checkpoint in ``run_dir``,
    which is its own while this is entered."""
    with sole_writer(run_dir), _trainer(make, run, run_dir, resume=resume, progress=progress) as trainer:
        # Only now, when everything else has proved fit: nothing is deleted for a run that cannot start.
        old = [] if resume else files_of_earlier_run(run_dir, overwrite=overwrite)
        if trainer.step < trainer.config.end:
            left = trainer.config.end - trainer.step
            check_disk(run_dir, run, needed=_checkpoint_size(trainer.task), freed=total_size(old), updates=left)
        if old:
            delete_run(run_dir)
        yield trainer


def profile_task(make: MakeTask, run: RunConfig, run_dir: Path, *, steps: int, resume: bool) -> StepProfile:
    """Time ``steps`` updates of what ``make`` makes; nothing else is saved."""
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    with sole_writer(run_dir), _trainer(make, run, run_dir, resume=resume, progress=True) as trainer:
        return profile_steps(trainer, steps)


@contextlib.contextmanager
def _trainer(make: MakeTask, run: RunConfig, run_dir: Path, *, resume: bool, progress: bool) -> Iterator[Trainer]:
    """The trainer of a run, at step 0 or where its newest checkpoint left it."""
    newest = checkpoints.newest(run_dir) if resume else None
    with repeatable(run):
        trainer = Trainer(make(), run_dir, progress=progress)
        torch.backends.cudnn.benchmark |= searches(trainer.task)
        if newest is None:
            trainer.task.begin()
        notes = _restored(trainer, newest) if newest else []
        if resume and progress:
            notes.insert(
                0, f"going on from {newest}" if newest else f"{run_dir} has no checkpoint yet: starting at step 0"
            )
            say("\n".join(notes))
        yield trainer


def _restored(trainer: Trainer, newest: Path) -> list[str]:
    """Takes it up; the error about a damaged one says how to go on without it."""
    try:
        return trainer.restore(checkpoints.load(newest))
    except CheckpointError as error:
        again = f"{trainer.task.command} --resume {shlex.quote(str(trainer.run_dir))}"
        if checkpoints.other_whole(newest):
            error.add_note(f"and then: {again}\nNothing was changed or deleted.")
        else:
            error.add_note("No other checkpoint of this run is whole. Nothing was changed or deleted.")
        raise


def _checkpoint_size(task: Task) -> int:
    """Bytes: the model, and two moments of what is trained."""
    return checkpoints.size_of(task.model.state_dict()) + 2 * checkpoints.size_of(task.parameters)


@contextlib.contextmanager
def repeatable(run: RunConfig) -> Iterator[None]:
    """With the run's number of threads, and on the CPU sums are taken in a fixed order. (On a GPU that would cost time,
    and some operators cannot.)"""
    memory: Any = torch.utils.deterministic
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fill, search = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.set_num_threads(run.threads or threads)
    if pick_device(run.device).type == "cpu":
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = search


def searches(task: Task) -> bool:
    """Whether cuDNN is to time its algorithms for every shape that it meets, and take the fastest: where that is done
    once a run, and not where the choice, which may differ from run to run, would change numbers that are to be the
    same."""
    fixed = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    return task.device.type == "cuda" and task.one_shape and not fixed
