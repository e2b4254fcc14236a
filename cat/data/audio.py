"""Audio files to mono waveforms, reading no more of a file than is used."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cat.data.containers import Unusable, id3_end
from cat.data.content import Content, Stored, size_of
from cat.data.decoding import Sound, import_library
from cat.data.mpeg import Mp3, open_mp3

Source = str | os.PathLike[str] | Stored  # a file, or one in a shard

# Read on each side of a crop, so that the resampler's filter has settled where the crop begins: seconds, and samples
# at the lower rate, in which the filter is always as long.
_MARGIN_SECONDS, _MARGIN_SAMPLES = 0.05, 400
_MOST_RESAMPLING = 256  # times up or down; more is an absurd header, and memory without bound
# What the system, NumPy, soundfile (of raw files: TypeError) and the readers of headers raise about one file.
_ERRORS = (OSError, ValueError, TypeError, ArithmeticError, LookupError, MemoryError, AssertionError, struct.error)
_SYSTEM_REASONS = {
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ENAMETOOLONG: "its name is too long for a file",
    errno.ELOOP: "a link that leads back to itself",
}


class AudioError(RuntimeError):
    """A file that gives no usable audio. ``path`` and ``reason`` go into the record of failures."""

    def __init__(self, path: Source, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.reason)  # raised in a loader's worker, shown in the main process


def read_audio(
    path: Source,
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

    What counts is what is there. A header's count of samples is taken where the file can hold it, and a file that has
    less is cut off; one per cent is forgiven where writers are known to count wrongly (chunked containers such as WAV,
    and MP3). A file without a count (written into a pipe, FLAC of unknown length, MP3 without a Xing header), or with
    one that it cannot hold, is as long as it can be decoded; that may take decoding all of it once. Ogg announces
    nothing: cut off, it is a shorter file.

    Raises AudioError, with the reason, for a file that is missing, unreadable, empty or cut off, has NaN or infinite
    samples in the crop, or has fewer than ``min_samples`` samples at ``sample_rate``.
    """
    return read_crop(
        path, sample_rate, max_samples=max_samples, start=start, min_samples=min_samples, allow_int16=allow_int16
    )[0]


def read_crop(
    path: Source,
    sample_rate: int,
    *,
    max_samples: int | None = None,
    start: float = 0.0,
    min_samples: int = 1,
    allow_int16: bool = False,
) -> tuple[np.ndarray, int]:
    """What `read_audio` reads, and the sample of the clip that the crop begins at."""
    if not 0.0 <= start <= 1.0:
        raise ValueError(f"start is {start}; it must lie in [0, 1]")
    with _opened(path) as sound:
        available = _available(sound, sample_rate, min_samples)
        wanted = available if max_samples is None else min(max_samples, available)
        first = min(int(start * (available - wanted + 1)), available - wanted)
        return _cut(sound, sample_rate, first, wanted, allow_int16), first


def length_of(path: Source) -> tuple[int, int]:
    """Samples and sampling rate, as the file says. Raises as `read_audio`."""
    with _opened(path) as sound:
        return sound.length, sound.rate


def seconds_of(path: Source) -> float:
    """How long a file says it is. Raises as `read_audio`."""
    samples, rate = length_of(path)
    return samples / rate


