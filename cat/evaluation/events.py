"""Sound events against strong labels: the field's scores, and the settings that suit a validation set.

Event and segment scores are sed_eval's (Mesaros et al., "Metrics for Polyphonic Sound Event Detection", 2016), with the
collars of the DCASE challenges: an onset may be 0.2 s off, an offset 0.2 s or a fifth of the event. The rows' average
precision is scikit-learn's. A class without an event in the labels has no score, is left out of the means and named.

Shapes: R rows of a clip, C classes.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.labels import Interval, Labels, intervals_of
from cat.data.manifest import Manifest, ManifestError
from cat.prediction import CATClassifier, Event, EventSettings, Plan, find_events
from cat.prediction.events import home_of_settings, write_settings
from cat.prediction.files import FileResult, predict_files
from cat.progress import track

EXTRA = "scores of events need sed_eval: pip install 'cat-kernels[events]'"
COLLAR, SHARE = 0.2, 0.2  # of onset and offset in seconds, and of offset as a share of the event
SEGMENT = 1.0  # seconds
# Settings that `choose_settings` tries, of equal ones the first: thresholds as shares of the class's highest score (it
# may never reach 0.5), the lower one of the hysteresis as a share of the threshold.
THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9)
LOWS = (1.0, 0.5)
MEDIANS = (1, 3, 5)  # rows


@dataclass(frozen=True)
class ClassEventScores:
    """One class; None where the labels have no event of it. ``labelled`` and ``found`` count events."""

    label: str
    labelled: int
    found: int
    f1: float | None
    precision: float | None
    recall: float | None
    segment_f1: float | None
    frame_ap: float | None = None


@dataclass(frozen=True)
class EventScores:
    """``metrics`` by name: "event F1" and "segment F1" are means over classes, "... (all events)" counts all classes
    together, error rates too; "frame mAP" is of rows, whatever the settings."""

    clips: int
    metrics: dict[str, float]
    classes: tuple[ClassEventScores, ...]
    left_out: tuple[str, ...]

    @property
    def main(self) -> float:
        return self.metrics["event F1"]


@dataclass(frozen=True)
class HeardClips:
    """What a classifier says about the rows of a manifest's clips, and what their labels say; and what failed."""

    classes: tuple[str, ...]
    plan: Plan
    clips: list[FileResult]
    truth: list[list[Interval]]
    failed: list[FileResult]

    def events(self, settings: Mapping[str, EventSettings]) -> list[list[Event]]:
        return [
            find_events(clip.rows, self.classes, settings, self.plan, clip.seconds)
            for clip in self.clips
            if clip.rows is not None
        ]


