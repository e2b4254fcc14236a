"""A classifier's scores on labelled clips, and everything they say about it (`cat-audio evaluate`).

The clips come as in the validation of fine-tuning: padded and cropped as the checkpoint was trained, at the centre
where that was at random. In float32; the scores are float64, in which fewer of them are equal.

Shapes: n clips, B clips of a batch, C classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cat.checkpoints.classifier import ClassifierInfo, load_classifier
from cat.checkpoints.store import PathLike
from cat.data.batch import Batch, Failure
from cat.data.finetuning import crop_to_score, scoring_batches
from cat.data.labels import Labels, intervals_of
from cat.data.loader import TooManyFailures
from cat.data.manifest import Manifest
from cat.evaluation.events import (
    EXTRA,
    EventScores,
    choose_settings,
    evaluate_events,
    hear_clips,
    write_chosen,
)
from cat.evaluation.intervals import RESAMPLES, Intervals, bootstrap
from cat.evaluation.metrics import Scores, scores_of
from cat.model import Classifier
from cat.prediction import CATClassifier, EventSettings
from cat.prediction.events import home_of_settings, settings_of
from cat.progress import Progress, say

MISTAKES = 12  # that are listed and drawn


class ScoreError(RuntimeError):
    """A model whose scores are not numbers."""


@dataclass(frozen=True)
class Scored:
    """Clips with their scores: ``scores`` (n, C) float64 in 0..1, ``targets`` (n, C) bool, ``clips`` (n,) their
    indices into the manifest; and what could not be read."""

    manifest: Manifest
    scores: np.ndarray
    targets: np.ndarray
    clips: np.ndarray
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Mistake:
    """A clip that a wrong class scores higher in than a right one."""

    clip: int  # index into the manifest
    path: str
    labels: tuple[str, ...]
    predicted: str  # the class that is not there with the highest score
    score: float
    missed: str  # the class that is there with the lowest score
    missed_score: float


@dataclass(frozen=True)
class FoundEvents:
    """Scores of sound events, and the settings by which they were found."""

    scores: EventScores
    settings: dict[str, EventSettings]
    settings_from: str  # "chosen on these clips", "defaults", or the file


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    scored: Scored
    scores: Scores
    intervals: Intervals | None
    mistakes: tuple[Mistake, ...]
    events: FoundEvents | None  # of a frame head, from strong labels
    notes: tuple[str, ...]


def labels_of_checkpoint(info: ClassifierInfo) -> Labels:
    """The classes as the data's labels are compared with them."""
    return Labels(info.task, info.classes, info.class_names)


