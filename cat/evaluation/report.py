"""What `cat-audio evaluate` writes and prints: ``evaluation.json`` (everything), ``classes.csv`` (a row a class) and
``clips.csv`` (a row a clip), and the table.

``evaluation.json`` has the digests of the other two, by which they are known again as the command's own.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints.classifier import ClassifierInfo
from cat.evaluation.evaluate import Evaluation
from cat.evaluation.metrics import ClassScores, main_metric
from cat.files import replacing, sha256_of, write_json
from cat.outputs import Output, json_of
from cat_kernels import __version__

JSON, CLASSES, CLIPS = "evaluation.json", "classes.csv", "clips.csv"
CLASS_COLUMNS = ("label", "name", *(field.name for field in dataclasses.fields(ClassScores) if field.name != "label"))
_SHOWN = 20  # classes that the table has room for


def outputs(out: Path) -> list[Output]:
    """The files that are written into the folder ``out``, as `cat.outputs.claim` checks them."""
    return [
        Output(out / JSON, is_report, "another --out"),
        *(Output(out / name, lambda path: _is_signed(path), "another --out") for name in (CLASSES, CLIPS)),
    ]


def is_report(path: Path) -> bool:
    """Whether a file is what `write_report` writes."""
    return bool(json_of(path, arguments=dict, checkpoint=dict, data=dict, metrics=dict, classes=list, files=dict))


def _is_signed(path: Path) -> bool:
    signed = json_of(path.with_name(JSON), files=dict)["files"].get(path.name)
    return signed == sha256_of(path)


def write_report(out: Path, evaluation: Evaluation, info: ClassifierInfo, arguments: Mapping[str, Any]) -> list[Path]:
    """Writes the three files into ``out``, all of them or none, and returns their paths."""
    with contextlib.ExitStack() as stack:
        # left, and so renamed, in the reverse order: evaluation.json last, when the others are in their place
        report = stack.enter_context(replacing(out / JSON))
        classes = stack.enter_context(replacing(out / CLASSES))
        clips = stack.enter_context(replacing(out / CLIPS))
        _write_classes(classes, evaluation, info)
        _write_clips(clips, evaluation, info)
        files = {CLASSES: sha256_of(classes), CLIPS: sha256_of(clips)}
        write_json(report, {**report_json(evaluation, info, arguments), "files": files})
    return [out / JSON, out / CLASSES, out / CLIPS]


def report_json(evaluation: Evaluation, info: ClassifierInfo, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the clips' scores. What is infinite, d' of a perfect AUC, is null."""
    scored, scores, intervals = evaluation.scored, evaluation.scores, evaluation.intervals
    labels = info.classes
    confused = [] if scores.confusion is None else scores.confusion.tolist()
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()},
        "checkpoint": {"path": str(info.path), "step": info.step, "sha256": sha256_of(info.path)},
        "data": {
            "source": scored.manifest.name,
            "fingerprint": scored.manifest.fingerprint,
            "clips": scores.clips,
            "failures": [dataclasses.asdict(failure) for failure in scored.failures],
        },
        "task": scores.task,
        "main": main_metric(scores.task),
        "metrics": {name: _plain(value) for name, value in scores.metrics.items()},
        "intervals": None
        if intervals is None
        else {
            "level": intervals.level,
            "resamples": intervals.resamples,
            "seed": intervals.seed,
            **{name: [_plain(low), _plain(high)] for name, (low, high) in intervals.metrics.items()},
        },
        "left_out": {metric: list(classes) for metric, classes in scores.left_out.items()},
        "notes": list(evaluation.notes),
        "classes": [
            {
                **{"label": one.label, "name": info.class_names[c]},
                **{key: _plain(value) for key, value in dataclasses.asdict(one).items() if key != "label"},
                "ap_interval": None if intervals is None else intervals.classes[c],
            }
            for c, one in enumerate(scores.classes)
        ],
        "confusion": None
        if scores.confusion is None
        else {
            labels[i]: {labels[j]: count for j, count in enumerate(row) if count}
            for i, row in enumerate(confused)
            if sum(row)
        },
        "events": _events_json(evaluation),
        "mistakes": [dataclasses.asdict(mistake) for mistake in evaluation.mistakes],
        "versions": {"cat-kernels": __version__, "torch": torch.__version__},
    }


def _events_json(evaluation: Evaluation) -> dict[str, Any] | None:
    events = evaluation.events
    if events is None:
        return None
    return {
        "clips": events.scores.clips,
        "metrics": events.scores.metrics,
        "classes": [dataclasses.asdict(one) for one in events.scores.classes],
        "left_out": list(events.scores.left_out),
        "settings_from": events.settings_from,
        "settings": {label: dataclasses.asdict(one) for label, one in events.settings.items()},
    }


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_classes(path: Path, evaluation: Evaluation, info: ClassifierInfo) -> None:
    intervals = evaluation.intervals
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow([*CLASS_COLUMNS, "ap_low", "ap_high"])
        for c, one in enumerate(evaluation.scores.classes):
            values = dataclasses.asdict(one)
            interval = None if intervals is None else intervals.classes[c]
            row = [one.label, info.class_names[c], *(values[column] for column in CLASS_COLUMNS[2:])]
            table.writerow([*row, *(interval or (None, None))])


