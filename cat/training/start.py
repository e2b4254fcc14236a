"""How a run of any task begins: its directory, its newest checkpoint, the disk, arithmetic that can be repeated."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints import CheckpointError
from cat.checkpoints import store as checkpoints
from cat.checkpoints.store import Checkpoint
from cat.config import ConfigError, differences, to_mapping
from cat.distributed import Processes, current, joined
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
    which is its own while this is entered. In each of several processes (`cat.distributed`) there is one.

    Where torchrun has started the processes again, the run goes on, if it had begun.
    """
    with joined() as world, sole_writer(run_dir):
        resume = resume or world.begun(str(run_dir))
        with _trainer(make, run, run_dir, resume=resume, progress=progress) as trainer:
            if world.main:
                _make_room(trainer, run, run_dir, resume=resume, overwrite=overwrite)
                world.begin(str(run_dir))
            yield trainer


def _make_room(trainer: Trainer, run: RunConfig, run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Only when everything else has proved fit: nothing is deleted for a run that cannot start."""
    old = [] if resume else files_of_earlier_run(run_dir, overwrite=overwrite)
    if trainer.step < trainer.config.end:
        left = trainer.config.end - trainer.step
        check_disk(run_dir, run, needed=_checkpoint_size(trainer.task), freed=total_size(old), updates=left)
    if old:
        delete_run(run_dir)


def profile_task(make: MakeTask, run: RunConfig, run_dir: Path, *, steps: int, resume: bool) -> StepProfile:
    """Time ``steps`` updates of what ``make`` makes; nothing else is saved."""
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    with joined(), sole_writer(run_dir), _trainer(make, run, run_dir, resume=resume, progress=True) as trainer:
        return profile_steps(trainer, steps)


@contextlib.contextmanager
def _trainer(make: MakeTask, run: RunConfig, run_dir: Path, *, resume: bool, progress: bool) -> Iterator[Trainer]:
    """The trainer of a run, at step 0 or where its newest checkpoint left it."""
    world = current()
    device = world.device(run.device)
    world.connect(device, run.timeout)
    newest = checkpoints.newest(run_dir) if resume and world.main else None
    with repeatable(run, device):
        trainer = Trainer(make(), run_dir, progress=progress)
        _check_alike(world, trainer.task)
        torch.backends.cudnn.benchmark |= searches(trainer.task)
        notes: list[str] = []
        with _told_how_to_go_on(trainer, newest):
            saved = shared_checkpoint(world, checkpoints.load(newest) if newest else None)
            if saved is None:
                trainer.task.begin()
            else:
                notes = trainer.restore(saved)
        if resume and progress:
            notes.insert(
                0, f"going on from {newest}" if newest else f"{run_dir} has no checkpoint yet: starting at step 0"
            )
            say("\n".join(notes))
        yield trainer


@contextlib.contextmanager
def _told_how_to_go_on(trainer: Trainer, newest: Path | None) -> Iterator[None]:
    """For taking up a checkpoint: the error about a damaged one says how to go on without it."""
    try:
        yield
    except CheckpointError as error:
        again = f"{trainer.task.command} --resume {shlex.quote(str(trainer.run_dir))}"
        if newest and checkpoints.other_whole(newest):
            error.add_note(f"and then: {again}\nNothing was changed or deleted.")
        else:
            error.add_note("No other checkpoint of this run is whole. Nothing was changed or deleted.")
        raise


_PLACES = {"data.train", "data.valid", "data.test", "data.num_workers", "run.dir", "run.device"}  # may differ


def _check_alike(world: Processes, task: Task) -> None:
    """Raises: `ConfigError` where processes were not started with the same settings and data."""
    if not world.several:
        return
    own = json.loads(json.dumps({"config": to_mapping(task.config), "data": task.identity}))
    main = world.from_main(own)
    reasons = [
        f"{key} is {here!r}, and there {there!r}"
        for key, (there, here) in differences(main["config"], own["config"]).items()
        if key not in _PLACES
    ]
    if any(main["data"].get(key) != own["data"].get(key) for key in ("clips", "fingerprint", "labels", "valid")):
        reasons.append(f"{task.config.data.train} or data.valid lists other clips, or other labels")
    if reasons:
        raise ConfigError(
            f"this process and process 0 would not train the same: {'; '.join(reasons)}. Start all with the same "
            "recipe, on the same clips"
        )


def shared_checkpoint(world: Processes, saved: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that process 0 has read; the others need not see its disk."""
    if not world.several:
        return saved
    about = world.from_main(saved and {"path": str(saved.path), "step": saved.step, "state": saved.state})
    if about is None:
        return None
    model = world.tensors_from_main(saved.model if saved else None)
    optimizer = world.tensors_from_main(saved.optimizer if saved else None)
    return saved or Checkpoint(Path(about["path"]), about["step"], model, optimizer, about["state"])


def _checkpoint_size(task: Task) -> int:
    """Bytes: the model, and two moments of what is trained."""
    return checkpoints.size_of(task.model.state_dict()) + 2 * checkpoints.size_of(task.parameters)


@contextlib.contextmanager
def repeatable(run: RunConfig, device: torch.device) -> Iterator[None]:
    """With the run's number of threads, and on the CPU sums are taken in a fixed order. (On a GPU that would cost time,
    and some operators cannot.)"""
    memory: Any = torch.utils.deterministic
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fill, search = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.set_num_threads(run.threads or threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        with _convolutions_as_products():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = search


@contextlib.contextmanager
def _convolutions_as_products() -> Iterator[None]:
    """Of float32 numbers convolutions on a GPU keep what products keep: all, unless TF32 is allowed for these. (PyTorch
    takes TF32 for convolutions alone, so that what a run in fp32 computes would depend on `model.kernels`.)"""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    # By the older setting: with the newer one alone this cannot be read any more, and PyTorch's compiler reads it.
    cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    try:
        yield
    finally:
        cudnn.allow_tf32 = "tf32" in before
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def searches(task: Task) -> bool:
    """Whether cuDNN is to time its algorithms for every shape that it meets, and take the fastest: where that is done
    once a run, and not where the choice, which may differ from run to run, would change numbers that are to be the
    same."""
    fixed = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    return task.device.type == "cuda" and task.one_shape and not fixed
