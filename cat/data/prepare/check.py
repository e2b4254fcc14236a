"""One file: whether it can be used, and what is measured of it on the way."""

# Shapes: n clips, T frames, F mel bins.

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cat.data.audio import AudioError, Source, read_windows
from cat.data.batch import one_thread
from cat.data.containers import Unusable
from cat.data.features import FeatureConfig, frames_in, log_mel
from cat.data.prepare.convert import FORMATS, as_int16, written

_READ_SECONDS = 300  # of a file at once

# What is known of a file that can be used. ``content``: 128 bits of the SHA-256 of its samples as 16 bits.
RECORD = np.dtype(
    [
        ("samples", "<i8"),  # of the file, at its own rate
        ("rate", "<i8"),  # Hz
        ("heard", "<i8"),  # samples at the features' rate
        ("peak", "<f8"),  # half of the distance from the least sample to the greatest
        ("clipped", "<i8"),  # samples that 16 bits cannot hold
        ("frames", "<i8"),
        ("sum", "<f8"),  # of the log-mel values of all frames
        ("squares", "<f8"),  # of their squares
        ("content", "<u8", (2,)),
        ("bytes", "<i8"),  # of the file that was written
    ]
)


@dataclass(frozen=True)
class PrepareConfig:
    """When a file can be used, how it is measured, and whether it is written anew.

    ``features``: what training will use; ``mean`` and ``std``, which are to be found, do not matter.
    """

    features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
    min_seconds: float = 0.0  # of a file; one frame in any case
    silence_db: float = -80.0  # full scale is 0; files whose greatest sample is below are silent
    convert: str | None = None  # "wav" or "flac": mono, 16 bits, at the features' rate
    drop_duplicates: bool = False  # of files that sound alike, sample by sample, keep the first

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", dataclasses.replace(self.features, mean=0.0, std=0.5))  # x is x then
        if not 0 <= self.min_seconds < math.inf:
            raise ValueError(f"min_seconds is {self.min_seconds}; expected 0 or more")
        if not self.silence_db <= 0:
            raise ValueError(f"silence_db is {self.silence_db}; expected 0 or less, in dB of full scale; -inf for none")
        if self.convert is not None and self.convert not in FORMATS:
            raise ValueError(f"convert is {self.convert!r}; expected one of {', '.join(FORMATS)}")

    @property
    def min_samples(self) -> int:
        return max(self.features.frame_length, math.ceil(self.min_seconds * self.features.sample_rate))


def check_file(path: Source, config: PrepareConfig, target: Path | None = None) -> np.ndarray:
    """The RECORD of a file that can be used; with ``target`` it is written there too.

    Raises: `AudioError` for one that cannot be used, OSError when it cannot be written. ``target`` is not there then.
    """
    rate = config.features.sample_rate
    record = np.zeros((), RECORD)

    def opened(samples: int, sample_rate: int) -> None:
        record["samples"], record["rate"] = samples, sample_rate

    digest, low, high = hashlib.sha256(), math.inf, -math.inf
    try:
        with written(target, rate) as writer:
            windows = read_windows(path, rate, _READ_SECONDS * rate, min_samples=config.min_samples, opened=opened)
            for wave in windows:
                low, high = min(low, float(wave.min())), max(high, float(wave.max()))
                samples, over = as_int16(wave)
                digest.update(samples.tobytes())
                if writer is not None:
                    writer.write(samples)
                    wave = samples
                    record["clipped"] += over
                record["heard"] += len(wave)
                _measure(wave, config.features, record)
            record["peak"] = (high - low) / 2
            _check_sound(float(record["peak"]), config.silence_db)
    except Unusable as error:
        raise AudioError(path, str(error)) from None
    record["content"] = np.frombuffer(digest.digest()[:16], "<u8")
    record["bytes"] = 0 if target is None else target.stat().st_size
    return record


def _check_sound(peak: float, silence_db: float) -> None:
    loudness = 20 * math.log10(peak) if peak > 0 else -math.inf
    if loudness < silence_db:
        raise Unusable(f"silent: its peak is {loudness:.1f} dB of full scale, at least {silence_db:g} are needed")


@torch.no_grad()
def _measure(wave: np.ndarray, features: FeatureConfig, record: np.ndarray) -> None:
    """Adds the log-mel values of a waveform, in pieces that training could hear at once: each less its own mean."""
    for piece in _pieces(wave, features):
        samples = torch.from_numpy(piece)
        frames = int(frames_in(features, torch.tensor(len(piece))))
        with one_thread():
            spec_TF = log_mel(samples, dataclasses.replace(features, frames=frames))[0, 0].double().numpy()
        record["frames"] += frames
        record["sum"] += spec_TF.sum()
        record["squares"] += np.square(spec_TF).sum()


def _pieces(wave: np.ndarray, features: FeatureConfig) -> Iterator[np.ndarray]:
    """Equally long, none longer than ``features.samples`` nor shorter than a frame."""
    count = max(1, min(-(-len(wave) // features.samples), len(wave) // features.frame_length))
    for number in range(count):
        yield wave[len(wave) * number // count : len(wave) * (number + 1) // count]


def statistics(records: np.ndarray, features: FeatureConfig) -> tuple[float, float, float]:
    """Mean and standard deviation of the log-mel values of files (n,), and of how many frames: those that an epoch
    hears, in which a file counts ``features.frames`` frames at the most, wherever it is cut."""
    share = np.minimum(1.0, features.frames / np.maximum(records["frames"], 1))
    heard = math.fsum(share * records["frames"])
    values = heard * features.mel_bins
    mean = math.fsum(share * records["sum"]) / values
    variance = math.fsum(share * records["squares"]) / values - mean**2
    return mean, math.sqrt(max(variance, 0.0)), heard
