"""A pre-training run: pre-train a model by a recipe, or go on with a run (`cat-audio pretrain`).

`cat.training.directory` says what a run directory holds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError
from cat.data import load_manifest
from cat.device import pick_device
from cat.progress import say
from cat.training.directory import check_disk, delete_run, files_of_earlier_run, sole_writer, total_size
from cat.training.loop import RunResult, Trainer
from cat.training.profiling import STEPS, StepProfile, profile_steps
from cat.training.recipe import PretrainConfig


def pretrain(
    config: PretrainConfig,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> RunResult:
    """Pre-train by a recipe, into ``run_dir`` (default: the recipe's ``run.dir/run.name``).

    Args:
        resume: go on from the newest checkpoint, or from the start when there is none yet.
        overwrite: delete what an earlier run has written into that directory first.
        progress: show loss, rate and time left on stderr.

    Raises: `ConfigError`, `cat.checkpoints.store.CheckpointError`, `TrainingError`, `cat.data.ManifestError`,
    `cat.data.loader.TooManyFailures`, `cat.locks.InUseError` when another process works in `run_dir`, OSError when it
    cannot hold a checkpoint.
    """
    run_dir = Path(run_dir or config.run_dir)
    with sole_writer(run_dir), _trainer(config, run_dir, resume=resume, progress=progress) as trainer:
        # Only now, when everything else has proved fit: nothing is deleted for a run that cannot start.
        old = [] if resume else files_of_earlier_run(run_dir, overwrite=overwrite)
        if trainer.step < config.end:
            check_disk(run_dir, config.run, needed=_checkpoint_size(trainer), freed=total_size(old))
        if old:
            delete_run(run_dir)
        return trainer.run()


def profile(
    config: PretrainConfig, run_dir: str | os.PathLike[str] | None = None, *, steps: int = STEPS, resume: bool = False
) -> StepProfile:
    """Time ``steps`` updates by a recipe, part by part, and write a trace of two more to ``run_dir/profile``.

    Trains from the newest checkpoint (``resume``) or afresh, and saves nothing else. Raises as `pretrain`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    run_dir = Path(run_dir or config.run_dir)
    with sole_writer(run_dir), _trainer(config, run_dir, resume=resume, progress=True) as trainer:
        return profile_steps(trainer, steps)


@contextlib.contextmanager
def _trainer(config: PretrainConfig, run_dir: Path, *, resume: bool, progress: bool) -> Iterator[Trainer]:
    """The trainer of a run, at step 0 or where its newest checkpoint left it."""
    if not config.data.train:
        raise ConfigError(
            "data.train is missing; expected a folder of audio or a manifest: add data.train=PATH to the command"
        )
    manifest = load_manifest(config.data.train)
    valid = load_manifest(config.data.valid) if config.data.valid else None
    for note in (*manifest.notes, *(valid.notes if valid else ())):
        say(note)
    newest = checkpoints.newest(run_dir) if resume else None
    with _threads(config.run.threads), _deterministic(pick_device(config.run.device)):
        trainer = Trainer(config, run_dir, manifest, valid, progress=progress)
        notes = trainer.restore(checkpoints.load(newest)) if newest else []
        if resume and progress:
            notes.insert(
                0, f"going on from {newest}" if newest else f"{run_dir} has no checkpoint yet: starting at step 0"
            )
            say("\n".join(notes))
        yield trainer


def _checkpoint_size(trainer: Trainer) -> int:
    """Bytes: the model, and two moments of what is trained."""
    return checkpoints.size_of(trainer.model.state_dict()) + 2 * checkpoints.size_of(trainer.update.parameters)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On the CPU, sums are taken in a fixed order. (On a GPU that would cost time, and some operators cannot.)"""
    memory: Any = torch.utils.deterministic
    before, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = fill
