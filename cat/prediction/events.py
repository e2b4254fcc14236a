"""Sound events out of the scores of a file's rows: where each begins and ends.

Per class: a median filter over the rows; an event lies where the score stays at ``low`` or above and reaches
``threshold``; events of one class with no more than ``gap`` seconds between them are one; those shorter than
``shortest`` are dropped. `EventFinder` does it while the rows come, and holds no more than the open events.

Shapes: R rows of a file (`cat.prediction.windows`), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cat.config import from_mapping
from cat.files import write_json
from cat.outputs import json_of

FORMAT = "cat-audio events"
FILE = "events.json"  # in the directory of a run: the settings chosen on its validation split


@dataclass(frozen=True)
class EventSettings:
    """How the events of one class are found. ``median``: rows of patches in the filter, odd; 1: none. ``low``: None is
    ``threshold`` (no hysteresis). ``gap`` and ``shortest`` in seconds."""

    threshold: float = 0.5
    low: float | None = None
    median: int = 1
    gap: float = 0.0
    shortest: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or not 0 < self.lowest <= self.threshold:
            raise ValueError(f"threshold is {self.threshold} and low is {self.low}; expected 0 < low <= threshold <= 1")
        if self.median < 1 or self.median % 2 == 0:
            raise ValueError(f"median is {self.median}; expected an odd number of rows, 1 for no filter")
        if not (0 <= self.gap < float("inf") and 0 <= self.shortest < float("inf")):
            raise ValueError(f"gap is {self.gap} and shortest is {self.shortest}; expected seconds, 0 or more")

    @property
    def lowest(self) -> float:
        return self.threshold if self.low is None else self.low


@dataclass(frozen=True)
class Event:
    """``onset``, ``offset``: seconds; ``offset`` is None while it is open. ``score``: the highest of its rows so far.
    ``number``: of this file's events, in the order in which they became certain."""

    label: str
    onset: float
    offset: float | None
    score: float
    number: int


def find_events(
    scores_RC: np.ndarray,
    classes: Sequence[str],
    settings: Mapping[str, EventSettings],
    timing: Timing,
    duration: float,
) -> list[Event]:
    """The events of a whole file of ``duration`` seconds, by onset."""
    finder = EventFinder(classes, settings, timing)
    return ended([*finder.feed(scores_RC), *finder.finish(duration)])


def ended(events: Iterable[Event]) -> list[Event]:
    """Those that have ended, by onset."""
    return sorted(
        (event for event in events if event.offset is not None),
        key=lambda event: (event.onset, event.offset, event.label),
    )


class Timing(Protocol):
    """When rows begin: a `Plan`, or another that has no windows."""

    @property
    def step(self) -> float:
        """Seconds from row to row."""

    @property
    def shifts(self) -> int:
        """Rows to a row of patches."""

    def time(self, row: int) -> float:
        """Seconds at which a row begins."""


class EventFinder:
    """Finds events in rows that come piece by piece: each is given once when its onset is certain (``offset`` None) and
    once when it has ended. What it gives, and in which order, does not depend on the pieces."""

    def __init__(self, classes: Sequence[str], settings: Mapping[str, EventSettings], timing: Timing) -> None:
        if missing := [label for label in classes if label not in settings]:
            raise ValueError(f"no event settings for {', '.join(missing)}; expected settings for every class")
        chosen = [settings[label] for label in classes]
        self._timing, self._found = timing, 0
        self._classes = [_Class(c, label, chosen[c], timing.step) for c, label in enumerate(classes)]
        widths = [(one.median - 1) * timing.shifts + 1 for one in chosen]  # as long, whatever the step
        self._filters = [
            _Median(width, [c for c, other in enumerate(widths) if other == width]) for width in sorted(set(widths))
        ]

    def feed(self, scores_RC: np.ndarray) -> list[Event]:
        """What becomes certain, and what ends, with the next rows."""
        said = [say for one in self._filters for say in self._follow(one, one.feed(scores_RC))]
        return self._told(said)

    def finish(self, duration: float) -> list[Event]:
        """The same with the end of the file, after ``duration`` seconds."""
        said = [say for one in self._filters for say in self._follow(one, one.finish())]
        for one in self._filters:
            for c in one.columns:
                said += self._classes[c].finish(one.next, one.next + one.half)
        return self._told(said, duration)

    def _follow(self, one: _Median, rows_RK: np.ndarray) -> Iterator[_Said]:
        """The classes of one filter through its next rows; nearly all of them nearly always have nothing to say."""
        first, one.next = one.next, one.next + len(rows_RK)
        lows_K = np.array([self._classes[c].settings.lowest for c in one.columns])
        touched_K = np.greater_equal(rows_RK, lows_K).any(axis=0).tolist()
        for k, c in enumerate(one.columns):
            if touched_K[k] or self._classes[c].busy:
                for row, score in enumerate(rows_RK[:, k].tolist(), start=first):
                    yield from self._classes[c].step(row, score, row + one.half)

    def _told(self, said: list[_Said], duration: float = math.inf) -> list[Event]:
        events = []
        for one in sorted(said, key=lambda one: (one.heard, one.column, one.end is not None)):
            if one.end is None:
                self._found += 1
                one.run.number = self._found
            offset = None
            if one.end is not None:
                at_end = duration < math.inf and one.end == one.last
                offset = duration if at_end else min(self._timing.time(one.end), duration)
            events.append(Event(one.label, self._timing.time(one.run.start), offset, one.peak, one.run.number))
        return events


@dataclass
class _Run:
    """Rows of a class that belong together. ``sure``: the threshold was reached; ``number``: 0 until it is certain."""

    start: int
    peak: float
    sure: bool = False
    number: int = 0
    told: bool = False