def _write_clips(path: Path, evaluation: Evaluation, info: ClassifierInfo) -> None:
    """``labels`` are parted by semicolons; a column a class with its score."""
    scored = evaluation.scored
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "labels", "highest", *info.classes])
        for clip, scores_C, targets_C in zip(scored.clips, scored.scores, scored.targets, strict=True):
            labels = ";".join(info.classes[c] for c in targets_C.nonzero()[0])
            row = [scored.manifest.clips[int(clip)].path, labels, info.classes[int(scores_C.argmax())]]
            table.writerow([*row, *(f"{score:.6g}" for score in scores_C)])


# ---------------------------------------------------------------- the table


def format_report(evaluation: Evaluation, info: ClassifierInfo) -> str:
    """The table as text: every metric with its interval, and the classes, of many those with the lowest AP."""
    scored, scores, intervals = evaluation.scored, evaluation.scores, evaluation.intervals
    step = "" if info.step is None else f" (step {info.step})"
    lines = [
        f"{info.path}{step}",
        f"{scored.manifest.name}: {scores.clips} clips, {len(info.classes)} classes, {scores.task}",
        "",
    ]
    rows = [["metric", "value", "" if intervals is None else f"{100 * intervals.level:.0f} % interval"]]
    for name, value in scores.metrics.items():
        interval = None if intervals is None else intervals.metrics.get(name)
        rows.append([name, _number(name, value), _between(name, interval)])
    lines += [*_table(rows), ""]
    lines += _class_table(evaluation, info)
    lines += _event_table(evaluation, info)
    if intervals is not None:
        lines.append(f"intervals: {intervals.resamples} draws of the clips with replacement, seed {intervals.seed}")
    return "\n".join([*lines, *evaluation.notes])


def _class_table(evaluation: Evaluation, info: ClassifierInfo) -> list[str]:
    found = [(one, info.class_names[c]) for c, one in enumerate(evaluation.scores.classes) if one.ap is not None]
    single = evaluation.scores.confusion is not None
    found.sort(key=lambda item: item[0].ap or 0.0)
    lines = []
    if len(found) > _SHOWN:
        lines = [f"the {_SHOWN} of {len(found)} classes with the lowest AP (all: {CLASSES}):"]
        found = found[:_SHOWN]
    rows = [["class", "clips", "AP", "AUC", "d'", *(["recall", "precision"] if single else [])]]
    for one, name in found:
        values = [("AP", one.ap), ("AUC", one.auc), ("d'", one.d_prime)]
        values += [("recall", one.recall), ("precision", one.precision)] if single else []
        cells = ["" if value is None else _number(metric, value) for metric, value in values]
        rows.append([name, str(one.clips), *cells])
    return [*lines, *_table(rows), ""]


def _event_table(evaluation: Evaluation, info: ClassifierInfo) -> list[str]:
    if evaluation.events is None:
        return []
    scores, names = evaluation.events.scores, dict(zip(info.classes, info.class_names, strict=True))
    rows = [["events", "value"]]
    rows += [[name, f"{v:.2f}" if name.endswith("rate") else _number(name, v)] for name, v in scores.metrics.items()]
    lines = [*_table(rows), ""]
    found = sorted((one for one in scores.classes if one.f1 is not None), key=lambda one: one.f1 or 0.0)[:_SHOWN]
    rows = [["class", "events", "found", "event F1", "precision", "recall", "segment F1"]]
    for one in found:
        values = (one.f1, one.precision, one.recall, one.segment_f1)
        cells = ["" if value is None or math.isnan(value) else _number("F1", value) for value in values]
        rows.append([names[one.label], str(one.labelled), str(one.found), *cells])
    told = f"events in {scores.clips} clips; settings: {evaluation.events.settings_from}"
    return [*lines, *_table(rows), "", told]


def _between(metric: str, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return ""
    if interval[0] == interval[1]:
        return "none: the same in all draws"  # that nothing went wrong does not say that nothing can
    return f"{_number(metric, interval[0])} to {_number(metric, interval[1])}"


def _number(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric == "d'" else f"{100 * value:.1f} %"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(_width(row[c]) for row in rows) for c in range(len(rows[0]))]
    text = [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [text[0], "  ".join("-" * width for width in widths if width), *text[1:]]


def _width(text: str) -> int:
    """Columns of a terminal: Chinese and the like take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
