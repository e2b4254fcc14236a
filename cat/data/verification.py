"""Whether rows of embeddings are those that were written, and the clips those that they were made of: what can be told
within seconds, before a run of days."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cat.data.containers import Unusable
from cat.data.manifest import Manifest
from cat.data.shards.members import Member

PIECE = 4096  # rows that have a SHA-256 of their own
_MOST_BYTES = 2 << 30  # of rows that are read: a second or two; of more, pieces spread evenly
_CLIPS = 256  # clips that are compared, spread evenly
_BYTES = 4096  # of a clip's beginning, middle and end


class PieceSums:
    """The SHA-256 of every `PIECE` rows of a float32 array that is written bit by bit."""

    def __init__(self, dim: int) -> None:
        self._size = PIECE * dim * 4
        self._sums: list[str] = []
        self._begin()

    def update(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            part = view[: self._left]
            self._digest.update(part)
            self._left -= len(part)
            view = view[len(part) :]
            if not self._left:
                self._sums.append(self._digest.hexdigest())
                self._begin()

    def all(self) -> list[str]:
        return self._sums if self._left == self._size else [*self._sums, self._digest.hexdigest()]

    def _begin(self) -> None:
        self._left, self._digest = self._size, hashlib.sha256()


def damaged_piece(rows: np.ndarray, sums: list[str]) -> range | None:
    """The first rows that are not those that were written, as far as they are read."""
    if len(sums) != -(-len(rows) // PIECE):
        return range(len(rows))
    some = max(2, _MOST_BYTES // (PIECE * rows.shape[1] * 4))
    for piece in np.unique(np.linspace(0, len(sums) - 1, min(len(sums), some)).astype(np.int64)).tolist():
        places = range(piece * PIECE, min((piece + 1) * PIECE, len(rows)))
        content = np.ascontiguousarray(rows[places.start : places.stop], dtype="<f4").tobytes()
        if hashlib.sha256(content).hexdigest() != sums[piece]:
            return places
    return None


def clip_samples(manifest: Manifest) -> dict[str, str]:
    """Of some clips their row, and what `changed_clip` compares; those that cannot be read are left out."""
    indices = np.unique(np.linspace(0, len(manifest) - 1, min(len(manifest), _CLIPS)).astype(np.int64))
    rows = manifest.rows
    found = {str(rows[index]): _sample(manifest.audio(index)) for index in indices.tolist()}
    return {row: sample for row, sample in found.items() if sample is not None}


def changed_clip(manifest: Manifest, samples: dict[str, str]) -> Path | None:
    """The first of the clips whose file is another one now. One that cannot be read is not: it is skipped in training,
    and recorded."""
    rows = manifest.rows
    wanted = np.array([int(row) for row in samples], dtype=np.int64)
    for index in np.flatnonzero(np.isin(rows, wanted)).tolist():
        if _sample(manifest.audio(index)) not in (None, samples[str(rows[index])]):
            return manifest.path(index)
    return None


def _sample(path: Path | Member) -> str | None:
    """Size, and SHA-256 of three places. The same of a file and of its copy in a shard; of one that is not on this
    machine there is none, for it would have to be fetched."""
    try:
        if isinstance(path, Member):
            return _digest(path.size, path.bytes_at) if path.here else None
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            return None
        with open(path, "rb") as file:
            return _digest(about.st_size, functools.partial(os.pread, file.fileno()))
    except (OSError, ValueError, Unusable):
        return None


def _digest(size: int, bytes_at: Callable[[int, int], bytes]) -> str:
    digest = hashlib.sha256()
    for place in (0, size // 2, max(0, size - _BYTES)):
        digest.update(bytes_at(_BYTES, place))
    return f"{size} {digest.hexdigest()}"
