"""Audio files that are written anew: mono, 16 bits, at one sample rate."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from cat.data.containers import Unusable
from cat.data.decoding import import_library
from cat.data.manifest import Manifest

FORMATS = ("wav", "flac")
_MOST_BYTES = {"wav": (1 << 32) - 1024, "flac": 1 << 62}  # of samples


def as_int16(wave: np.ndarray) -> tuple[np.ndarray, int]:
    """Samples in [-1, 1] as 16 bits, rounded, and how many were beyond. What 16 bits were before comes back exactly."""
    scaled = np.rint(wave * np.float32(32768))
    over = int(np.count_nonzero((scaled > 32767) | (scaled < -32768)))
    return scaled.clip(-32768, 32767).astype(np.int16), over


class Names:
    """Where the file of each clip goes, below the folder of all: the path of the source in the manifest's folder, or,
    where the manifest leads out of it, in the folder that all lie in; with another suffix. Two sources whose names
    would then be one, in capitals or not, get a part of the SHA-256 of their paths too."""

    def __init__(self, manifest: Manifest, suffix: str) -> None:
        self._paths, self._suffix, self._base = manifest.columns.paths, suffix, ""
        if any(path.startswith("/") or ".." in path.split("/") for path in self._paths):
            self._paths_are_real = True
            self._root = os.path.abspath(manifest.root)
            self._base = os.path.commonpath({os.path.dirname(self._real(path)) for path in self._paths})
        else:
            self._paths_are_real = False
        self._shared = self._find_shared()

    def __getitem__(self, place: int) -> str:
        source = self._source(place)
        name = self._plain(source)
        if _number(name.casefold()) in self._shared:
            name = str(PurePosixPath(name).with_suffix("")) + f"~{_hash(source).hex()[:12]}{self._suffix}"
        return name

    def _real(self, path: str) -> str:
        return os.path.normpath(os.path.join(self._root, path))

    def _source(self, place: int) -> str:
        path = self._paths[place]
        return os.path.relpath(self._real(path), self._base) if self._paths_are_real else os.path.normpath(path)

    def _plain(self, source: str) -> str:
        stem, suffix = os.path.splitext(source)
        return (stem if suffix else source) + self._suffix

    def _find_shared(self) -> frozenset[int]:
        """The names that more than one source would have, as numbers: the names themselves would be large."""
        pairs = np.empty((len(self._paths), 2), dtype=np.uint64)
        for place in range(len(self._paths)):
            source = self._source(place)
            pairs[place] = _number(self._plain(source).casefold()), _number(source)
        names, counts = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
        return frozenset(names[counts > 1].tolist())


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _number(text: str) -> int:
    return int.from_bytes(_hash(text)[:8], "little")


class Writer:
    """An audio file that is being written, block by block."""

    def __init__(self, path: Path, sample_rate: int) -> None:
        self._path, self._left = path, _MOST_BYTES[path.suffix[1:]]
        self._sink = _Sink(path)
        soundfile, form = import_library("soundfile"), path.suffix[1:].upper()
        self._file = soundfile.SoundFile(self._sink, "w", sample_rate, 1, "PCM_16", format=form)

    def write(self, samples: np.ndarray) -> None:
        """(n,) int16. Raises: OSError that names the file; `Unusable` for more than the format can hold."""
        self._left -= samples.nbytes
        if self._left < 0:
            raise Unusable("too long for a WAV file, which holds 4 GB: convert to flac")
        self._file.write(samples)
        self._check()

    def close(self) -> None:
        self._file.close()
        self._sink.close()
        self._check()

    def _check(self) -> None:
        error = self._sink.error
        if error is not None:
            raise OSError(error.errno, error.strerror, str(self._path))


class _Sink(io.FileIO):
    """A file for libsndfile, which has no words for what goes wrong: it is kept in ``error``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:  # type: ignore[override]
        view = memoryview(content)
        try:
            while view and self.error is None:
                view = view[super().write(view) :]
        except OSError as error:
            self.error = error
        return len(content)


@contextlib.contextmanager
def written(path: Path | None, sample_rate: int) -> Iterator[Writer | None]:
    """A `Writer`; the file is removed again when something is raised. None for no path."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, sample_rate)
    try:
        yield writer
        writer.close()
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()
        path.unlink(missing_ok=True)
        raise
