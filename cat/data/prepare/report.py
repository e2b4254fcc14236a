"""What was found out about a data set, for programs (JSON) and for people (Markdown)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cat.data.labels import class_weights
from cat.data.prepare.check import PrepareConfig, statistics
from cat.data.prepare.clips import Kept
from cat.data.prepare.source import Source

FORMAT = "cat-audio prepare report"
_CLASSES = 20  # of the rarest and of the most common that people are told


def kinds_of(rejected: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """How many files were rejected for reasons that differ in numbers and details only; the most first."""
    kinds = Counter(_kind(one["reason"]) for one in rejected)
    return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _kind(reason: str) -> str:
    """``12 of 400 samples are NaN or infinite`` and ``too short: 3 samples`` without the numbers and what follows."""
    return re.sub(r"\b\d+( of \d+)? ", "", re.split("[:;,(]", reason)[0]).strip()


def describe(
    source: Source,
    records: np.ndarray,
    usable: np.ndarray,
    kept: Kept,
    rejected: list[dict[str, str]],
    duplicates: list[dict[str, Any]],
    config: PrepareConfig,
) -> dict[str, Any]:
    """JSON-able; see docs/data.md for the fields."""
    records, features = records[usable], config.features
    mean, std, heard = statistics(records, features)
    seconds = records["heard"] / features.sample_rate
    rates, counts = np.unique(records["rate"], return_counts=True)
    again = sum(len(group["paths"]) - 1 for group in duplicates)
    of_classes = class_weights(np.array(list(kept.counts.values())))
    classes = [
        {"label": label, "name": kept.manifest.label_names.get(label, label), "clips": count, "weight": float(weight)}
        for (label, count), weight in zip(kept.counts.items(), of_classes, strict=True)
    ]
    return {
        "clips": {
            "listed": len(usable) + len(source.missing),
            "usable": len(records),
            "rejected": len(rejected),
            "dropped": again if config.drop_duplicates else 0,
        },
        "seconds": {
            "all": float(seconds.sum()),
            "shortest": float(seconds.min()),
            "median": float(np.median(seconds)),
            "longest": float(seconds.max()),
        },
        "sample_rates": {str(rate): int(count) for rate, count in zip(rates.tolist(), counts, strict=True)},
        "features": {"mean": mean, "std": std, "frames": round(heard), "frames_in_all": int(records["frames"].sum())},
        "rejected": kinds_of(rejected),
        "duplicates": {
            "groups": len(duplicates),
            "clips": again,
            "with_other_labels": sum(not group["same_labels"] for group in duplicates),
        },
        "clipped": {"clips": int((records["clipped"] > 0).sum()), "samples": int(records["clipped"].sum())},
        "classes": classes,
        "notes": [*source.manifest.notes, *_notes(source, kept)],
    }


def _notes(source: Source, kept: Kept) -> Iterable[str]:
    if kept.lost:
        some = ", ".join(kept.lost[:5]) + (f" and {len(kept.lost) - 5} more" if len(kept.lost) > 5 else "")
        yield f"no clip is left of {len(kept.lost)} classes: {some}"
    if source.manifest.embeddings is not None or source.manifest.embedding_files is not None:
        yield "embeddings are of the old list of clips and not in the new manifest: cat-audio embed makes new ones"


def recipe_lines(report: Mapping[str, Any]) -> tuple[str, str]:
    """What a recipe has to say, or the command line."""
    mean, std = (f"{report['features'][name]:.3f}" for name in ("mean", "std"))
    return f"features: {{mean: {mean}, std: {std}}}", f"features.mean={mean} features.std={std}"


def readable(report: Mapping[str, Any]) -> str:
    """Markdown."""
    return "\n".join(["# What was prepared", "", *_summary(report), "", *_classes(report["classes"])]).rstrip() + "\n"


def _summary(report: Mapping[str, Any]) -> list[str]:
    clips, seconds, found = report["clips"], report["seconds"], report["features"]
    lines = [
        f"- source: {report['source']}",
        f"- {clips['usable']} of {clips['listed']} clips can be used, {seconds['all'] / 3600:.3g} hours; "
        f"{seconds['shortest']:.3g} to {seconds['longest']:.4g} s, half of them up to {seconds['median']:.3g} s",
        f"- sample rates: {_counted(report['sample_rates'], ' Hz')}",
        f"- log-mel: mean {found['mean']:.3f}, standard deviation {found['std']:.3f}, of {found['frames']} frames that "
        f"an epoch hears ({found['frames_in_all']} in all). For the recipe, or the command line:",
        "",
        *(f"      {line}" for line in recipe_lines(report)),
        "",
        f"- rejected: {clips['rejected']}" + (f" ({_counted(report['rejected'])})" if report["rejected"] else ""),
    ]
    duplicates = report["duplicates"]
    if duplicates["clips"]:
        what = "left out" if clips["dropped"] else "kept"
        other = f" (with other labels in {duplicates['with_other_labels']})" * bool(duplicates["with_other_labels"])
        lines.append(
            f"- duplicates: {duplicates['clips']}, {what}; groups of clips that are the same, sample by sample: "
            f"{duplicates['groups']}{other}"
        )
    if report["clipped"]["clips"]:
        lines.append(
            f"- clipped: {report['clipped']['samples']} samples, in {report['clipped']['clips']} of the clips, were "
            "beyond what 16 bits hold"
        )
    return lines + [f"- {note}" for note in report["notes"]]


def _counted(counts: Mapping[str, int], unit: str = "") -> str:
    return ", ".join(f"{name}{unit} {count}" for name, count in counts.items())


def _classes(classes: list[dict[str, Any]]) -> list[str]:
    if not classes:
        return []
    ordered = sorted(classes, key=lambda one: (-one["clips"], one["label"]))
    cut = len(ordered) > 2 * _CLASSES
    shown = [*ordered[:_CLASSES], *ordered[-_CLASSES:]] if cut else ordered
    heading = f"{len(classes)} classes" + (f", of which the {_CLASSES} largest and smallest" if cut else "")
    rows = [f"| {one['name'].replace('|', '/')} | {one['clips']} | {one['weight']:.4g} |" for one in shown]
    return [f"## {heading}", "", "| class | clips | weight |", "|---|---|---|", *rows]
