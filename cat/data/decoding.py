"""Samples of any file that libsndfile reads, also where it cannot seek or does not know the length."""

from __future__ import annotations

import io
from types import ModuleType
from typing import Any

import numpy as np

from cat.data.containers import Unusable, with_true_size
from cat.data.content import Content, size_of

# Samples that a byte can hold at the most: FLAC has 65,535 in eleven, Opus 5,760 in two, Vorbis 8,192 in two. A header
# that announces more does not know, or lies.
_DENSEST = 8192
# Read before a crop: libsndfile's seek in Ogg misses the place within the last page, which can hold several seconds.
_LEAD_SECONDS = {"OGG": 10.0}
_BLOCK = 1 << 22  # values decoded at a time, 16 MiB: memory is taken for what is there, not for what a header says


def import_library(name: str) -> ModuleType:
    """soundfile or soxr."""
    try:
        return __import__(name)
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        raise ImportError(f"reading audio needs {name} ({error}); pip install 'cat-kernels[train]'") from error


def open_decoder(file: io.IOBase | int) -> Any:
    """A soundfile.SoundFile that keeps ``file`` open."""
    decoder = import_library("soundfile").SoundFile(file, closefd=False)
    decoder.seekable = lambda: False  # or it seeks after every read to where it is, which not every codec can
    return decoder


def decode(decoder: Any, count: int, dtype: str = "float32") -> np.ndarray:
    """The mean of the channels over the next ``count`` samples, (count,); fewer where the file ends."""
    parts = [np.zeros(0, dtype)]
    block = max(1, _BLOCK // decoder.channels)
    while count > 0:
        part = _read(decoder, min(block, count), dtype)
        parts.append(part.mean(axis=1) if part.shape[1] > 1 else part[:, 0])
        if len(part) < min(block, count):
            break
        count -= len(part)
    return parts[1] if len(parts) == 2 else np.concatenate(parts)


def skip(decoder: Any, count: int) -> int:
    """Decodes up to ``count`` samples for nothing; how many there were."""
    block, done = max(1, _BLOCK // decoder.channels), 0
    while done < count:
        wanted = min(block, count - done)
        there = len(_read(decoder, wanted, "float32"))
        done += there
        if there < wanted:
            break
    return done


def _read(decoder: Any, count: int, dtype: str) -> np.ndarray:
    try:
        return decoder.read(count, dtype=dtype, always_2d=True)
    except import_library("soundfile").SoundFileError as error:
        raise Unusable(f"cannot be read: damaged or cut off ({error})") from error


class Sound:
    """A file of any format that libsndfile reads. ``length`` is in samples at ``rate``."""

    def __init__(self, file: Content, start: int) -> None:
        """``start`` is where the container begins, behind any ID3 tags."""
        self._file = with_true_size(file, start)
        self._plain = file.fileno() if isinstance(file, io.FileIO) and self._file is file else None
        self._decoder = self._open()
        self.rate, self.length = self._decoder.samplerate, self._decoder.frames
        self.sixteen_bits = self._decoder.subtype == "PCM_16" and self._decoder.channels == 1
        container = self._decoder.format
        self.lead = int(self.rate * _LEAD_SECONDS.get(container, 0.0))
        # "MP3" are also MPEG's layers I and II, whose length libmpg123 guesses.
        self._seeks = container != "MP3" and self.length <= _DENSEST * size_of(file)
        self._at = 0
        if not self._seeks:
            self.length = skip(self._decoder, self.length)
            self._decoder = self._open()
        elif container == "FLAC":  # only decoding its last sample (0.04 to 0.09 ms) tells whether it is there
            self._check_end()

    def read(self, begin: int, end: int, dtype: str = "float32") -> np.ndarray:
        """Samples begin <= i < end, the mean of the channels."""
        if begin != self._at and not self._seek(begin):
            self._decoder = self._open()
            begin = skip(self._decoder, begin)
        wave = decode(self._decoder, end - begin, dtype)
        if len(wave) < end - begin:
            raise Unusable(f"cut off: {self.length} samples announced, {begin + len(wave)} could be decoded")
        self._at = end
        return wave

    def close(self) -> None:
        self._decoder.close()

    def _check_end(self) -> None:
        self._at = self.length
        if self.length < 1 or (self._seek(self.length - 1) and len(_read(self._decoder, 1, "int16")) == 1):
            return
        self._decoder, self._at = self._open(), 0
        there = skip(self._decoder, self.length)
        if there < self.length:
            raise Unusable(f"cut off: {self.length} samples announced, {there} could be decoded")
        self._decoder, self._seeks = self._open(), False

    def _seek(self, begin: int) -> bool:
        """False where the codec has no seek (GSM 6.10, G.721, NMS ADPCM, ...) or the place is not there."""
        try:
            return self._seeks and self._decoder.seek(begin) == begin
        except import_library("soundfile").SoundFileError:
            return False

    def _open(self) -> Any:
        self._file.seek(0)
        return open_decoder(self._file if self._plain is None else self._plain)
