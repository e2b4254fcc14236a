"""What frozen features know about labels, against features that learned nothing (`cat-audio probe`).

Rows of the table: the encoder; its untrained twin (same architecture, fresh weights); the mean and deviation of the
log-mel spectrogram; chance. One label a clip gives accuracy, several give mean average precision; clips without a label
are left out. Probes of tokens and of all layers, and the sweep over layers, are those of CAT encoders' rows alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.manifest import Manifest
from cat.data.splits import shared_files
from cat.encoders import CatEncoder, FrozenEncoder
from cat.encoders.embed import Embeddings
from cat.evaluation.cache import FeatureCache
from cat.evaluation.classifiers import PROBES, Result, Split, chance
from cat.evaluation.features import Features, Wanted, check_layers, depth_of
from cat.evaluation.metrics import classes_without_positives
from cat.evaluation.trained import PROTOTYPES, TRAINED, check_prototypes
from cat.outputs import json_of
from cat.progress import say, track

SPLITS = ("train", "valid", "test")
TITLES = {"knn": "kNN", "linear": "linear", "attention": "attention", "gated": "gated"}


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
    layers: dict[int, dict[str, Result]] = field(default_factory=dict)  # of the sweep: layer -> probe -> its result
    gates: dict[int, float] = field(default_factory=dict)  # of the gated probe: layer -> its weight
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


def labelled(manifests: dict[str, Manifest]) -> tuple[dict[str, Manifest], list[str]]:
    """The clips that have a label, the shortest first, so that a batch is padded little; and notes on those that have
    none: a stray file is no reason for another metric."""
    labelled, notes = {}, []
    for split, manifest in manifests.items():
        seconds = {i: (c.samples or 0) / (c.sample_rate or 1) for i, c in enumerate(manifest.clips) if c.labels}
        labelled[split] = manifest.take(np.array(sorted(seconds, key=seconds.__getitem__), dtype=np.int64))
        notes += [f"{split}: {note}" for note in manifest.notes]
        if len(seconds) < len(manifest):
            first = next(clip.path for clip in manifest.clips if not clip.labels)
            notes.append(f"{len(manifest) - len(seconds)} clips of {split} left out, without a label; first: {first}")
    return labelled, notes


def run_probe(
    encoders: dict[str, FrozenEncoder],
    manifests: dict[str, Manifest],
    *,
    probes: Sequence[str] = ("knn", "linear"),
    layers: Sequence[int] | None = None,
    prototypes: int = PROTOTYPES,
    seed: int = 0,
    cache: FeatureCache | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = False,
) -> Report:
    """Probes every encoder of `encoders` (row name -> encoder) on manifests["train"|"valid"|"test"] and adds chance.

    The setting of each probe is chosen on valid, the test split is scored once. Clips without a label are left out.

    Args:
        probes: of "knn", "linear", "attention" and "gated"; the last two (`cat.evaluation.trained`) are skipped for
            encoders that are no `CatEncoder`.
        layers: what the sweep probes one by one, with those of "knn" and "linear" that are in `probes`, or "linear": 0
            is what the first block sees, the highest the last block's output. () is every layer, None no sweep.
        prototypes: of the gated probe. seed: of the initialisation and the order of clips of what is trained.
        cache: where features come from and are kept (`cat.evaluation.cache`); None keeps nothing.

    Raises ValueError for labels that make no task, an unknown probe, a layer that there is not.
    """
    _check_asked(encoders, probes, layers)
    check_prototypes(prototypes)
    task = labelled_task(manifests)
    manifests, notes = labelled(manifests)
    notes += _shared_files(manifests)
    rows, counts, first = [], {}, None
    options = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    with cache or FeatureCache() as cache:
        for name, encoder in encoders.items():
            wanted = _wanted(encoder, probes, layers)
            found = {split: cache.features(manifests[split], encoder, wanted, **options) for split in SPLITS}
            targets = {split: task.targets(manifests[split], f.indices) for split, f in found.items()}
            training: dict[str, Any] = {"seed": seed, "prototypes": prototypes, "progress": progress}
            row = _probed(name, encoder, found, targets, task, probes, **training)
            if layers is not None and wanted.layers:
                row.layers = _sweep(name, found, targets, task, probes, layers or wanted.layers, progress)
            row.test_labels = [manifests["test"].clips[i].labels for i in found["test"].indices]
            rows.append(row)
            if first is None:
                first = {split: Split(found[split].clip, targets[split]) for split in SPLITS}
                counts = {split: len(f.indices) for split, f in found.items()}
                notes += _notes(task, first, found)
        notes += cache.notes
    if first is None:
        raise ValueError("run_probe needs at least one encoder.")
    guess = chance(first["train"], first["test"], multi_label=task.multi_label)
    rows.append(Row("chance", None, scores=dict.fromkeys(probes, guess)))
    return Report(task, rows, counts, notes)


def _check_asked(encoders: dict[str, FrozenEncoder], probes: Sequence[str], layers: Sequence[int] | None) -> None:
    known = [*PROBES, *TRAINED]
    for probe in probes:
        if probe not in known:
            raise ValueError(f"{probe!r} is no probe; expected some of {', '.join(known)}")
    if not probes:
        raise ValueError(f"no probe is asked for; expected some of {', '.join(known)}")
    cats = [encoder for encoder in encoders.values() if isinstance(encoder, CatEncoder)]
    asked = [
        *(f"the {probe} probe" for probe in probes if probe in TRAINED),
        *(["the sweep"] if layers is not None else []),
    ]
    if asked and not cats:
        named = ", ".join(dict.fromkeys(encoder.name for encoder in encoders.values()))
        raise ValueError(f"{asked[0]} reads the layers of a CAT checkpoint, and there is none among {named}")
    for encoder in cats:
        check_layers(layers or (), depth_of(encoder))


def _wanted(encoder: FrozenEncoder, probes: Sequence[str], layers: Sequence[int] | None) -> Wanted:
    """The gated probe reads every layer, attention the last; the last is always there, it is the embedding."""
    if not isinstance(encoder, CatEncoder) or (layers is None and not any(probe in TRAINED for probe in probes)):
        return Wanted()
    depth = depth_of(encoder)
    every = tuple(range(depth + 1))
    some = every if "gated" in probes or layers == () else tuple(sorted({*(layers or ()), depth}))
    return Wanted(some, tokens=any(probe in TRAINED for probe in probes))


def _probed(
    name: str,
    encoder: FrozenEncoder,
    found: dict[str, Features],
    targets: dict[str, np.ndarray],
    task: Task,
    probes: Sequence[str],
    *,
    seed: int,
    prototypes: int,
    progress: bool,
) -> Row:
    clip = [Split(found[split].clip, targets[split]) for split in SPLITS]
    every = [Split(found[split], targets[split]) for split in SPLITS]
    device, results = getattr(encoder, "device", "cpu"), {}
    for probe in probes:
        if probe in PROBES:
            results[probe] = PROBES[probe](*clip, multi_label=task.multi_label)
        elif found["train"].tokens is not None:
            if progress:
                say(f"{name}: training the {probe} probe")
            results[probe] = TRAINED[probe](
                *every, multi_label=task.multi_label, seed=seed, device=device, prototypes=prototypes
            )
    scores = {probe: result.score for probe, result in results.items()}
    test = found["test"]
    row = Row(name, encoder.dim, results, scores, test=Embeddings(np.asarray(test.clip), test.indices, test.skipped))
    if (gated := results.get("gated")) is not None and gated.gates is not None:
        row.gates = dict(zip(test.layers, gated.gates, strict=True))
    return row


def _sweep(
    name: str,
    found: dict[str, Features],
    targets: dict[str, np.ndarray],
    task: Task,
    probes: Sequence[str],
    layers: Sequence[int],
    progress: bool,
) -> dict[int, dict[str, Result]]:
    swept = [probe for probe in PROBES if probe in probes] or ["linear"]
    results = {}
    for layer in track(sorted(layers), len(layers), label=f"layers of {name}", unit="layers", enabled=progress):
        at = found["train"].layers.index(layer)
        splits = [Split(found[split].pooled[:, at], targets[split]) for split in SPLITS]  # type: ignore[index]
        results[layer] = {probe: PROBES[probe](*splits, multi_label=task.multi_label) for probe in swept}
    return results


def _shared_files(manifests: dict[str, Manifest]) -> list[str]:
    test = manifests["test"]
    return [
        f"WARNING: {len(shared)} clips of the test split are in the {split} split as well, e.g. {test.path(shared[0])}"
        for split in ("train", "valid")
        if (shared := shared_files(manifests[split], test))
    ]


def _notes(task: Task, data: dict[str, Split], found: dict[str, Features]) -> list[str]:
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
    lines = [["features", "width", *(f"{TITLES[p]} {report.task.metric}" for p in probes)]]
    for row in report.rows:
        cells = [_cell(row.scores.get(probe), row.results.get(probe)) for probe in probes]
        lines.append([row.name, str(row.dim or ""), *cells])
    text = _aligned(lines)
    counts = ", ".join(f"{split} {count}" for split, count in report.counts.items())
    text.append(f"{len(report.task.classes)} classes; clips: {counts}. Settings chosen on valid, test scored once.")
    for row in report.rows:
        text += _layers_as_text(row, report.task)
    return "\n".join(text + report.notes)


def _layers_as_text(row: Row, task: Task) -> list[str]:
    layers = sorted({*row.layers, *row.gates})
    if not layers:
        return []
    swept = list(next(iter(row.layers.values()), {}))
    lines = [["layer", *(f"{TITLES[probe]} {task.metric}" for probe in swept), *(["gate"] if row.gates else [])]]
    for layer in layers:
        results = [row.layers.get(layer, {}).get(probe) for probe in swept]
        cells = [_cell(result.score if result else None, result) for result in results]
        lines.append([str(layer), *cells, *([f"{row.gates[layer]:.3f}"] if row.gates else [])])
    chosen = [f"{TITLES[p]} {_best_on_valid(row, p)}" for p in swept]
    best = f"; best on valid: {', '.join(chosen)}" if chosen else ""
    return ["", f"layers of {row.name} (0: what the first block sees{best})", *_aligned(lines)]


def _best_on_valid(row: Row, probe: str) -> int:
    """The layer that valid would choose, the lowest of equals."""
    return max(row.layers, key=lambda layer: (row.layers[layer][probe].valid_score, -layer))


def _cell(score: float | None, result: Result | None) -> str:
    if score is None:
        return ""
    return f"{100 * score:.1f} %" + (f" ({result.setting})" if result else "")


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]]


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
                "layers": [
                    {
                        "layer": layer,
                        "gate": row.gates.get(layer),
                        "probes": {p: dataclasses.asdict(result) for p, result in row.layers.get(layer, {}).items()},
                    }
                    for layer in sorted({*row.layers, *row.gates})
                ],
                "skipped_in_test": [dataclasses.asdict(s) for s in (row.test.skipped if row.test else [])],
            }
            for row in report.rows
        ],
    }


def is_report(path: Path) -> bool:
    """Whether a file is what `cat-audio probe` writes: its arguments and `report_json`."""
    return bool(json_of(path, arguments=dict, metric=str, classes=list, clips=dict, notes=list, rows=list))
