"""Long audio in overlapping windows, fed in pieces of any size and held no longer than it is needed.

A window has as many rows of patches as the model was trained on. Of what a frame head says about a window only the
middle is taken: each row from the window that has heard ``lookahead`` rows behind it, and the last window of a file is
moved back so that it is whole. So a file's rows follow each other without a seam, and they do not depend on the pieces
in which the audio came.

For steps finer than a row a window is heard several times, each time a part of a row later (``shifts``).

Shapes: n samples, P patch, H rows of a window (P frames each), S shifts; a row of a file is one of S * H here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cat.data.features import FeatureConfig
from cat.model import rows_of


@dataclass(frozen=True)
class Plan:
    """Where the windows lie. ``rows``, ``hop`` and ``lookahead`` count rows of P frames.

    ``rows``: of a window. ``hop``: from one window to the next. ``lookahead``: what a row's window has heard behind
    the row, at least. ``shifts``: how often a window is heard, for steps of a row's part.
    """

    features: FeatureConfig
    patch_size: int
    rows: int
    hop: int
    lookahead: int
    shifts: int = 1

    def __post_init__(self) -> None:
        if not (self.rows >= 1 and self.hop >= 1 and self.lookahead >= 0 and self.hop + self.lookahead <= self.rows):
            raise ValueError(
                f"windows of {self._seconds(self.rows)} every {self._seconds(self.hop)} with "
                f"{self._seconds(self.lookahead)} of lookahead; expected hop and lookahead within the window together"
            )
        if self.shifts < 1 or self.row % self.shifts:
            raise ValueError(
                f"a row of {self._seconds(1)} cannot be divided by {self.shifts}; expected a divisor of its {self.row} "
                "samples, as 1, 2 or 4"
            )

    def _seconds(self, rows: int) -> str:
        return f"{rows * self.row / self.rate:g} s"

    @property
    def rate(self) -> int:
        return self.features.sample_rate

    @property
    def row(self) -> int:
        """Samples from one row of patches to the next."""
        return self.patch_size * self.features.frame_shift

    @property
    def samples(self) -> int:
        """Of a whole window."""
        return self.features.frame_length + (self.rows * self.patch_size - 1) * self.features.frame_shift

    @property
    def delay(self) -> int:
        """Samples by which the last shift begins later."""
        return self.row // self.shifts * (self.shifts - 1)

    @property
    def step(self) -> float:
        """Seconds from one row of a file to the next."""
        return self.row / self.shifts / self.rate

    def rows_in(self, samples: int) -> int:
        """Rows of patches that so many samples reach into; 0 below one frame."""
        frames = 1 + (samples - self.features.frame_length) // self.features.frame_shift
        return rows_of(frames, self.patch_size) if frames >= 1 else 0

    def total(self, samples: int) -> int:
        """Rows of a file of so many samples: those that hear something and begin before it ends; at least 1."""
        heard = sum(self.rows_in(samples - shift) for shift in self._shifts())
        step = self.row // self.shifts
        return max(1, min(heard, -((self.row - step - 2 * samples) // (2 * step))))

    def time(self, row: int) -> float:
        """Seconds at which a row of a file begins. One of several shifts stands for the middle of what it hears."""
        return row * self.step + (self.row / self.rate - self.step) / 2 if row else 0.0

    def _shifts(self) -> range:
        return range(0, self.delay + 1, self.row // self.shifts)


@dataclass(frozen=True)
class Window:
    """``waves``: what is heard, a waveform a shift; at a file's end the last shifts may hear nothing. ``start``: its
    first row of patches. Rows ``begin`` <= i < ``end`` of the file are taken from it, of ``shifts`` a row of patches.
    """

    waves: list[np.ndarray]
    start: int
    begin: int
    end: int
    shifts: int

    def span(self, plan: Plan) -> tuple[float, float]:
        """Seconds at which what is heard begins and ends."""
        first = self.start * plan.row
        return first / plan.rate, (first + len(self.waves[0])) / plan.rate

    def taken(self, rows_SHC: np.ndarray) -> np.ndarray:
        """(end - begin, C) of what the model says about the waveforms' rows."""
        _, H, C = rows_SHC.shape
        rows_HSC = np.zeros((H, self.shifts, C), rows_SHC.dtype)
        rows_HSC[:, : len(rows_SHC)] = rows_SHC.swapaxes(0, 1)
        first = self.start * self.shifts
        return rows_HSC.reshape(-1, C)[self.begin - first : self.end - first]


class Windower:
    """Cuts audio that comes in pieces into the windows of a `Plan`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.samples = 0  # heard so far
        self._start = self._begin = 0  # rows: of the next window, and of the file that are done
        self._origin = self._kept = 0  # the first sample that is held, and how many are
        self._held = np.empty(2 * (plan.samples + plan.delay + plan.hop * plan.row), np.float32)

    def feed(self, wave: np.ndarray) -> Iterator[Window]:
        """The windows that are whole with the next samples (n,). They are taken in as the windows are taken out."""
        plan, done = self.plan, 0
        while done < len(wave):
            if self._kept == len(self._held):
                self._forget()
            piece = wave[done : done + len(self._held) - self._kept]
            self._held[self._kept : self._kept + len(piece)] = piece
            self._kept += len(piece)
            self.samples += len(piece)
            done += len(piece)
            while self.samples >= self._start * plan.row + plan.samples + plan.delay:
                yield self._window(self._start)

    def finish(self) -> Iterator[Window]:
        """What is left when nothing follows."""
        total = self.plan.total(self.samples) if self.samples else 0
        last = max(0, -(-total // self.plan.shifts) - self.plan.rows)
        while self._begin < total:
            yield self._window(min(self._start, last), total if self._start >= last else None)

    def _window(self, start: int, end: int | None = None) -> Window:
        plan = self.plan
        end = (start + plan.rows - plan.lookahead) * plan.shifts if end is None else end
        first = start * plan.row - self._origin
        waves: list[np.ndarray] = []
        for shift in plan._shifts():
            wave = self._held[first + shift : min(first + shift + plan.samples, self._kept)]
            if not waves or plan.rows_in(len(wave)):
                waves.append(wave.copy())
        window = Window(waves, start, self._begin, end, plan.shifts)
        self._begin = end
        self._start += plan.hop
        return window

    def _forget(self) -> None:
        """Samples before the last whole window: the file may end here, and its last window then begins behind it."""
        first = max(0, self._start - self.plan.hop) * self.plan.row - self._origin
        self._held[: self._kept - first] = self._held[first : self._kept]
        self._origin += first
        self._kept -= first
