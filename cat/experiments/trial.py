"""One training run that is probed as it goes: every n updates it stops, its encoder is probed, and it goes on, exactly.

Curves are of the valid split; the test split is scored once, at the last update.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat.data import load_manifest
from cat.encoders import CatEncoder, FrozenEncoder
from cat.encoders.embed import collect_embeddings
from cat.evaluation.classifiers import PROBES, Split
from cat.evaluation.probe import SPLITS, labelled, labelled_task
from cat.files import write_json
from cat.training.pretrain import pretrain
from cat.training.recipe import PretrainConfig, pick_device
from cat.training.records import read_rows

POOLINGS = ("cls", "mean")  # of the tokens, as pooling "both" has them side by side
LOGGED = ("loss", "regression", "global", "regularisation", "pred_std", "target_std")
SCORES = "probes.json"  # in a run's directory

Scores = dict[str, dict[str, float]]  # task -> probe -> score in 0..1


@dataclass(frozen=True)
class Task:
    """A labelled data set: a folder with train.jsonl, valid.jsonl and test.jsonl."""

    name: str
    folder: Path

    @staticmethod
    def of(text: str) -> Task:
        """From NAME=FOLDER. Raises ValueError."""
        name, equals, folder = text.partition("=")
        missing = [split for split in SPLITS if not (Path(folder) / f"{split}.jsonl").is_file()]
        if not (name and equals and folder) or missing:
            without = f" (no {missing[0]}.jsonl in {folder})" if equals and folder else ""
            raise ValueError(f"--task {text!r}{without}; expected NAME=FOLDER with train, valid and test.jsonl in it")
        return Task(name, Path(folder).resolve())


@dataclass(frozen=True)
class Trial:
    """A run of `config` in its own directory, probed on `tasks` after every update of `steps`."""

    config: PretrainConfig
    directory: Path
    tasks: tuple[Task, ...]
    steps: tuple[int, ...]


def run_trial(trial: Trial) -> list[dict[str, Any]]:
    """A row a stop: ``{"step", "seconds", "valid": Scores, "losses": {...}}``, the last one with ``"test": Scores``.

    What an earlier call has done in the directory is not done again. ``seconds``: of training, up to there.
    """
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(trial.config.run.threads or torch.get_num_threads())
    path = trial.directory / SCORES
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    device = pick_device(trial.config.run.device)
    for step in trial.steps[len(rows) :]:
        stopped = dataclasses.replace(trial.config, run=dataclasses.replace(trial.config.run, stop_at=step))
        result = pretrain(stopped, trial.directory, resume=trial.directory.exists(), progress=False)
        if result.stopped_by:
            raise KeyboardInterrupt
        encoder = CatEncoder.from_checkpoint(trial.directory, pooling="both", device=device)
        last = step == trial.steps[-1]
        with threadpool_limits(torch.get_num_threads()):  # of BLAS and OpenMP in probes, for the sake of other jobs
            scores = {task.name: probed(encoder, task, test=last) for task in trial.tasks}
        row: dict[str, Any] = {"step": step, "seconds": _seconds(trial.directory), "losses": _losses(trial.directory)}
        for split in ("valid", "test")[: 1 + last]:
            row[split] = {name: found[split] for name, found in scores.items()}
        rows.append(row)
        write_json(path, rows)
    return rows


def probed(encoder: FrozenEncoder, task: Task, *, test: bool, batch_size: int = 32) -> dict[str, dict[str, float]]:
    """ "valid" (and "test") -> probe -> score: kNN and linear, of a CAT encoder with pooling "both" for each half."""
    names = SPLITS if test else SPLITS[:2]
    manifests, _ = labelled({split: load_manifest(task.folder / f"{split}.jsonl") for split in names})
    labels = labelled_task(manifests)
    found = {
        split: collect_embeddings(manifest, encoder, batch_size=batch_size) for split, manifest in manifests.items()
    }
    targets = {split: labels.targets(manifests[split], found[split].indices) for split in names}
    scores: dict[str, dict[str, float]] = {split: {} for split in names[1:]}
    for suffix, columns in _halves(encoder):
        splits = [Split(found[split].rows[:, columns], targets[split]) for split in names]
        for probe, of in PROBES.items():
            result = of(splits[0], splits[1], splits[-1], multi_label=labels.multi_label)
            scores["valid"][f"{probe}{suffix}"] = result.valid_score
            if test:
                scores["test"][f"{probe}{suffix}"] = result.score
    return scores


def _halves(encoder: FrozenEncoder) -> list[tuple[str, slice]]:
    if getattr(encoder, "pooling", "") != "both":
        return [("", slice(None))]
    half = encoder.dim // 2
    return [(f" {pooling}", slice(i * half, (i + 1) * half)) for i, pooling in enumerate(POOLINGS)]


def _losses(directory: Path) -> dict[str, float]:
    """Means over the last twentieth of the updates so far."""
    rows = read_rows(directory / "metrics.jsonl", "train")
    rows = rows[-max(1, len(rows) // 20) :]
    return {name: float(np.mean([row[name] for row in rows])) for name in LOGGED if name in rows[-1]}


def _seconds(directory: Path) -> float:
    return float(sum(row["seconds"] for row in read_rows(directory / "metrics.jsonl", "speed")))
