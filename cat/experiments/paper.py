"""A claim of the paper put to the test: its study is run, drawn, read, kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat.config import to_mapping
from cat.experiments.claims import CLAIMS
from cat.experiments.readings import DRAWN, curve, ends, named, of_bound
from cat.experiments.records import write_record
from cat.experiments.study import Study, evenly, run_study
from cat.experiments.trial import Task
from cat.experiments.verdict import Verdict
from cat.figures import write_study_curves, write_study_ends
from cat.provenance import made
from cat.training.recipe import PretrainConfig, pick_device


@dataclass(frozen=True)
class Options:
    """What a study trains on and is judged by. `guides`: name -> encoder. `record`: where to keep what was found."""

    pool: Path
    tasks: tuple[Task, ...]
    guides: Mapping[str, str]
    seeds: tuple[int, ...] = (0, 1, 2)
    probes: int = 0  # how often a run is probed; 0: as often as the claim asks
    jobs: int = 1
    record: Path | None = None
    progress: bool = True


def examine(name: str, config: PretrainConfig, options: Options, out: Path) -> tuple[Verdict, dict[str, Any]]:
    """Runs the study `name`, what is in ``out/studies`` already excepted; draws its figure in ``out/NAME/figures``.

    Returns its verdict and its record.
    """
    claim = CLAIMS[name]
    guides = dict(options.guides) if claim.guided else {}
    arms = tuple(claim.arms(list(guides), config))
    used = {arm.guide for arm in arms}
    study = Study(
        config,
        options.pool,
        options.tasks,
        arms,
        {guide: spec for guide, spec in guides.items() if guide in used},
        options.seeds,
        evenly(options.probes) if options.probes else claim.probes,
    )
    started = time.perf_counter()
    found = run_study(study, out / "studies", jobs=options.jobs, progress=options.progress)
    device = pick_device(config.run.device)
    trained = sum(run["rows"][-1]["seconds"] for arm in found["arms"].values() for run in arm["runs"])
    record = {
        "experiment": name,
        **found,
        "recipe": to_mapping(config),
        "seconds": {"training": trained, "this call": time.perf_counter() - started, "jobs": options.jobs},
        "made": made(device),
    }
    verdict = judged(record)
    _draw(record, out / name / "figures" / "scores.png", curves=claim.curves)
    if options.record is not None:
        write_record(options.record, record, config, out / "studies" / "runs")
    return verdict, record


def judged(record: Mapping[str, Any]) -> Verdict:
    """What a record says."""
    verdict = CLAIMS[record["experiment"]].read(record)
    runs = sum(len(arm["runs"]) for arm in record["arms"].values())
    verdict.notes.append(f"{record['seconds']['training'] / 3600:.1f} h of training in {runs} runs")
    return verdict


def _draw(record: Mapping[str, Any], path: Path, *, curves: bool) -> None:
    """A panel a probe and a task: scores on valid against updates, or on test at the end."""
    tasks, arms = list(record["tasks"]), record["arms"]
    panels = [(probe, task) for probe in DRAWN for task in tasks]
    columns = len(tasks) if len(tasks) > 1 else len(DRAWN)
    split = "valid" if curves else "test"
    levels = {f"{task}, {probe}": _levels(record, split, task, probe) for probe, task in panels}
    if curves:
        lines = {
            f"{task}, {probe}": {arm: [curve(run, task, probe) for run in found["runs"]] for arm, found in arms.items()}
            for probe, task in panels
        }
        write_study_curves(path, lines, levels, metric="valid, %", columns=columns)
    else:
        dots = {f"{task}, {probe}": {arm: ends(record, arm, task, probe) for arm in arms} for probe, task in panels}
        write_study_ends(path, dots, levels, metric="test, %", columns=columns)


def _levels(record: Mapping[str, Any], split: str, task: str, probe: str) -> dict[str, float]:
    """The bounds' scores, by name."""
    found = {named(record, name): of_bound(scores[split][task], probe) for name, scores in record["bounds"].items()}
    return {name: level for name, level in found.items() if level is not None}
