"""What frozen features know about labels, against features that learned nothing (`cat-audio probe`).

Rows of the table: the encoder; its untrained twin (same architecture, fresh weights); the mean and deviation of the
log-mel spectrogram; chance. One label a clip gives accuracy, several give mean average precision; clips without a label
are left out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.manifest import Manifest
from cat.encoders.embed import Embeddings, collect_embeddings
from cat.encoders.frozen import FrozenEncoder
from cat.evaluation.classifiers import PROBES, Result, Split, chance
from cat.evaluation.metrics import classes_without_positives
from cat.outputs import json_of

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Task:
    """The classes of three labelled manifests, and whether some clip carries more than one label."""

    classes: tuple[str, ...]
    multi_label: bool

    @property
    def metric(self) -> str:
        return "mAP" if self.multi_label else "accuracy"

    def targets(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        """(n, C) bool for the clips at `indices`."""
        column = {name: c for c, name in enumerate(self.classes)}
        targets = np.zeros((len(indices), len(self.classes)), dtype=bool)
        for row, index in enumerate(indices):
            targets[row, [column[label] for label in manifest.clips[index].labels]] = True
        return targets


@dataclass
class Row:
    """One encoder's line of the table, with its embeddings of the test split for figures."""

    name: str
    dim: int | None
    results: dict[str, Result] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    test: Embeddings | None = None
    test_labels: list[tuple[str, ...]] = field(default_factory=list)


@dataclass
class Report:
    task: Task
    rows: list[Row]
    counts: dict[str, int]
    notes: list[str]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def labelled_task(manifests: dict[str, Manifest]) -> Task:
    """The task that the labels define; clips without one do not count. Raises ValueError for a split without any label
    and for a single class."""
    for split, manifest in manifests.items():
        if not manifest.classes:
            raise ValueError(
                f"the {split} manifest has {len(manifest.clips)} clips and no label; a probe needs labelled clips."
            )
    classes = tuple(sorted({label for manifest in manifests.values() for label in manifest.classes}))
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least two classes; the manifests have {len(classes)}: {classes}.")
    several = any(len(clip.labels) > 1 for manifest in manifests.values() for clip in manifest.clips)
    return Task(classes, multi_label=several)


def _labelled(manifests: dict[str, Manifest]) -> tuple[dict[str, Manifest], list[str]]:
    """The clips that have a label, and notes on those that have none: a stray file is no reason for another metric."""
    labelled, notes = {}, []
    for split, manifest in manifests.items():
        clips = [clip for clip in manifest.clips if clip.labels]
        labelled[split] = dataclasses.replace(manifest, clips=clips) if len(clips) < len(manifest) else manifest
        notes += [f"{split}: {note}" for note in manifest.notes]
        if len(clips) < len(manifest):
            first = next(clip.path for clip in manifest.clips if not clip.labels)
            notes.append(f"{len(manifest) - len(clips)} clips of {split} left out, without a label; first: {first}")
    return labelled, notes


def run_probe(
    encoders: dict[str, FrozenEncoder],
    manifests: dict[str, Manifest],
    *,
    probes: Sequence[str] = ("knn", "linear"),
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = False,
) -> Report:
    """Probes every encoder of `encoders` (row name -> encoder) on manifests["train"|"valid"|"test"] and adds chance.

    The setting of each probe is chosen on valid, the test split is scored once. Clips without a label are left out.
    """
    task = labelled_task(manifests)
    manifests, notes = _labelled(manifests)
    notes += _shared_files(manifests)
    rows, counts, first = [], {}, None
    for name, encoder in encoders.items():
        found = {
            split: collect_embeddings(
                manifests[split], encoder, batch_size=batch_size, num_workers=num_workers, progress=progress
            )
            for split in SPLITS
        }
        data = {s: Split(e.rows, task.targets(manifests[s], e.indices)) for s, e in found.items()}
        results = {
            probe: PROBES[probe](data["train"], data["valid"], data["test"], multi_label=task.multi_label)
            for probe in probes
        }
        labels = [manifests["test"].clips[i].labels for i in found["test"].indices]
        scores = {probe: result.score for probe, result in results.items()}
        rows.append(Row(name, encoder.dim, results, scores, found["test"], labels))
        if first is None:
            first = data
            counts = {split: len(e.indices) for split, e in found.items()}
            notes += _notes(task, data, found)
    if first is None:
        raise ValueError("run_probe needs at least one encoder.")
    guess = chance(first["train"], first["test"], multi_label=task.multi_label)
    rows.append(Row("chance", None, scores=dict.fromkeys(probes, guess)))
    return Report(task, rows, counts, notes)


def _shared_files(manifests: dict[str, Manifest]) -> list[str]:
    files = {s: {os.path.abspath(m.path(i)) for i in range(len(m))} for s, m in manifests.items()}
    return [
        f"WARNING: {len(shared)} files of the {split} split are in the test split as well, e.g. {min(shared)}"
        for split in ("train", "valid")
        if (shared := files[split] & files["test"])
    ]


def _notes(task: Task, data: dict[str, Split], found: dict[str, Embeddings]) -> list[str]:
    notes = []
    for split, embeddings in found.items():
        if embeddings.skipped:
            first = embeddings.skipped[0]
            notes.append(f"{len(embeddings.skipped)} clips of {split} left out; first: {first.path}: {first.reason}")
    for split in ("train", "test"):
        missing = classes_without_positives(data[split].targets, task.classes)
        if missing:
            consequence = {
                "train": "they cannot be learned and count as errors",
                "test": "they have no average precision and are not in the mean" if task.multi_label else "not tested",
            }[split]
            notes.append(f"{len(missing)} classes without a clip in {split} ({_some(missing)}): {consequence}")
    return notes


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def format_report(report: Report) -> str:
    """The table as text. Scores in percent; in brackets the setting that the validation split chose."""
    probes = list(report.rows[0].scores)
    titles = {"knn": "kNN", "linear": "linear"}
    lines = [["features", "width", *(f"{titles[p]} {report.task.metric}" for p in probes)]]
    for row in report.rows:
        cells = []
        for probe in probes:
            result = row.results.get(probe)
            chosen = f" ({result.setting})" if result else ""
            cells.append(f"{100 * row.scores[probe]:.1f} %{chosen}")
        lines.append([row.name, str(row.dim or ""), *cells])
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    counts = ", ".join(f"{split} {count}" for split, count in report.counts.items())
    text.append(f"{len(report.task.classes)} classes; clips: {counts}. Settings chosen on valid, test scored once.")
    return "\n".join(text + report.notes)


def report_json(report: Report) -> dict[str, Any]:
    return {
        "metric": report.task.metric,
        "classes": list(report.task.classes),
        "clips": report.counts,
        "notes": report.notes,
        "rows": [
            {
                "features": row.name,
                "width": row.dim,
                "scores": row.scores,
                "probes": {probe: dataclasses.asdict(result) for probe, result in row.results.items()},
                "skipped_in_test": [dataclasses.asdict(s) for s in (row.test.skipped if row.test else [])],
            }
            for row in report.rows
        ],
    }


def is_report(path: Path) -> bool:
    """Whether a file is what `cat-audio probe` writes: its arguments and `report_json`."""
    return bool(json_of(path, arguments=dict, metric=str, classes=list, clips=dict, notes=list, rows=list))