def read_windows(
    path: Source,
    sample_rate: int,
    max_samples: int,
    *,
    min_samples: int = 1,
    opened: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """The whole clip of `read_audio`, in consecutive windows that are equally long (to a sample) and no longer than
    ``max_samples``: one after the other, so that memory does not grow with the clip. ``opened`` is told the file's own
    samples and sample rate before the first window. Raises as `read_audio`."""
    with _opened(path) as sound:
        if opened is not None:
            opened(sound.length, sound.rate)
        available = _available(sound, sample_rate, min_samples)
        count = -(-available // max_samples)
        edges = [available * number // count for number in range(count + 1)]
        for first, end in itertools.pairwise(edges):
            yield _cut(sound, sample_rate, first, end - first)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Mp3 | Sound]:
    """Whatever is wrong with the file is an AudioError."""
    soundfile = import_library("soundfile")
    path = source if isinstance(source, Stored) else Path(source)
    try:
        with _open(path) as file, contextlib.closing(_sound(file, path.suffix)) as sound:
            yield sound
    except (Unusable, soundfile.SoundFileError, *_ERRORS) as error:
        raise AudioError(path, _reason(path, error)) from error


def _open(path: Path | Stored) -> Content:
    """The file, without waiting for the other end of a pipe. Opened here, its name may be any bytes."""
    if isinstance(path, Stored):
        file: Content = path.content()
    else:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise Unusable("is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file")
        file = io.FileIO(path)
    if size_of(file) == 0:
        file.close()
        raise Unusable("empty: 0 bytes")
    return file


def _sound(file: Content, suffix: str) -> Mp3 | Sound:
    start = id3_end(file)
    return open_mp3(file, start, search=suffix.lower() == ".mp3") or Sound(file, start)


def _available(sound: Mp3 | Sound, sample_rate: int, min_samples: int) -> int:
    """Samples of the clip at ``sample_rate``."""
    if sound.length <= 0:
        raise Unusable("empty: it has no samples")
    if max(sound.rate, sample_rate) > _MOST_RESAMPLING * min(sound.rate, sample_rate):
        raise Unusable(f"sample rate {sound.rate} Hz: too far from {sample_rate} Hz to resample")
    available = sound.length * sample_rate // sound.rate  # floor: the resampler never gives fewer
    if available < min_samples:
        raise Unusable(f"too short: {available} samples at {sample_rate} Hz, at least {min_samples} are needed")
    return available


def _cut(sound: Mp3 | Sound, sample_rate: int, first: int, wanted: int, allow_int16: bool = False) -> np.ndarray:
    """``wanted`` samples from the ``first`` on, at ``sample_rate``."""
    source_rate = sound.rate
    # The source interval, from a sample that both rates have in common: resampling from there gives the very samples
    # that resampling the whole file would.
    step = source_rate // math.gcd(source_rate, sample_rate)
    settled = max(_MARGIN_SECONDS, _MARGIN_SAMPLES / min(source_rate, sample_rate))
    margin = 0 if source_rate == sample_rate else math.ceil(source_rate * settled)
    begin = max(0, first * source_rate // sample_rate - max(margin, sound.lead)) // step * step
    end = min(sound.length, -(-(first + wanted) * source_rate // sample_rate) + margin)
    as_stored = allow_int16 and sound.sixteen_bits and source_rate == sample_rate
    wave = sound.read(begin, end, "int16" if as_stored else "float32")

    bad = 0 if as_stored else len(wave) - int(np.count_nonzero(np.isfinite(wave)))
    if bad:
        raise Unusable(f"{bad} of {len(wave)} samples are NaN or infinite")
    if source_rate != sample_rate:
        try:
            wave = import_library("soxr").resample(wave, source_rate, sample_rate)
        except RuntimeError as error:
            raise Unusable(f"cannot be resampled from {source_rate} to {sample_rate} Hz: {error}") from error
    offset = first - begin * sample_rate // source_rate
    return np.ascontiguousarray(wave[offset : offset + wanted])


def _reason(path: Path | Stored, error: Exception) -> str:
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if isinstance(path, Stored):
            return "the shard is missing: no such file"
        return f"a link to a file that is missing, {path.readlink()}" if path.is_symlink() else "no such file"
    if isinstance(error, OSError) and error.errno:
        return _SYSTEM_REASONS.get(error.errno, f"cannot be read: {error.strerror}")
    if isinstance(error, UnicodeEncodeError):
        return "its name cannot be the name of a file here: it has characters that no encoding has"
    if isinstance(error, MemoryError):
        return "its samples do not fit into memory"
    text = re.sub(r"^Error opening [^:]*: ", "", str(error))
    if text.startswith(("Format not", "File does not exist")):  # the latter is libsndfile's word for MPEG without audio
        text = "Format not recognised. A headerless file must be made a WAV file first."
    return f"cannot be read: {text}"
