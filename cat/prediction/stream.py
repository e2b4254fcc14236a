"""Events in sound that goes on: a microphone through a pipe, or a file too long to wait for.

An event is told when its onset is certain and once more when it has ended, never again in between, however many windows
hear it. Memory is that of a window, whatever the length. What is told of a file is what `predict_files` finds in it
with the same plan, up to the rounding of batches of another size (equal with ``batch_size=1`` on the CPU).

Shapes: n samples, R rows of a file, C classes.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cat.data.decoding import import_library
from cat.prediction.classifier import CATClassifier
from cat.prediction.events import Event, EventFinder, EventSettings
from cat.prediction.windows import Plan, Window, Windower
from cat.signals import StopSignals

# Raw samples, as arecord and ffmpeg name them -> libsndfile's name and bytes.
PCM = {"u8": ("PCM_U8", 1), "s16": ("PCM_16", 2), "s24": ("PCM_24", 3), "s32": ("PCM_32", 4), "f32": ("FLOAT", 4)}
CHUNK = 1 << 16  # bytes read at once, if so many have come
_LONGEST_HEADER = 1 << 20
_NO_SIZE = 0x7FFF0000  # a WAV header written into a pipe says this or more, or 0


@dataclass(frozen=True)
class Clock:
    """When the rows begin that a clip head gives, one a window: each stands for the middle of what it heard."""

    step: float
    lead: float
    shifts: int = 1

    def time(self, row: int) -> float:
        return row * self.step + self.lead if row else 0.0


@dataclass
class Heard:
    """What went by. ``busy``: seconds of computing. ``late``, ``latest``: seconds from an onset until it was told, all
    together and the most; what was heard of it and the computing."""

    seconds: float = 0.0
    busy: float = 0.0
    events: int = 0
    late: float = 0.0
    latest: float = 0.0

    def summary(self) -> str:
        parts = [f"heard {self.seconds:.2f} s in {self.busy:.2f} s of computing"]
        if self.seconds:
            parts.append(f"real-time factor {self.busy / self.seconds:.3f}")
        parts.append(f"{self.events} events")
        if self.events:
            parts.append(
                f"told {self.late / self.events:.2f} s after their onset on average, {self.latest:.2f} s at most"
            )
        if self.busy > self.seconds > 0:
            parts.append("slower than the sound: a longer --hop takes less")
        return ", ".join(parts)


class EventStream:
    """Finds events while their sound comes in::

        stream = EventStream(classifier, settings, classifier.plan(live=True))
        for wave in pieces:  # (n,) float32 at the model's rate
            for event in stream.feed(wave):
                print(event)
        print(*stream.finish(), stream.heard.summary())

    A clip head has no rows; it tells the tags that its windows have, in steps of ``plan.hop``.
    """

    def __init__(self, classifier: CATClassifier, settings: Mapping[str, EventSettings], plan: Plan) -> None:
        self.heard = Heard()
        self._classifier, self._plan = classifier, plan
        self._windower = Windower(plan)
        row = plan.row / plan.rate
        clock = Clock(plan.hop * row, (plan.rows - plan.hop) * row / 2)
        self._finder = EventFinder(classifier.classes, settings, plan if classifier.has_frames else clock)
        self._next = 0  # row of patches at which a clip head's next window begins

    def feed(self, wave: np.ndarray) -> list[Event]:
        """What becomes certain, and what ends, with the next samples (n,)."""
        begun = time.perf_counter()
        found = [event for window in self._windower.feed(wave) for event in self._finder.feed(self._rows(window))]
        return self._told(found, begun)

    def finish(self) -> list[Event]:
        """The same with the end of the sound. One that is shorter than a frame has no events."""
        begun = time.perf_counter()
        plan = self._plan
        if self._windower.samples < plan.features.frame_length:
            return []
        found = [event for window in self._windower.finish() for event in self._finder.feed(self._rows(window))]
        found += self._finder.finish(self._windower.samples / plan.rate)
        return self._told(found, begun)

    def _rows(self, window: Window) -> np.ndarray:
        ((_, (clip_C, rows_RC)),) = self._classifier.hear([(None, window)], 1)
        if rows_RC is not None:
            return rows_RC
        # The last window of a file is moved back, and has no place among the others.
        whole, self._next = window.start == self._next, window.start + self._plan.hop
        return clip_C[None] if whole else np.empty((0, len(clip_C)), clip_C.dtype)

    def _told(self, events: list[Event], begun: float) -> list[Event]:
        busy = time.perf_counter() - begun
        heard = self.heard
        heard.seconds = self._windower.samples / self._plan.rate
        heard.busy += busy
        for event in events:
            if event.offset is None:
                late = heard.seconds - event.onset + busy
                heard.events, heard.late, heard.latest = heard.events + 1, heard.late + late, max(heard.latest, late)
        return events


# ---------------------------------------------------------------- samples out of a pipe


def arriving(descriptor: int, stop: StopSignals) -> Iterator[bytes]:
    """What can be read, as soon as it comes, until its end or a signal."""
    while data := stop.wait(lambda: os.read(descriptor, CHUNK)):
        yield data


class Samples:
    """Samples out of bytes that come in pieces of any size: raw ones, or a WAV file.

    Where ``sample_rate`` is None the bytes are a WAV file, and its header says what they are. Samples that are not
    finite are taken for silence, and counted in ``bad``; part of a sample at the end is left out.
    """

    def __init__(
        self, data: Iterator[bytes], sample_rate: int | None = None, *, pcm: str = "s16", channels: int = 1
    ) -> None:
        """Raises ValueError, for a header too, which is waited for."""
        self._data, self._left, self.bad = data, b"", 0
        self._end: int | None = None
        if sample_rate is None:
            self.sample_rate, self._channels, (self._subtype, self._bytes) = self._header()
            return
        if sample_rate < 1 or channels < 1 or pcm not in PCM:
            raise ValueError(
                f"raw samples of {sample_rate} Hz, {channels} channels, {pcm!r}; expected a rate, a number of channels "
                f"and one of {', '.join(PCM)}"
            )
        self.sample_rate, self._channels = sample_rate, channels
        self._subtype, self._bytes = PCM[pcm]
        self._fill(4)
        if self._left[:4] == b"RIFF":
            raise ValueError("the stream is a WAV file, which tells its own rate; leave --sample-rate out")

    def __iter__(self) -> Iterator[np.ndarray]:
        """(n,) float32: the mean of the channels."""
        size = self._bytes * self._channels
        while (self._end is None or self._end >= size) and self._fill(size):
            most = len(self._left) if self._end is None else min(len(self._left), self._end)
            part, self._left = self._left[: most // size * size], self._left[most // size * size :]
            if self._end is not None:
                self._end -= len(part)
            yield self._decoded(part)

    def _decoded(self, part: bytes) -> np.ndarray:
        wave, _ = import_library("soundfile").read(
            io.BytesIO(part),
            format="RAW",
            subtype=self._subtype,
            endian="LITTLE",
            samplerate=self.sample_rate,
            channels=self._channels,
            dtype="float32",
            always_2d=True,
        )
        wave = wave.mean(axis=1)
        finite = np.isfinite(wave)
        self.bad += len(wave) - int(np.count_nonzero(finite))
        return np.where(finite, wave, np.float32(0))

    def _fill(self, count: int) -> bool:
        """Whether there are so many bytes, which are waited for."""
        while len(self._left) < count:
            if not (data := next(self._data, b"")):
                return False
            self._left += data
        return True

    def _header(self) -> tuple[int, int, tuple[str, int]]:
        """Everything up to the samples, as libsndfile reads it."""
        if not self._fill(12) or self._left[:4] not in (b"RIFF", b"RF64") or self._left[8:12] != b"WAVE":
            raise ValueError(
                "the stream does not begin as a WAV file does; of raw samples say what they are: --sample-rate, and "
                "--pcm and --channels where they are not s16 and 1"
            )
        place = 12
        while self._fill(place + 8) and self._left[place : place + 4] != b"data":
            place += 8 + int.from_bytes(self._left[place + 4 : place + 8], "little")
            place += place % 2
            if place > _LONGEST_HEADER:
                raise ValueError(f"the stream is a WAV file without samples in its first {_LONGEST_HEADER} bytes")
        if self._left[place : place + 4] != b"data":
            raise ValueError("the stream is a WAV file that ends before its samples")
        size = int.from_bytes(self._left[place + 4 : place + 8], "little")
        header, self._left = self._left[:place] + b"data\0\0\0\0", self._left[place + 8 :]
        soundfile = import_library("soundfile")
        try:
            info = soundfile.info(io.BytesIO(header))
        except soundfile.SoundFileError as error:
            raise ValueError(f"the stream is a WAV file that cannot be read ({error})") from None
        known = {subtype: (subtype, size) for subtype, size in PCM.values()}
        if info.subtype not in known:
            raise ValueError(
                f"the stream is a WAV file of {info.subtype} samples; expected {', '.join(known)}: ffmpeg -i ... -c:a "
                "pcm_s16le -f wav - makes one"
            )
        self._end = size if 0 < size < _NO_SIZE else None
        return info.samplerate, info.channels, known[info.subtype]
