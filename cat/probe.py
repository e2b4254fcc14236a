"""``cat-audio probe``: what frozen features know about labels, against features that learned nothing.

Rows of the table: the encoder; its untrained twin (same architecture, fresh weights); the mean and deviation of the
log-mel spectrogram; chance. One label a clip gives accuracy, several give mean average precision; clips without a label
are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat.classifiers import PROBES, Result, Split, chance, classes_without_positives
from cat.data.manifest import Manifest, load_manifest
from cat.embed import Embeddings, collect_embeddings
from cat.files import write_json
from cat.frozen import POOLINGS, CatEncoder, FrozenEncoder, LogMelStatistics, build_encoder

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "kNN and linear probes of frozen features on labelled manifests."
    parser.add_argument(
        "encoder", metavar="CHECKPOINT", help="run directory, checkpoint directory, .safetensors, clap[:PATH] or random"
    )
    for split in SPLITS:
        parser.add_argument(f"--{split}", required=True, metavar="MANIFEST", help=f"labelled {split} split")
    parser.add_argument("--untrained-twin", action="store_true", help="probe the same architecture with fresh weights")
    parser.add_argument("--seed", type=int, default=0, help="initialisation of the untrained twin (default 0)")
    parser.add_argument("--knn", action="store_true", help="only the kNN probe (default: both probes)")
    parser.add_argument("--linear", action="store_true", help="only the linear probe (default: both probes)")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="of a checkpoint's tokens (default mean)")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: probe.json in the run directory")
    parser.add_argument("--figures", action="store_true", help="draw the test embeddings beside the JSON, in figures/")
    parser.add_argument(
        "--require-better",
        action="store_true",
        help="fail unless the encoder beats its untrained twin on every probe that ran",
    )


def run(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build_encoder(args.encoder, pooling=args.pooling, weights=args.weights, device=device)
    encoders: dict[str, FrozenEncoder] = {"trained": encoder}
    if args.untrained_twin or args.require_better:
        if not isinstance(encoder, CatEncoder):
            raise ValueError(f"--untrained-twin and --require-better need a CAT checkpoint, got {args.encoder!r}.")
        encoders["untrained twin"] = encoder.untrained_twin(args.seed)
    encoders["log-mel mean + std"] = (
        LogMelStatistics(
            encoder.features, max_samples=encoder.max_samples, device=device
        )  # hears what the encoder does
        if isinstance(encoder, CatEncoder)
        else LogMelStatistics(device=device)
    )

    probes = [p for p in PROBES if getattr(args, p)] or list(PROBES)
    manifests = {split: load_manifest(getattr(args, split)) for split in SPLITS}
    report = run_probe(
        encoders,
        manifests,
        probes=probes,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=sys.stderr.isatty(),
    )
    print(format_report(report))
    out = args.out or _default_out(args.encoder)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
    write_json(out, {"arguments": settings, **report_json(report)})
    print(f"written: {out}")
    if args.figures:
        from cat.figures import write_projection

        drawn = {
            row.name: (row.test.rows, row.test_labels)
            for row in report.rows
            if row.test is not None and not isinstance(encoders[row.name], LogMelStatistics)
        }
        print(f"written: {write_projection(out.parent / 'figures' / 'embeddings.png', drawn)}")
    return _verdict(report) if args.require_better else 0


def _default_out(spec: str) -> Path:
    """probe.json in the run directory of a checkpoint, beside a .safetensors file, or here."""
    path = Path(spec)
    if not path.exists():
        return Path("probe.json")
    directory = path if path.is_dir() else path.parent
    in_run = [d for d in (directory, *directory.absolute().parents[:2]) if (d / "config.yaml").is_file()]
    return (in_run[0] if in_run else directory) / "probe.json"


def _verdict(report: Report) -> int:
    trained, twin = report.row("trained").scores, report.row("untrained twin").scores
    lost = [f"{p}: {100 * trained[p]:.1f} % against {100 * twin[p]:.1f} %" for p in trained if trained[p] <= twin[p]]
    if lost:
        print(f"FAIL: the trained encoder does not beat its untrained twin ({'; '.join(lost)})")
        return 1
    print("PASS: the trained encoder beats its untrained twin on every probe")
    return 0
