"""A fine-tuning recipe run once for each fold and seed, and what that says together.

The folds are those of the manifest (its field "fold"): each run has one of them as its test split, and chooses its
checkpoint by clips held out of the others. Every run is a run directory of its own, ``fold1`` or ``seed0/fold1`` in
that of the whole, beside a ``scores.json`` with all of them.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.config import ConfigError
from cat.data import load_manifest
from cat.data.splits import folds
from cat.distributed import joined
from cat.evaluation.metrics import main_metric
from cat.files import write_json
from cat.progress import say
from cat.training.directory import sole_writer
from cat.training.finetune import SCORES, finetune
from cat.training.finetune_recipe import FinetuneConfig


@dataclass(frozen=True)
class RepeatsResult:
    """``scores``: what every run that ended has in its scores.json, with its "fold" and "run"; ``stopped_by``: a signal
    that came before all had ended."""

    metric: str
    scores: list[dict[str, Any]]
    stopped_by: int | None

    @property
    def values(self) -> list[float]:
        """The main metric of each run, on its test split (without one: on the validation split)."""
        return [(row["test"] or row["valid"])[self.metric] for row in self.scores]

    def table(self) -> str:
        names = [row["run"] for row in self.scores]
        width = max([len("deviation"), *map(len, names)])
        split = "test" if all(row["test"] for row in self.scores) else "valid"
        lines = [f"{'run':<{width}}  {split} {self.metric}"]
        lines += [f"{name:<{width}}  {value:.4f}" for name, value in zip(names, self.values, strict=True)]
        lines += [f"{name:<{width}}  {value:.4f}" for name, value in self.summary().items()]
        return "\n".join(lines)

    def summary(self) -> dict[str, float]:
        """Mean and sample deviation over folds, of each seed's mean over its folds where there are several seeds."""
        by_seed: dict[int, list[float]] = {}
        for row, value in zip(self.scores, self.values, strict=True):
            by_seed.setdefault(row["seed"], []).append(value)
        means = [statistics.mean(values) for values in by_seed.values()]
        spread = means if len(means) > 1 else self.values
        return {
            "mean": statistics.mean(self.values),
            **({"deviation": statistics.stdev(spread)} if len(spread) > 1 else {}),
        }


def finetune_repeats(
    config: FinetuneConfig,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    by_fold: bool,
    seeds: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> RepeatsResult:
    """`finetune` for every fold (``by_fold``) and for ``seeds`` seeds from ``run.seed`` on; the rest as there.

    With ``resume`` runs that have ended are not run again, and the others go on where they were.
    """
    run_dir = Path(run_dir or config.run_dir)
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; expected at least 1")
    if (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} holds a single run; choose another name for these (run.name=OTHER)")
    scores: list[dict[str, Any]] = []
    metric = main_metric(config.task)
    with joined() as world, sole_writer(run_dir):
        for name, changed in _runs(config, by_fold, seeds):
            say(f"run {name}")
            result = finetune(changed, run_dir / name, resume=resume, overwrite=overwrite, progress=progress)
            if result.scores is None:
                return RepeatsResult(metric, scores, result.run.stopped_by)
            scores.append({"run": name, "fold": changed.data.fold, **result.scores})
        done = RepeatsResult(metric, scores, None)
        if world.main:
            write_json(run_dir / SCORES, {"metric": metric, **done.summary(), "runs": scores})
    return done


def _runs(config: FinetuneConfig, by_fold: bool, seeds: int) -> Iterator[tuple[str, FinetuneConfig]]:
    numbers: Sequence[int | None] = [config.data.fold]
    if by_fold:
        fold, test = config.data.fold, config.data.test
        if fold is not None or test:
            given = f"data.test={test}" if fold is None else f"data.fold={fold}"
            raise ConfigError(f"{given} and all folds were asked for; expected one of them: a fold is the test split")
        numbers = np.unique(folds(load_manifest(config.data.train))).tolist()
    for seed in range(config.run.seed, config.run.seed + seeds):
        for fold in numbers:
            parts = [*([f"seed{seed}"] if seeds > 1 else []), *([f"fold{fold}"] if by_fold else [])]
            yield (
                "/".join(parts) or f"seed{seed}",
                dataclasses.replace(
                    config,
                    data=dataclasses.replace(config.data, fold=fold),
                    run=dataclasses.replace(config.run, seed=seed),
                ),
            )