def evaluate(
    classifier: Classifier,
    info: ClassifierInfo,
    manifest: Manifest,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    max_failed_share: float = 0.5,
    choose_events: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Scores every clip of ``manifest`` that has a label and judges the scores; intervals by ``resamples`` draws, 0 for
    none. Of a frame head also the events, where the labels say when they are: found by the settings that belong to the
    checkpoint, or with ``choose_events`` by those that suit these clips best.

    Raises ManifestError for labels that the checkpoint does not know, for several labels a clip where it knows one, and
    for a manifest without labels; TooManyFailures when more than ``max_failed_share`` of the clips cannot be read;
    ScoreError for a model that gives NaN.
    """
    if not 0.0 <= max_failed_share <= 1.0:
        raise ValueError(f"max_failed_share is {max_failed_share}; expected a share from 0 to 1")
    limits = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "resamples": (resamples, 0)}
    for name, (value, least_value) in limits.items():
        if value < least_value:
            raise ValueError(f"{name} is {value}; expected at least {least_value}")
    labels = labels_of_checkpoint(info)
    selected = labels.select(manifest)
    scored = score_clips(
        classifier,
        info,
        selected,
        batch_size=batch_size,
        num_workers=num_workers,
        max_failed_share=max_failed_share,
        progress=progress,
    )
    arguments = (scored.scores, scored.targets, info.task, info.classes)
    scores = scores_of(*arguments)
    intervals = bootstrap(*arguments, resamples=resamples, seed=seed, progress=progress) if resamples else None
    notes = _notes(scored, scores)
    events = None
    if info.head.kind == "frames" or choose_events:
        without = _without_events(info, selected)
        if without and choose_events:
            raise ValueError(f"the settings of events cannot be chosen: {without}")
        notes = (*notes, f"events are judged by clip only: {without}") if without else notes
        if not without:
            events = find_events(classifier, info, selected, choose=choose_events, progress=progress)
    return Evaluation(scored, scores, intervals, mistakes_of(scored, info.classes), events, notes)


def find_events(
    classifier: Classifier, info: ClassifierInfo, manifest: Manifest, *, choose: bool = False, progress: bool = False
) -> FoundEvents:
    """The scores of the events in the clips that have strong labels. Long clips are heard whole, in windows."""
    strong = [index for index, clip in enumerate(manifest.clips) if intervals_of(clip) is not None]
    heard = hear_clips(CATClassifier(classifier, info), manifest.take(np.array(strong)), progress=progress)
    if choose:
        settings, settings_from = choose_settings(heard), "chosen on these clips"
    else:
        settings, file = settings_of(info.path, info.classes)
        settings_from = "defaults" if file is None else str(file)
    return FoundEvents(evaluate_events(heard, settings), settings, settings_from)


def keep_settings(path: PathLike, manifest: Manifest, device: torch.device | str = "cpu") -> str:
    """Chooses the settings of events that suit these clips best and keeps them with the run of a fine-tuned checkpoint,
    where `cat-audio predict --events` finds them, unless there are some. Says what became of it."""
    classifier, info = load_classifier(path, device)
    file, without = home_of_settings(info.path), _without_events(info, manifest)
    if file.exists():
        return f"settings of events: {file}, as they were"
    if without:
        return f"no settings of events were chosen: {without}"
    events = find_events(classifier, info, manifest, choose=True)
    write_chosen(info.path, events.settings, manifest.source, events.scores)
    return f"settings of events: {file}, chosen on valid (event F1 {100 * events.scores.main:.1f} % there)"


def _without_events(info: ClassifierInfo, manifest: Manifest) -> str:
    """Why events cannot be scored; empty when they can."""
    if info.head.kind != "frames":
        return f"{info.path} has no frame head; it is of task {info.task!r}"
    if not any(intervals_of(clip) for clip in manifest.clips):
        return f'no clip of {manifest.name} says when its sounds are, in a field "events"'
    return EXTRA if importlib.util.find_spec("sed_eval") is None else ""


def score_clips(
    classifier: Classifier,
    info: ClassifierInfo,
    manifest: Manifest,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    max_failed_share: float = 1.0,
    progress: bool = False,
) -> Scored:
    """The scores of all clips of a manifest that `Labels.select` has chosen, on the classifier's device."""
    device = next(classifier.parameters()).device
    bar = Progress(len(manifest), label="evaluate", unit="clips", enabled=progress)
    batches = scoring_batches(
        manifest,
        labels_of_checkpoint(info),
        info.features,
        patch_size=info.model.patch_size,
        batch_size=batch_size,
        num_workers=num_workers,
        padding=info.padding,
        crop=_crop(info),
        waveforms=device.type == "cuda",
        warn=bar.say,
    )
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    failures: list[Failure] = []
    done = 0
    try:
        for batch in batches:
            scores_BC = _scores(classifier, info, batch.to(device))
            _check_finite(scores_BC, batch, manifest, info)
            if batch.targets is None:
                raise RuntimeError("a batch without targets; scoring_batches gives them where it is given labels")
            found.append((scores_BC, batch.targets.numpy() > 0.5, batch.clips.numpy()))
            failures += batch.failures
            _check_failures(failures, manifest, max_failed_share)
            done += len(batch.clips) + len(batch.failures)
            bar.advance(done)
    finally:
        bar.close()
    scores, targets, clips = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Scored(manifest, scores, targets, clips, tuple(failures))


def _crop(info: ClassifierInfo) -> str:
    """What of a longer clip is heard: as in the validation of the checkpoint's training."""
    crop = str(info.config.get("data", {}).get("crop", "start"))  # a published model has no configuration of its run
    return crop_to_score(crop)


@torch.no_grad()
def _scores(classifier: Classifier, info: ClassifierInfo, batch: Batch) -> np.ndarray:
    """(B, C) float64."""
    spec = batch.with_features(info.features).spec
    return classifier.probabilities(classifier(spec, rows=batch.rows).clip.double()).cpu().numpy()


def _check_finite(scores_BC: np.ndarray, batch: Batch, manifest: Manifest, info: ClassifierInfo) -> None:
    bad = np.flatnonzero(~np.isfinite(scores_BC).all(axis=1))
    if len(bad):
        raise ScoreError(
            f"{info.path} gives scores that are not finite, first for {manifest.path(int(batch.clips[bad[0]]))}; its "
            "weights are damaged, or its training has diverged: give another checkpoint"
        )


def _check_failures(failures: Sequence[Failure], manifest: Manifest, max_failed_share: float) -> None:
    if len(failures) > max_failed_share * len(manifest):
        raise TooManyFailures(
            f"{len(failures)} of {len(manifest)} clips of {manifest.name} could not be read, more than the allowed "
            f"share of {max_failed_share:g}; nothing was written. The first: {failures[0].path}: {failures[0].reason}"
        )


def mistakes_of(scored: Scored, classes: Sequence[str], most: int = MISTAKES) -> tuple[Mistake, ...]:
    """The clips in which a class that is not there exceeds one that is there by most, the worst first."""
    wrong = np.where(scored.targets, -np.inf, scored.scores)
    right = np.where(scored.targets, scored.scores, np.inf)
    higher, lower = wrong.argmax(axis=1), right.argmin(axis=1)
    rows = np.arange(len(wrong))
    with np.errstate(invalid="ignore"):
        excess = wrong[rows, higher] - right[rows, lower]  # -inf for a clip with no class, or with every one
    worst = [int(row) for row in np.argsort(-excess, kind="stable")[:most] if excess[row] > 0]
    return tuple(
        Mistake(
            int(scored.clips[row]),
            scored.manifest.clips[int(scored.clips[row])].path,
            tuple(classes[c] for c in np.flatnonzero(scored.targets[row])),
            classes[higher[row]],
            float(scored.scores[row, higher[row]]),
            classes[lower[row]],
            float(scored.scores[row, lower[row]]),
        )
        for row in worst
    )


def spectrograms(
    manifest: Manifest, info: ClassifierInfo, clips: Iterable[int], *, warn: Callable[[str], None] = say
) -> dict[int, np.ndarray]:
    """Clip -> (T, F), what the classifier hears of it; one that can no longer be read is not there."""
    indices = np.fromiter(clips, dtype=np.int64)
    if len(indices) == 0:
        return {}
    batches = scoring_batches(
        manifest.take(indices),
        None,
        info.features,
        patch_size=info.model.patch_size,
        batch_size=1,
        padding=info.padding,
        crop=_crop(info),
        warn=warn,
    )
    return {int(indices[int(batch.clips[0])]): batch.spec[0, 0].numpy() for batch in batches if batch.spec is not None}


def _notes(scored: Scored, scores: Scores) -> tuple[str, ...]:
    notes = list(scored.manifest.notes)
    if scored.failures:
        first = scored.failures[0]
        notes.append(
            f"WARNING: {len(scored.failures)} of {len(scored.manifest)} clips could not be read and are in no score; "
            f"the first: {first.path}: {first.reason}"
        )
    without = scores.left_out["mAP"]
    everywhere = [label for label in scores.left_out["AUC"] if label not in without]
    if without:
        notes.append(f"classes without a clip, in no mean over classes: {_some(without, scores)}")
    if everywhere and "AUC" in scores.metrics:
        notes.append(f"classes that every clip has, not in the mean AUC: {_some(everywhere, scores)}")
    return tuple(notes)


def _some(labels: Sequence[str], scores: Scores, most: int = 5) -> str:
    """``2 of 10 (a, b)``."""
    return f"{len(labels)} of {len(scores.classes)} ({', '.join(labels[:most])}{', ...' if len(labels) > most else ''})"
