"""A pre-training run: pre-train a model by a recipe, or go on with a run (`cat-audio pretrain`).

A run directory holds everything about a run: ``config.yaml`` (every field of the recipe), ``metrics.jsonl`` (see
`cat.training.records`), ``failures.jsonl`` (audio that could not be read), ``tensorboard/``, ``checkpoints/`` (see
`cat.checkpoints.store`), ``figures/`` and, after ``--profile``, ``profile/``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError
from cat.data import load_manifest
from cat.progress import say
from cat.training.loop import RunResult, Trainer
from cat.training.profiling import STEPS, StepProfile, profile_steps
from cat.training.recipe import PretrainConfig, pick_device


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
        overwrite: delete an earlier run of that directory first.
        progress: show loss, rate and time left on stderr.

    Raises: `ConfigError`, `cat.checkpoints.store.CheckpointError`, `TrainingError`, `cat.data.ManifestError`,
    `cat.data.loader.TooManyFailures`.
    """
    run_dir = Path(run_dir or config.run_dir)
    with _trainer(config, run_dir, resume=resume, progress=progress) as trainer:
        # Only now, when everything else has proved fit: nothing is deleted for a run that cannot start.
        _make_room(run_dir, resume=resume, overwrite=overwrite)
        return trainer.run()


def profile(
    config: PretrainConfig, run_dir: str | os.PathLike[str] | None = None, *, steps: int = STEPS, resume: bool = False
) -> StepProfile:
    """Time ``steps`` updates by a recipe, part by part, and write a trace of two more to ``run_dir/profile``.

    Trains from the newest checkpoint (``resume``) or afresh, and saves nothing else. Raises as `pretrain`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    with _trainer(config, Path(run_dir or config.run_dir), resume=resume, progress=True) as trainer:
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


def _make_room(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    if resume or not run_dir.exists():
        return
    is_run = any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))
    if is_run and not overwrite:
        raise ConfigError(
            f"{run_dir} already holds a run; go on with it (--resume), replace it (--overwrite) or choose another "
            "name (run.name=OTHER)"
        )
    if not is_run and (not run_dir.is_dir() or any(path.name != "profile" for path in run_dir.iterdir())):
        raise ConfigError(f"{run_dir} exists and is not a run directory; choose another name (run.name=OTHER)")
    if is_run:
        shutil.rmtree(run_dir)


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