@dataclass(frozen=True)
class _Said:
    """That a run is an event (``end`` None), or that it has ended. ``heard``: the row with which this is known."""

    heard: int
    column: int
    label: str
    run: _Run
    peak: float
    end: int | None = None
    last: int | None = None  # where the file ends


class _Class:
    """The open events of one class: the run of rows at ``low`` or above that goes on, and the one before it while the
    gap between them may still close."""

    def __init__(self, column: int, label: str, settings: EventSettings, step: float) -> None:
        self.column, self.label, self.settings = column, label, settings
        self._gap = math.floor(settings.gap / step + 1e-6)  # rows, whatever the rounding of seconds
        self._shortest = math.ceil(settings.shortest / step - 1e-6)
        self._run: _Run | None = None
        self._before: tuple[_Run, int] | None = None  # with its end

    @property
    def busy(self) -> bool:
        return self._run is not None or self._before is not None

    def step(self, row: int, score: float, heard: int) -> Iterator[_Said]:
        if score >= self.settings.lowest:
            run = self._run = self._run or _Run(row, score)
            run.peak = max(run.peak, score)
            if score >= self.settings.threshold and not run.sure:
                run = self._run = self._joined(run)
            if run.sure and not run.told and row + 1 - run.start >= self._shortest:
                run.told = True
                yield _Said(heard, self.column, self.label, run, run.peak)
            return
        self._close(row)
        if self._before is not None and row + 1 - self._before[1] > self._gap:
            yield from self._end(heard)

    def finish(self, rows: int, heard: int) -> Iterator[_Said]:
        self._close(rows)
        yield from self._end(heard, rows)

    def _joined(self, run: _Run) -> _Run:
        """The run that has reached the threshold, with the one before it."""
        run.sure = True
        if self._before is None:
            return run
        before, self._before = self._before[0], None
        before.peak = max(before.peak, run.peak)
        return before

    def _close(self, row: int) -> None:
        if self._run is not None and self._run.sure:
            self._before = (self._run, row)
        self._run = None

    def _end(self, heard: int, last: int | None = None) -> Iterator[_Said]:
        if self._before is not None and self._before[0].told:
            run, end = self._before
            yield _Said(heard, self.column, self.label, run, run.peak, end, last)
        self._before = None


class _Median:
    """A median filter over the rows of some columns, as they come; the first and the last row go on beyond the ends."""

    def __init__(self, width: int, columns: list[int]) -> None:
        self.half, self.columns, self.next = width // 2, columns, 0
        self._width = width
        self._held_RK: np.ndarray | None = None

    def feed(self, scores_RC: np.ndarray) -> np.ndarray:
        return self._filtered(scores_RC[:, self.columns])

    def finish(self) -> np.ndarray:
        if self._held_RK is None:
            return np.empty((0, len(self.columns)))
        return self._filtered(self._held_RK[-1:].repeat(self.half, axis=0))

    def _filtered(self, rows_RK: np.ndarray) -> np.ndarray:
        if self._width == 1 or not len(rows_RK):
            return rows_RK
        if self._held_RK is None:
            self._held_RK = rows_RK[:1].repeat(self.half, axis=0)
        held_RK = np.concatenate([self._held_RK, rows_RK])
        self._held_RK = held_RK[max(0, len(held_RK) - self._width + 1) :]
        if len(held_RK) < self._width:
            return held_RK[:0]
        return np.median(np.lib.stride_tricks.sliding_window_view(held_RK, self._width, axis=0), axis=-1)


# ---------------------------------------------------------------- settings on disk


def write_settings(path: Path, settings: Mapping[str, EventSettings], chosen: Mapping[str, Any]) -> None:
    """Writes events.json; ``chosen`` says how the settings were chosen."""
    classes = {label: asdict(one) for label, one in settings.items()}
    write_json(path, {"format": FORMAT, "version": 1, "chosen": dict(chosen), "classes": classes})


def read_settings(path: Path, classes: Sequence[str]) -> dict[str, EventSettings]:
    """The settings of every class in an events.json. Raises ValueError that says what is wrong with the file."""
    try:
        content = json_of(path, format=str, version=int, classes=dict)
        if content["format"] != FORMAT or content["version"] != 1:
            raise ValueError(f"format {content['format']!r} version {content['version']}; expected {FORMAT!r} 1")
        settings = {
            label: from_mapping(EventSettings, one, source=f"{path}: {label}")
            for label, one in content["classes"].items()
        }
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} has no usable event settings ({error}); choose them again with cat-audio evaluate, or remove it"
        ) from None
    if missing := [label for label in classes if label not in settings]:
        raise ValueError(
            f"{path} has no settings for {', '.join(missing)}: it belongs to a model of other classes; choose them "
            "again, or remove it"
        )
    return {label: settings[label] for label in classes}


def is_settings(path: Path) -> bool:
    """Whether a file is what `write_settings` writes."""
    return json_of(path, format=str, classes=dict)["format"] == FORMAT


def home_of_settings(checkpoint: Path) -> Path:
    """Where the settings of a checkpoint's file belong: events.json in the directory of its run, or beside the file."""
    return run_of(checkpoint) / FILE


def settings_of(checkpoint: Path, classes: Sequence[str]) -> tuple[dict[str, EventSettings], Path | None]:
    """The settings that belong to a checkpoint's file, and where they were read; where there are none, the defaults."""
    file = home_of_settings(checkpoint)
    if not file.is_file():
        return {label: EventSettings() for label in classes}, None
    return read_settings(file, classes), file


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that a checkpoint's file belongs to, or the folder of a file that is alone."""
    file = checkpoint if len(checkpoint.parents) > 2 else checkpoint.absolute()
    return file.parents[2] if file.parent.parent.name == "checkpoints" else checkpoint.parent
