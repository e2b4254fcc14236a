"""Many short runs of one recipe: arms that differ from it in a few fields, each from several seeds, probed as they go.

A guide is a frozen encoder whose embeddings of the pool, as directions, centred and scaled, an arm is regularised
towards. Guides differ in width, and so in what L_r costs. To compare them an arm does not give a weight but
a *cost*: the weight is the one with which predicting the mean embedding for every clip costs that much in the loss.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat.config import from_mapping, to_mapping
from cat.data import Manifest, load_manifest, write_manifest
from cat.data.embeddings import EmbeddingWriter
from cat.encoders import CatEncoder, FrozenEncoder, LogMelStatistics, build_encoder
from cat.encoders.embed import write_embeddings
from cat.evaluation.probe import SPLITS
from cat.experiments.trial import Task, Trial, probed, run_trial
from cat.files import write_json
from cat.model.regularisation import DISTANCES
from cat.progress import say
from cat.training.guidance import reduced
from cat.training.recipe import SECTION_PRESETS, PretrainConfig, pick_device

COST = 5.0  # of predicting the mean embedding; L_p begins at 8 to 10 and L_g at about the same
RMS = 1 / 8  # of a dimension of a guide's embeddings


@dataclass(frozen=True)
class Arm:
    """What one line of a study trains: fields of the recipe, and the name of its guide, if it has one."""

    name: str
    overrides: tuple[str, ...] = ()
    guide: str = ""
    cost: float = COST


@dataclass(frozen=True)
class Study:
    """`guides`: name -> encoder, as `build_encoder` takes it. `probes`: after which shares of a run's updates it is
    probed, the last one 1."""

    recipe: PretrainConfig
    pool: Path
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    guides: dict[str, str]
    seeds: tuple[int, ...]
    probes: tuple[float, ...]

    def steps(self, config: PretrainConfig) -> tuple[int, ...]:
        """After which updates a run of `config` is probed, the last one among them."""
        return tuple(sorted({max(1, int(share * config.optim.steps + 1e-6)) for share in self.probes}))


def evenly(count: int) -> tuple[float, ...]:
    """So many probes, equally far apart."""
    return tuple((i + 1) / count for i in range(count))


def run_study(study: Study, folder: Path, *, jobs: int = 1, progress: bool = True) -> dict[str, Any]:
    """Trains and probes everything that `folder` does not hold yet. Runs are found again by what they were made with,
    so studies that share runs, and one that was stopped, train nothing twice.

    Returns {"arms": {name: {"overrides", "guide", "weight", "parameters", "runs": [{"seed", "rows"}]}},
    "bounds": {name: {"valid": Scores, "test": Scores}}, "guides": ..., "pool": ...}.
    """
    guides = {name: _Guide.made(name, spec, study, folder, progress) for name, spec in study.guides.items()}
    trials, weights = {}, {}
    for arm in study.arms:
        weights[arm.name], config = _configured(study, arm, guides)
        for seed in study.seeds:
            trials[arm.name, seed] = _trial(study, arm, config, seed, folder)
    rows = _run_all(trials, jobs, progress)
    arms = {
        arm.name: {
            "overrides": list(arm.overrides),
            "guide": arm.guide,
            "weight": weights[arm.name],
            "parameters": _parameters(trials[arm.name, study.seeds[0]]),
            "runs": [
                {"seed": seed, "directory": trials[arm.name, seed].directory.name, "rows": rows[arm.name, seed]}
                for seed in study.seeds
            ],
        }
        for arm in study.arms
    }
    return {
        "arms": arms,
        "bounds": _bounds(study, trials[study.arms[0].name, study.seeds[0]], folder),
        "guides": {name: guide.told() for name, guide in guides.items()},
        "pool": _counted(study.pool),
        "tasks": {t.name: {s: _counted(t.folder / f"{s}.jsonl") for s in SPLITS} for t in study.tasks},
        "steps": list(study.steps(study.recipe)),
    }


# ---------------------------------------------------------------- guides


@dataclass(frozen=True)
class _Guide:
    spec: str
    manifest: Path  # the pool, with the rows of its embeddings
    rows: Path
    skipped: int

    @staticmethod
    def made(name: str, spec: str, study: Study, folder: Path, progress: bool) -> _Guide:
        rows = folder / "guides" / f"{_slug(name)}-{_digest([spec, str(study.pool), RMS])}.npy"
        linked = rows.with_suffix(".jsonl")
        if not linked.exists():
            encoder = build_encoder(spec, device=pick_device(study.recipe.run.device))
            whole = rows.with_suffix(".whole.npy")
            manifest, _ = write_embeddings(load_manifest(study.pool), encoder, whole, progress=progress)
            _write_centred(manifest, whole, rows, encoder.name)
        return _Guide(spec, linked, rows, _counted(study.pool) - _counted(linked))

    def constant(self, distance: str) -> float:
        """L_r, as a mean over clips, of predicting the mean embedding for every clip."""
        rows = torch.from_numpy(np.load(self.rows, allow_pickle=False))
        return float(DISTANCES[distance](torch.zeros_like(rows), rows).mean())

    def told(self) -> dict[str, Any]:
        return {"encoder": self.spec, "constant": self.constant("l2"), "clips_left_out": self.skipped}


def _write_centred(manifest: Manifest, whole: Path, out: Path, name: str) -> None:
    """The embeddings of `whole` as directions, without their mean, scaled to a root mean square of `RMS`: in ``out``,
    and a manifest beside it.

    Of a guide for which clips lie close together the mean is nearly all there is (0.98 of the squared length, for
    YAMNet with random weights), and so nearly all that the first updates would be spent on. The scale decides what an
    update of AdamW, which moves every weight of the head by about the learning rate, does to a prediction: a quarter of
    this scale is within that noise (after 400 updates L_r was above that of a constant), and eight times as much is
    far from where the head begins (as long, and it had not begun to follow).
    """
    rows = torch.nn.functional.normalize(torch.from_numpy(np.load(whole, allow_pickle=False)), dim=1)
    rows -= rows.mean(dim=0)
    rows *= RMS / rows.square().mean().sqrt()
    name = f"{name}, centred"
    with EmbeddingWriter(out, manifest, dim=rows.shape[1], encoder=name) as writer:
        writer.append(range(len(rows)), rows.numpy())
    write_manifest(writer.manifest, out.with_suffix(".jsonl"))


def _configured(study: Study, arm: Arm, guides: dict[str, _Guide]) -> tuple[float, PretrainConfig]:
    """The weight of L_r, and the arm's recipe but for seed and name."""
    config = _overridden(study.recipe, [f"data.train={study.pool}", *arm.overrides])
    if not arm.guide:
        return 0.0, config
    guide = guides[arm.guide]
    config = _overridden(config, [f"data.train={guide.manifest}"])
    weight = arm.cost / reduced(guide.constant(config.objective.regularisation_distance), config)
    weight = float(f"{weight:.4g}")
    return weight, _overridden(config, [f"objective.regularisation_weight={weight}"])


