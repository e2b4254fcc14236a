"""A fine-tuning run: train a classifier by a recipe, or go on with a run, and score it (`cat-audio finetune`).

Its run directory is as `cat.training.directory` says. In the end the checkpoint that is best on the validation split
is scored on the test split, once, and ``scores.json`` says how::

    {"task": "single-label", "metric": "accuracy", "seed": 0, "classes": [...], "encoder": "runs/tiny", "step": 400,
     "chosen_on": "valid", "clips": {"train": 1440, "valid": 160, "test": 400},
     "valid": {"loss": 0.31, "accuracy": 0.91, ...}, "test": {"loss": 0.35, "accuracy": 0.90, ...}}

``chosen_on``: "valid" (clips of their own), "held-out" (a part of the training data) or "test" (data.valid lists the
same clips as data.test, as in the released recipes). Without a test split ``test`` is null.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cat.checkpoints import CheckpointError
from cat.checkpoints import store as checkpoints
from cat.checkpoints.encoder import chosen
from cat.data import Batch, Manifest
from cat.evaluation.evaluate import keep_settings
from cat.files import write_json
from cat.progress import say
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.finetuning import Finetuning, Splits, read_splits
from cat.training.loop import RunResult
from cat.training.parallel import load_whole
from cat.training.profiling import STEPS, StepProfile
from cat.training.replay import Replay, read_replay
from cat.training.replay import replay as replay_task
from cat.training.start import profile_task, shared_checkpoint, started

SCORES = "scores.json"


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended; ``scores`` (see above) are None when it has not come to its end."""

    run: RunResult
    scores: dict[str, Any] | None


def finetune(
    config: FinetuneConfig,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune by a recipe, into ``run_dir`` (default: the recipe's ``run.dir/run.name``), and score the result. Of
    events, thresholds and filters are chosen on the validation split, where it says when they are.

    Args:
        resume: go on from the newest checkpoint, or from the start when there is none yet.
        overwrite: delete what an earlier run has written into that directory first.
        progress: show loss, rate and time left on stderr.

    Raises: as `cat.training.pretrain.pretrain`, and `cat.checkpoints.CheckpointError` for an encoder that does not fit.
    """
    make, run_dir = functools.partial(_task, config), Path(run_dir or config.run_dir)
    with started(make, config.run, run_dir, resume=resume, overwrite=overwrite, progress=progress) as trainer:
        run = trainer.run()
        if run.stopped_by or not (run.early or run.step == config.optim.steps):
            return FinetuneResult(run, None)
        task = cast(Finetuning, trainer.task)
        result = FinetuneResult(run, _scores(task, run_dir))
        if task.config.task == "events" and task.world.main:
            say(keep_settings(run_dir, task.splits.valid, task.device))
        return result


def profile(
    config: FinetuneConfig, run_dir: str | os.PathLike[str] | None = None, *, steps: int = STEPS, resume: bool = False
) -> StepProfile:
    """As `cat.training.pretrain.profile`."""
    make, run_dir = functools.partial(_task, config), Path(run_dir or config.run_dir)
    return profile_task(make, config.run, run_dir, steps=steps, resume=resume)


def replay(path: Path, overrides: Sequence[str] = (), *, progress: bool = True) -> Replay:
    """As `cat.training.pretrain.replay`."""
    batch, config = read_replay(path, FinetuneConfig, Finetuning.command, overrides)
    return replay_task(functools.partial(_task, config), config, batch, progress=progress)


def _task(config: FinetuneConfig) -> Finetuning:
    return Finetuning(config, read_splits(config))


def _scores(task: Finetuning, run_dir: Path) -> dict[str, Any]:
    """Of the best checkpoint; read, where they were written already for these clips."""
    world, splits = task.world, task.splits
    about, before = world.from_main(_about(task, run_dir) if world.main else None)
    if before is not None:
        return before
    best = shared_checkpoint(world, checkpoints.load(cast(Path, chosen(run_dir))) if world.main else None)
    assert best is not None  # `_about` has looked
    load_whole(task.model, best.model, str(best.path))
    scores = {**about, "valid": _of(task, splits.valid), "test": splits.test and _of(task, splits.test)}
    if world.main:
        write_json(run_dir / SCORES, scores)
    return scores


def _about(task: Finetuning, run_dir: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is scored, and the scores that an earlier end of the run has written of the same."""
    best = chosen(run_dir)
    if best is None:
        raise CheckpointError(f"{run_dir} has no checkpoint; expected that of the run's end: run it again")
    config, splits = task.config, task.splits
    about = {
        "task": config.task,
        "metric": task.metric,
        "seed": config.run.seed,
        "classes": list(config.classes),
        "encoder": config.encoder,
        "step": checkpoints.read_state(best)["step"],
        "chosen_on": _chosen_on(splits),
        "clips": {
            "train": len(splits.train),
            "valid": len(splits.valid),
            "test": 0 if splits.test is None else len(splits.test),
        },
        "test_fingerprint": None if splits.test is None else splits.test.fingerprint,
    }
    before = _read_scores(run_dir / SCORES)
    same = before is not None and all(before.get(key) == value for key, value in about.items())
    return about, before if same else None


def _of(task: Finetuning, manifest: Manifest) -> dict[str, Any]:
    """Loss and metrics; what is not finite (an infinite d') is null, as JSON has no such number."""
    failed: list[tuple[str, str]] = []

    def noting(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            failed.extend((failure.path, failure.reason) for failure in batch.failures)
            yield batch

    values = task.evaluate(noting(task.batches_of(manifest, say)))
    failed = [failure for part in task.world.gathered(failed) for failure in part]
    if failed:
        say(
            f"{len(failed)} of {len(manifest)} clips of {manifest.name} could not be read and are not scored; the "
            f"first: {failed[0][0]}: {failed[0][1]}"
        )
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {**finite, "unreadable": len(failed)}


def _chosen_on(splits: Splits) -> str:
    if splits.held_out:
        return "held-out"
    valid, test = splits.valid, splits.test
    if test is None or test.fingerprint != valid.fingerprint:
        return "valid"
    return "test" if os.path.realpath(test.path(0)) == os.path.realpath(valid.path(0)) else "valid"


def _read_scores(path: Path) -> dict[str, Any] | None:
    """What an earlier end of the run has written; None where it is not there or damaged."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return scores if isinstance(scores, dict) else None
