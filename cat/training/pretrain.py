"""A pre-training run: pre-train a model by a recipe, or go on with a run (`cat-audio pretrain`).

`cat.training.directory` says what a run directory holds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from cat.config import ConfigError
from cat.data import load_manifest
from cat.progress import say
from cat.training.loop import RunResult
from cat.training.pretraining import Pretraining
from cat.training.profiling import STEPS, StepProfile
from cat.training.recipe import PretrainConfig
from cat.training.replay import Replay, read_replay
from cat.training.replay import replay as replay_task
from cat.training.start import profile_task, started


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
    make, run_dir = functools.partial(_task, config), Path(run_dir or config.run_dir)
    with started(make, config.run, run_dir, resume=resume, overwrite=overwrite, progress=progress) as trainer:
        return trainer.run()


def profile(
    config: PretrainConfig, run_dir: str | os.PathLike[str] | None = None, *, steps: int = STEPS, resume: bool = False
) -> StepProfile:
    """Time ``steps`` updates by a recipe, part by part, and write a trace of two more to ``run_dir/profile``.

    Trains from the newest checkpoint (``resume``) or afresh, and saves nothing else. Raises as `pretrain`.
    """
    make, run_dir = functools.partial(_task, config), Path(run_dir or config.run_dir)
    return profile_task(make, config.run, run_dir, steps=steps, resume=resume)


def replay(path: Path, overrides: Sequence[str] = (), *, progress: bool = True) -> Replay:
    """Run again the update of a batch that a run skipped, from its file; `cat.training.replay` says how. ``overrides``
    of the recipe: where the data are, run.device. Raises as `pretrain`."""
    batch, config = read_replay(path, PretrainConfig, Pretraining.command, overrides)
    return replay_task(functools.partial(_task, config), config, batch, progress=progress)


def _task(config: PretrainConfig) -> Pretraining:
    if not config.data.train:
        raise ConfigError(
            "data.train is missing; expected a folder of audio or a manifest: add data.train=PATH to the command"
        )
    manifest = load_manifest(config.data.train)
    valid = load_manifest(config.data.valid) if config.data.valid else None
    for note in (*manifest.notes, *(valid.notes if valid else ())):
        say(note)
    return Pretraining(config, manifest, valid)
