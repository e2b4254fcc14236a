"""``cat-audio pretrain``: pre-train a model by a recipe, or go on with a run.

A run directory holds everything about a run: ``config.yaml`` (every field of the recipe), ``metrics.jsonl`` (see
`cat.metrics`), ``failures.jsonl`` (audio that could not be read), ``tensorboard/``, ``checkpoints/`` (see
`cat.checkpoint`), ``figures/`` and, after ``--profile``, ``profile/``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cat import checkpoint as checkpoints
from cat.config import ConfigError
from cat.data import load_manifest
from cat.profiling import STEPS, StepProfile, profile_steps
from cat.recipe import PretrainConfig, load_recipe, pick_device
from cat.trainer import RunResult, Trainer, TrainingError

__all__ = ["RunResult", "StepProfile", "TrainingError", "pretrain", "profile"]

EXAMPLES = """\
examples:
  cat-audio pretrain recipes/tiny.yaml data.train=my/audio          on a folder of one's own
  cat-audio pretrain recipes/tiny.yaml data.train=my/audio run.name=other model.depth=6 optim.lr=1e-3
  cat-audio pretrain --resume runs/tiny                             go on with a run that was stopped
  cat-audio pretrain recipes/tiny.yaml data.train=my/audio --profile      where the time of a step goes

Every field of a recipe can be set as SECTION.FIELD=VALUE; runs/NAME/config.yaml lists them all with their values.
"""


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

    Raises: `ConfigError`, `cat.checkpoint.CheckpointError`, `TrainingError`, `cat.data.ManifestError`,
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
    newest = checkpoints.newest(run_dir) if resume else None
    with _threads(config.run.threads), _deterministic(pick_device(config.run.device)):
        trainer = Trainer(config, run_dir, manifest, valid, progress=progress)
        notes = trainer.restore(checkpoints.load(newest)) if newest else []
        if resume and progress:
            notes.insert(
                0, f"going on from {newest}" if newest else f"{run_dir} has no checkpoint yet: starting at step 0"
            )
            print("\n".join(notes), file=sys.stderr)
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


# ---------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; with --resume also a run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="fields of the recipe to change")
    parser.add_argument("--resume", action="store_true", help="go on with the run from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    parser.add_argument(
        "--profile", action="store_true", help=f"time the parts of {STEPS} steps, write a trace, save nothing else"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    recipe = Path(args.recipe)
    if args.resume and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")
    if args.profile and args.overwrite:
        raise ConfigError("--profile saves nothing, so --overwrite would only delete a run; leave it out")
    if recipe.is_dir():
        if not (recipe / "config.yaml").is_file():
            raise ConfigError(
                f"{recipe} is a directory without config.yaml; expected a recipe (YAML) or a run directory with "
                "--resume"
            )
        if not args.resume:
            raise ConfigError(f"{recipe} is a run directory; add --resume to go on with it, or give a recipe")
        config, run_dir = load_recipe(recipe / "config.yaml", args.overrides), recipe
    else:
        config = load_recipe(recipe, args.overrides)
        run_dir = config.run_dir
    if args.profile:
        print(profile(config, run_dir, resume=args.resume).table())
        return 0
    result = pretrain(config, run_dir, resume=args.resume, overwrite=args.overwrite, progress=not args.quiet)
    print(_summary(result, config))
    return 128 + result.stopped_by if result.stopped_by else 0


def _summary(result: RunResult, config: PretrainConfig) -> str:
    lines = []
    if result.stopped_by:
        lines.append(f"stopped by {signal.Signals(result.stopped_by).name} after step {result.step}")
    elif result.step < config.optim.steps:
        lines.append(f"stopped at step {result.step} of {config.optim.steps} (run.stop_at)")
    else:
        lines.append(
            f"trained {result.step} steps; loss {result.first_loss:.4f} at first, {result.last_loss:.4f} at last"
        )
    lines.append(f"checkpoint: {result.checkpoint}")
    if result.failed_clips:
        lines.append(
            f"{result.failed_clips} clips could not be read and were left out; see {result.run_dir / 'failures.jsonl'}"
        )
    if result.step < config.optim.steps:
        stop_at = " run.stop_at=null" if config.run.stop_at is not None and result.step >= config.run.stop_at else ""
        lines.append(f"go on with: cat-audio pretrain --resume {result.run_dir}{stop_at}")
    return "\n".join(lines)
