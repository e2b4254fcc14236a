"""The clips of a manifest as encoders get them: read by workers, in batches of bounded size, long ones in windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError, read_audio, read_windows
from cat.data.manifest import Manifest
from cat.data.partial import stamp
from cat.data.workers import prefetched
from cat.encoders.frozen import WINDOW_SECONDS
from cat.progress import track

BATCH_SECONDS = 600  # of audio that go through an encoder at once, padding counted


@dataclass(frozen=True)
class Skipped:
    """A clip that got no embedding, and why."""

    index: int  # place in the manifest
    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Clips to embed at once: their places in the manifest and waveforms (n,); a single place without a waveform is a
    long clip's, to be read by `read_long`. ``skipped``: those that could not be read. ``stamps``: of the files of all
    of them in order (`cat.data.partial.stamp`), taken before they were read."""

    indices: list[int] = field(default_factory=list)
    waves: list[Tensor] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)


def batches(
    manifest: Manifest,
    places: range,
    *,
    label: str,
    sample_rate: int,
    min_samples: int,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> Iterator[Batch]:
    """The clips at ``places`` in order, float32 at ``sample_rate``, `batch_size` places a batch or fewer."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    # Clip by clip, so that a worker holds one at a time and only a few are on their way.
    waveforms = _Waveforms(manifest, sample_rate, min_samples)
    clips = prefetched(waveforms, places, num_workers=num_workers)
    clips = track(clips, len(places), label=label, unit="clips", enabled=progress)
    return collected(clips, batch_size, BATCH_SECONDS * sample_rate)


def at_once() -> dict[str, int]:
    """Seconds of audio that an encoder gets at once, which decide where a long clip is cut."""
    return {"of_a_clip": WINDOW_SECONDS, "of_a_batch": BATCH_SECONDS}


def read_long(manifest: Manifest, index: int, sample_rate: int) -> Iterator[np.ndarray]:
    """A long clip, in windows of equal length."""
    return read_windows(manifest.audio(index), sample_rate, WINDOW_SECONDS * sample_rate)


class Long:
    """In place of a clip that goes through the encoder in windows."""


Clip = tuple[int, Tensor | Long | Skipped, str]  # its place, what it is, and its stamp


class _Waveforms:
    def __init__(self, manifest: Manifest, sample_rate: int, min_samples: int) -> None:
        self.manifest, self.sample_rate, self.min_samples = manifest, sample_rate, min_samples
        self.window = WINDOW_SECONDS * sample_rate

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Clip:
        path = self.manifest.audio(index)
        found = stamp(path)
        try:
            most = self.window + 1
            samples = read_audio(path, self.sample_rate, max_samples=most, min_samples=self.min_samples)
        except AudioError as error:
            return index, Skipped(index, error.path, error.reason), found
        return index, Long() if len(samples) > self.window else torch.from_numpy(samples), found


def collected(clips: Iterable[Clip], batch_size: int, most_samples: int) -> Iterator[Batch]:
    """`batch_size` places of the manifest at a time, or fewer, so that padded to the longest of them they have no more
    than `most_samples`: beside a long clip short ones would take as much memory as it does. A clip that comes in
    windows has a batch to itself."""
    batch = Batch()
    for place, (index, wave, found) in enumerate(clips, start=1):
        if isinstance(wave, Skipped):
            batch.skipped.append(wave)
            batch.stamps.append(found)
        elif isinstance(wave, Long):
            if batch.indices:
                yield batch
                batch = Batch()
            yield Batch([index], [], batch.skipped, [*batch.stamps, found])
            batch = Batch()
        else:
            longest = max(len(wave), *(len(other) for other in batch.waves), 0)
            if batch.waves and (len(batch.waves) + 1) * longest > most_samples:
                yield batch
                batch = Batch()
            batch.indices.append(index)
            batch.waves.append(wave)
            batch.stamps.append(found)
        if place % batch_size == 0:
            yield batch
            batch = Batch()
    if batch.indices or batch.skipped:
        yield batch
