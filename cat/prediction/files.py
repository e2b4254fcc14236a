"""Predictions of many audio files, in bounded memory: short ones share a batch, long ones go through in windows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cat.data.audio import AudioError, Source, read_windows
from cat.prediction.classifier import Aggregate, CATClassifier, ClipScores, Heard, as_windows, best
from cat.prediction.events import Event, EventFinder, EventSettings, ended
from cat.prediction.windows import Plan, Window

BLOCK_SECONDS = 60  # of a file that are read at once


@dataclass(frozen=True)
class FileResult:
    """What was found in a file. ``scores`` of the clip and its windows, or ``events`` where these were asked for;
    ``rows`` (R, C) of a frame head where they were asked for. ``error`` says why there is nothing."""

    path: str
    seconds: float
    scores: ClipScores | None = None
    events: list[Event] | None = None
    rows: np.ndarray | None = None
    error: str | None = None

    def row(self, classifier: CATClassifier, top: int, windows: bool = False) -> dict[str, Any]:
        """As JSON has it: the ``top`` best classes, of each window too where ``windows`` are asked for."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        row: dict[str, Any] = {"path": self.path, "seconds": round(self.seconds, 3)}
        named = dict(zip(classifier.classes, classifier.names, strict=True))
        if self.events is not None:
            events = [event_row(event, named) for event in self.events]
            return {**row, "events": events}

        def listed(scores_C: np.ndarray) -> list[dict[str, Any]]:
            return [
                {"label": label, "name": named[label], "score": round(score, 6)}
                for label, score in best(scores_C, classifier.classes, top)
            ]

        if self.scores is not None:
            row["scores"] = listed(self.scores.clip)
            if windows:
                row["windows"] = [
                    {"begin": round(begin, 3), "end": round(end, 3), "scores": listed(scores_C)}
                    for (begin, end), scores_C in zip(self.scores.times.tolist(), self.scores.windows, strict=True)
                ]
        return row


def event_row(event: Event, named: Mapping[str, str]) -> dict[str, Any]:
    """As JSON has it; an event that is still open has no offset."""
    times = {"onset": round(event.onset, 3)} | ({} if event.offset is None else {"offset": round(event.offset, 3)})
    return {**times, "label": event.label, "name": named[event.label], "score": round(event.score, 6)}


def require_frames(classifier: CATClassifier) -> None:
    """Raises ValueError for a classifier that cannot find events."""
    if not classifier.has_frames:
        raise ValueError(
            f"{classifier.info.path} says what is in a clip, not when: it has a head of kind "
            f"{classifier.info.head.kind!r}; events need one of kind 'frames', as cat-audio finetune task=events makes"
        )


def predict_files(
    classifier: CATClassifier,
    files: Iterable[Source],
    *,
    plan: Plan | None = None,
    events: Mapping[str, EventSettings] | None = None,
    rows: bool = False,
    aggregate: Aggregate = "auto",
    batch_size: int = 16,
) -> Iterator[FileResult]:
    """What is in each file, in order. With ``events``, the settings of every class, the events in it; with ``rows`` the
    scores of its rows.

    A file that cannot be read has an ``error`` in its result. Memory grows with a file's windows times classes (not
    with ``events``), not with its samples.
    """
    if events is not None or rows:
        require_frames(classifier)
    plan = plan or classifier.plan()
    begun: deque[_File] = deque()

    def windows() -> Iterator[tuple[_File, Window]]:
        for path in files:
            finder = None if events is None else EventFinder(classifier.classes, events, plan)
            begun.append(_File(path, os.fspath(path), finder, [] if rows else None))
            yield from _windows(begun[-1], plan)

    for (file, window), (clip_C, rows_RC) in classifier.hear(windows(), batch_size):
        file.take(window, plan, clip_C, rows_RC)
        while begun and begun[0].complete:
            yield begun.popleft().result(classifier, plan, aggregate)
    while begun:
        yield begun.popleft().result(classifier, plan, aggregate)


def _windows(file: _File, plan: Plan) -> Iterator[tuple[_File, Window]]:
    try:
        blocks = read_windows(file.source, plan.rate, BLOCK_SECONDS * plan.rate, min_samples=plan.features.frame_length)
        for window in as_windows(file.counted(blocks), plan):
            file.expected += 1
            yield file, window
    except AudioError as error:
        file.error = error.reason
    file.read = True


@dataclass
class _File:
    """One on its way: ``read`` to its end, and how many of its windows are heard."""

    source: Source
    path: str
    finder: EventFinder | None
    rows: list[np.ndarray] | None
    samples: int = 0
    read: bool = False
    expected: int = 0
    heard: int = 0
    error: str | None = None
    windows: list[Heard] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def counted(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.samples += len(block)
            yield block

    @property
    def complete(self) -> bool:
        return self.read and (self.heard == self.expected or self.error is not None)

    def take(self, window: Window, plan: Plan, clip_C: np.ndarray, rows_RC: np.ndarray | None) -> None:
        self.heard += 1
        if not np.isfinite(clip_C).all() or not (rows_RC is None or np.isfinite(rows_RC).all()):
            self.error = self.error or "the model gave scores that are not finite"
            return
        if rows_RC is not None and self.rows is not None:
            self.rows.append(rows_RC)
        if rows_RC is not None and self.finder is not None:
            self.events += ended(self.finder.feed(rows_RC))
        elif self.finder is None:
            self.windows.append((window.span(plan), clip_C))

    def result(self, classifier: CATClassifier, plan: Plan, aggregate: Aggregate) -> FileResult:
        seconds = self.samples / plan.rate
        if self.error is not None:
            return FileResult(self.path, seconds, error=self.error)
        rows_RC = None if self.rows is None else np.concatenate(self.rows)
        if self.finder is None:
            scores = classifier.gather(self.windows, aggregate)
            return FileResult(self.path, seconds, scores=scores, rows=rows_RC)
        events = ended([*self.events, *self.finder.finish(seconds)])
        return FileResult(self.path, seconds, events=events, rows=rows_RC)
