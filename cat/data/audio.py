"""Audio files to mono waveforms, reading no more of a file than is used."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import ModuleType

import numpy as np

# Read on each side of a crop, so that the resampler's filter has settled where the crop begins.
_MARGIN_SECONDS = 0.05
# Read before a crop of a lossy file. libsndfile's seek in MP3 gives silence until the bit reservoir is full (3,109
# samples measured), and in Ogg it misses the place within the last page, which can hold several seconds.
_LEAD_SECONDS = {"MP3": 10.0, "OGG": 10.0}


class AudioError(RuntimeError):
    """A file that gives no usable audio. ``path`` and ``reason`` go into the record of failures."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.reason)  # raised in a loader's worker, shown in the main process


def read_audio(
    path: str | os.PathLike[str],
    sample_rate: int,
    *,
    max_samples: int | None = None,
    start: float = 0.0,
    min_samples: int = 1,
    allow_int16: bool = False,
) -> np.ndarray:
    """The clip at ``sample_rate`` Hz as float32 (n,) in [-1, 1]: the channels' mean, then resampled.

    With ``max_samples`` a longer clip is cropped to that many samples, and only they are read. ``start`` in [0, 1] says
    where the crop begins, as a share of the positions there are: 0 the beginning, 0.5 the centre, 1 the end.

    With ``allow_int16`` a mono file of 16-bit samples at ``sample_rate`` comes as int16, as its samples are stored: the
    same clip times 2^15, at half the bytes.

    Raises AudioError, with the reason, for a file that is missing, unreadable, empty or cut off, has NaN or infinite
    samples, or has fewer than ``min_samples`` samples at ``sample_rate``.
    """
    if not 0.0 <= start <= 1.0:
        raise ValueError(f"start is {start}; it must lie in [0, 1]")
    soundfile = _import("soundfile")
    path = Path(path)
    if not path.is_file():
        raise AudioError(path, "is a folder, not a file" if path.is_dir() else "no such file")
    if path.stat().st_size == 0:
        raise AudioError(path, "empty: 0 bytes")
    try:
        with soundfile.SoundFile(path) as file:
            return _read_open(file, path, sample_rate, max_samples, start, min_samples, allow_int16)
    except (soundfile.SoundFileError, OSError) as error:
        reason = str(error).removeprefix(f"Error opening {str(path)!r}: ")
        if reason.startswith("File does not exist"):  # libsndfile's words for an .mp3 without MPEG audio in it
            reason = "Format not recognised."
        raise AudioError(path, f"cannot be read: {reason}") from None


def _read_open(
    file,
    path: Path,
    sample_rate: int,
    max_samples: int | None,
    start: float,
    min_samples: int,
    allow_int16: bool,
) -> np.ndarray:
    source_rate = file.samplerate
    if file.frames <= 0:
        raise AudioError(path, "empty: it has no samples")
    # floor: the resampler never gives fewer
    available = file.frames * sample_rate // source_rate
    if available < min_samples:
        raise AudioError(path, f"too short: {available} samples at {sample_rate} Hz, at least {min_samples} are needed")
    wanted = available if max_samples is None else min(max_samples, available)
    first = min(int(start * (available - wanted + 1)), available - wanted)

    # The source interval, from a sample that both rates have in common: resampling from there gives the very samples
    # that resampling the whole file would.
    common = math.gcd(source_rate, sample_rate)
    step = source_rate // common
    margin = 0 if source_rate == sample_rate else math.ceil(source_rate * _MARGIN_SECONDS)
    lead = max(margin, int(source_rate * _LEAD_SECONDS.get(file.format, 0.0)))
    begin = max(0, first * source_rate // sample_rate - lead) // step * step
    end = min(file.frames, -(-(first + wanted) * source_rate // sample_rate) + margin)
    if begin:
        file.seek(begin)
    as_stored = allow_int16 and file.subtype == "PCM_16" and file.channels == 1 and source_rate == sample_rate
    wave = file.read(end - begin, dtype="int16" if as_stored else "float32", always_2d=True)
    if len(wave) < end - begin:
        raise AudioError(path, f"cut off: {file.frames} samples announced, {begin + len(wave)} could be decoded")

    wave = wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]
    bad = 0 if as_stored else len(wave) - int(np.count_nonzero(np.isfinite(wave)))
    if bad:
        raise AudioError(path, f"{bad} of {len(wave)} samples are NaN or infinite")
    if source_rate != sample_rate:
        wave = _import("soxr").resample(wave, source_rate, sample_rate)
    offset = first - begin * sample_rate // source_rate
    return np.ascontiguousarray(wave[offset : offset + wanted])


def _import(name: str) -> ModuleType:
    try:
        return __import__(name)
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        raise ImportError(f"reading audio needs {name} ({error}); pip install 'cat-kernels[train]'") from error