def _overridden(config: PretrainConfig, overrides: Sequence[str]) -> PretrainConfig:
    return from_mapping(
        PretrainConfig, to_mapping(config), source="experiment", overrides=overrides, presets=SECTION_PRESETS
    )


# ---------------------------------------------------------------- runs


def _trial(study: Study, arm: Arm, config: PretrainConfig, seed: int, folder: Path) -> Trial:
    run = dataclasses.replace(config.run, seed=seed, name="", threads=0, device="auto")
    data = dataclasses.replace(config.data, train=str(study.pool))  # wherever its embeddings lie
    made_of = [to_mapping(dataclasses.replace(config, run=run, data=data)), study.guides.get(arm.guide)]
    steps = study.steps(config)
    tail = f"-{seed}-{_digest([made_of, list(steps), _named(study.tasks)])}"
    known = sorted((folder / "runs").glob(f"*{tail}"))  # by another arm's name, of another study
    directory = known[0] if known else folder / "runs" / f"{_slug(arm.name)}{tail}"
    run = dataclasses.replace(config.run, seed=seed, dir=directory.parent, name=directory.name)
    return Trial(dataclasses.replace(config, run=run), directory, study.tasks, steps)


def _run_all(trials: dict[Any, Trial], jobs: int, progress: bool) -> dict[Any, list[dict[str, Any]]]:
    """By seeds, so that a study that is stopped has whole comparisons; `jobs` at a time, each with its share of the
    threads."""
    ordered = sorted(trials.items(), key=lambda item: item[0][1])
    tell: Callable[[str], None] = say if progress else lambda text: None
    done: dict[Any, list[dict[str, Any]]] = {}

    def finished(key: tuple[str, int], rows: list[dict[str, Any]]) -> None:
        done[key] = rows
        scores = "; ".join(
            f"{task} " + ", ".join(f"{probe} {100 * score:.1f}" for probe, score in found.items())
            for task, found in rows[-1]["test"].items()
        )
        tell(f"[{len(done)}/{len(trials)}] {key[0]}, seed {key[1]}, {rows[-1]['seconds']:.0f} s: {scores}")

    if jobs == 1:
        for key, trial in ordered:
            finished(key, run_trial(trial))
        return done
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_trial, _on_threads(trial, threads)): key for key, trial in ordered}
        try:
            for future in concurrent.futures.as_completed(waiting):
                finished(waiting[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def _on_threads(trial: Trial, threads: int) -> Trial:
    run = dataclasses.replace(trial.config.run, threads=trial.config.run.threads or threads)
    return dataclasses.replace(trial, config=dataclasses.replace(trial.config, run=run))


def _parameters(trial: Trial) -> int:
    """Of the encoder."""
    return sum(p.numel() for p in CatEncoder.from_checkpoint(trial.directory).encoder.parameters())


# ---------------------------------------------------------------- what the curves are compared with


def _bounds(study: Study, trial: Trial, folder: Path) -> dict[str, Any]:
    """Scores of what pre-training has no part in: the guides, the log-mel statistics, the untrained encoder."""
    device = pick_device(study.recipe.run.device)
    makers: dict[str, Callable[[], FrozenEncoder]] = {
        "log-mel statistics": lambda: LogMelStatistics(study.recipe.features, device=device),
        "untrained": lambda: CatEncoder.from_checkpoint(trial.directory, pooling="both", device=device).untrained_twin(
            0
        ),
    }
    for name, spec in study.guides.items():
        makers[name] = lambda spec=spec: build_encoder(spec, device=device)  # type: ignore[misc]
    found = {}
    for name, make in makers.items():
        what = study.guides.get(name, to_mapping(trial.config.model) if name == "untrained" else "")
        path = (
            folder
            / "bounds"
            / f"{_slug(name)}-{_digest([what, to_mapping(trial.config.features), _named(study.tasks)])}.json"
        )
        if not path.exists():
            encoder = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            scores = {task.name: probed(encoder, task, test=True) for task in study.tasks}
            write_json(path, {split: {name: s[split] for name, s in scores.items()} for split in ("valid", "test")})
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


# ---------------------------------------------------------------- names


def _counted(path: Path) -> int:
    manifest: Manifest = load_manifest(path)
    return len(manifest)


def _named(tasks: Sequence[Task]) -> list[list[str]]:
    return [[task.name, str(task.folder)] for task in tasks]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "x"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=os.fspath).encode()).hexdigest()[:8]