def hear_clips(
    classifier: CATClassifier,
    manifest: Manifest,
    *,
    plan: Plan | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> HeardClips:
    """The clips of ``manifest`` that can be read. Raises ManifestError where labels are missing or none of the model's,
    or no clip can be read; ValueError for a classifier without a frame head."""
    truth = strong_labels(manifest, classifier.classes)
    plan = plan or classifier.plan()
    files = [manifest.audio(index) for index in range(len(manifest))]
    found = predict_files(classifier, files, plan=plan, rows=True, batch_size=batch_size)
    results = list(track(found, len(files), label="events", unit="clips", enabled=progress))
    kept = [(result, true) for result, true in zip(results, truth, strict=True) if result.error is None]
    failed = [result for result in results if result.error is not None]
    if not kept:
        raise ManifestError(
            f"none of the {len(files)} clips could be read; the first: {failed[0].path}: {failed[0].error}"
        )
    return HeardClips(classifier.classes, plan, [clip for clip, _ in kept], [true for _, true in kept], failed)


def strong_labels(manifest: Manifest, classes: Sequence[str]) -> list[list[Interval]]:
    """The events of every clip. Raises ManifestError for a clip without strong labels and labels that are no class."""
    truth = []
    for clip in manifest.clips:
        intervals = intervals_of(clip)
        if intervals is None:
            raise ManifestError(
                f'{manifest.name}: {clip.path} does not say when its sounds are; expected a field "events" of every '
                'clip, [{"onset": 0.5, "offset": 1.2, "label": "dog"}], or [] for none'
            )
        truth.append(intervals)
    unknown = sorted({label for intervals in truth for _, _, label in intervals}.difference(classes))
    if unknown:
        raise ManifestError(
            f"{manifest.name}: events of {', '.join(map(repr, unknown[:5]))}, which the model does not know; its "
            f"classes are {', '.join(map(repr, classes))}"
        )
    return truth


def evaluate_events(heard: HeardClips, settings: Mapping[str, EventSettings]) -> EventScores:
    """All scores of the events that ``settings`` find."""
    seconds = [clip.seconds for clip in heard.clips]
    return score_events(heard.events(settings), heard.truth, seconds, heard.classes, _frame_ap(heard))


def score_events(
    found: Sequence[Sequence[Event]],
    truth: Sequence[Sequence[Interval]],
    seconds: Sequence[float],
    classes: Sequence[str],
    frame_ap: Mapping[str, float] | None = None,
) -> EventScores:
    """Scores of each clip's events, ``found`` and true, in clips of so many ``seconds``."""
    sed_eval = import_sed_eval()
    segments = sed_eval.sound_event.SegmentBasedMetrics(list(classes), time_resolution=SEGMENT)
    for mine, true, length in zip(found, truth, seconds, strict=True):
        segments.evaluate(_dicts_of_truth(true), _dicts(mine), evaluated_length_seconds=length)
    by_event, by_segment, ap = _results(_collars(found, truth, classes)), _results(segments), frame_ap or {}
    rows = []
    for label in classes:
        event, segment = by_event["class_wise"][label], by_segment["class_wise"][label]
        known, f1 = event["count"]["Nref"] > 0, event["f_measure"]
        rows.append(
            ClassEventScores(
                label,
                int(event["count"]["Nref"]),
                int(event["count"]["Nsys"]),
                float(f1["f_measure"]) if known else None,
                float(f1["precision"]) if known else None,
                float(f1["recall"]) if known else None,
                float(np.nan_to_num(segment["f_measure"]["f_measure"])) if known else None,
                ap.get(label),
            )
        )
    return EventScores(
        len(truth), _means(by_event, by_segment, rows), tuple(rows), tuple(row.label for row in rows if row.f1 is None)
    )


def _means(
    by_event: Mapping[str, Any], by_segment: Mapping[str, Any], rows: Sequence[ClassEventScores]
) -> dict[str, float]:
    means = {
        "event F1": [row.f1 for row in rows if row.f1 is not None],
        "segment F1": [row.segment_f1 for row in rows if row.segment_f1 is not None],
        "frame mAP": [row.frame_ap for row in rows if row.frame_ap is not None],
    }
    metrics = {name: float(np.mean(values)) for name, values in means.items() if values}
    for name, results in (("event", by_event), ("segment", by_segment)):
        overall = results["overall"]
        metrics[f"{name} F1 (all events)"] = float(np.nan_to_num(overall["f_measure"]["f_measure"]))
        metrics[f"{name} error rate"] = float(overall["error_rate"]["error_rate"])
    return metrics


def choose_settings(heard: HeardClips) -> dict[str, EventSettings]:
    """The settings of each class with the highest event F1 among those that are tried. A class without an event, or
    whose events no settings find, has the defaults."""
    highest_C = np.max([clip.rows.max(axis=0) for clip in heard.clips if clip.rows is not None], axis=0)
    best = dict.fromkeys(heard.classes, (0.0, EventSettings()))
    for median, low, threshold in itertools.product(MEDIANS, LOWS, THRESHOLDS):
        tried = {
            label: _settings(threshold * float(highest), low, median)
            for label, highest in zip(heard.classes, highest_C, strict=True)
        }
        found = heard.events(tried)
        scores = _results(_collars(found, heard.truth, heard.classes))["class_wise"]
        for label in heard.classes:
            f1 = float(np.nan_to_num(scores[label]["f_measure"]["f_measure"]))
            if scores[label]["count"]["Nref"] and f1 > best[label][0]:
                best[label] = (f1, tried[label])
    return {label: one for label, (_, one) in best.items()}


def _settings(threshold: float, low: float, median: int) -> EventSettings:
    threshold = max(1e-6, float(f"{threshold:.4g}"))  # as people would write it
    return EventSettings(threshold, None if low == 1 else threshold * low, median)


def write_chosen(checkpoint: Path, settings: Mapping[str, EventSettings], on: Path | None, scores: EventScores) -> Path:
    """Writes the settings where `cat-audio predict --events` finds them: events.json in the run, or beside the file."""
    chosen = {"on": None if on is None else str(on), "clips": scores.clips, "event F1": scores.main}
    write_settings(home_of_settings(checkpoint), settings, chosen)
    return home_of_settings(checkpoint)


def _frame_ap(heard: HeardClips) -> dict[str, float]:
    """Average precision of each class over all rows. Rows of a step finer than a row of patches count as rows."""
    from sklearn.metrics import average_precision_score

    labels = Labels("events", heard.classes, heard.classes)
    plan = heard.plan
    rows = [clip.rows for clip in heard.clips if clip.rows is not None]
    targets = np.concatenate(
        [
            labels.frame_targets(true, len(rows_RC), plan.step).numpy()
            for rows_RC, true in zip(rows, heard.truth, strict=True)
        ]
    )
    scores = np.concatenate(rows)
    return {
        label: float(average_precision_score(targets[:, c], scores[:, c]))
        for c, label in enumerate(heard.classes)
        if targets[:, c].any()
    }


def _collars(found: Iterable[Sequence[Event]], truth: Iterable[Sequence[Interval]], classes: Sequence[str]) -> Any:
    metrics = import_sed_eval().sound_event.EventBasedMetrics(
        list(classes), t_collar=COLLAR, percentage_of_length=SHARE, empty_system_output_handling="zero_score"
    )
    for mine, true in zip(found, truth, strict=True):
        if mine or true:
            metrics.evaluate(_dicts_of_truth(true), _dicts(mine))
    return metrics


def _results(metrics: Any) -> Any:
    with warnings.catch_warnings():  # of means over no class
        warnings.simplefilter("ignore", RuntimeWarning)
        return metrics.results()


def _dicts(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [{"onset": one.onset, "offset": one.offset, "event_label": one.label} for one in events]


def _dicts_of_truth(intervals: Sequence[Interval]) -> list[dict[str, Any]]:
    return [{"onset": onset, "offset": offset, "event_label": label} for onset, offset, label in intervals]


def import_sed_eval() -> Any:
    """sed_eval. dcase_util, on which it builds, imports pkg_resources for its examples alone; setuptools 82 and newer
    have none."""
    stand_in = "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None
    if stand_in:
        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    try:
        import sed_eval
    except ImportError as error:
        raise ImportError(f"{EXTRA} ({error})") from error
    finally:
        if stand_in:
            del sys.modules["pkg_resources"]
    return sed_eval
