"""A clip in a shard: where its bytes lie, and how they are read."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cat.data.containers import Unusable
from cat.data.content import Stored

_OPEN = 64  # shards that a process keeps open
_DTYPES: dict[str, Any] = {"shard": "<i4", "offset": "<i8", "size": "<i8", "crc": "<u4"}


class Shard(Protocol):
    """A tar file, wherever it lies. ``str()`` is what messages call it."""

    keep: bool  # whether it may stay open: one in a cache takes room until it is closed

    def open(self) -> int:
        """A descriptor of its own. Raises: OSError; `Unusable` with a reason."""

    @property
    def here(self) -> bool:
        """Whether it can be opened without waiting for a network."""

    def forget(self) -> bool:
        """Drops what is kept of it, to get it anew; whether there was anything to drop."""


@dataclass(frozen=True)
class LocalShard:
    path: Path

    here = keep = True

    def open(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def __str__(self) -> str:
        return str(self.path)

    def forget(self) -> bool:
        return False


class Shards:
    """Shards in order, of which each process keeps some open."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = tuple(shards)
        self._opened: OrderedDict[int, _Opened] = OrderedDict()
        self._forgotten: set[int] = set()

    def __reduce__(self) -> tuple[type, tuple[tuple[Shard, ...]]]:
        return Shards, (self._shards,)

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    def __getitem__(self, number: int) -> Shard:
        return self._shards[number]

    def here(self, number: int) -> bool:
        return number in self._opened or self._shards[number].here

    @property
    def far(self) -> bool:
        """Whether some have to be fetched."""
        return any(not shard.keep for shard in self._shards)

    def forget(self, number: int) -> bool:
        """As `Shard.forget`, once a process: what is wrong twice is wrong where it comes from."""
        if number in self._forgotten:
            return False
        self._forgotten.add(number)
        return self._shards[number].forget()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Bytes of a shard, fewer where it ends. Raises: OSError; `Unusable`."""
        opened = self._opened.get(number)
        if opened is None:
            opened = _Opened(self._shards[number].open())
            if self._shards[number].keep:
                self._opened[number] = opened
                if len(self._opened) > _OPEN:
                    self._opened.popitem(last=False)
        else:
            self._opened.move_to_end(number)
        return _pread(opened.descriptor, size, offset)


class _Opened:
    """A descriptor, closed when nobody has it any more: another thread may be reading."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    while 0 < len(content) < size:  # Linux gives 2 GiB at the most, some network file systems less
        more = os.pread(descriptor, size - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


@dataclass(frozen=True)
class Member(Stored):
    """One clip: ``size`` bytes of an audio file at ``offset``, whose CRC-32 is ``crc``; ``name`` is the clip's path."""

    shards: Shards
    shard: int
    offset: int
    size: int
    crc: int
    name: str

    def __str__(self) -> str:
        return f"{self.shards[self.shard]}: {self.name}"

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def here(self) -> bool:
        """Whether it can be read without waiting for a network."""
        return self.shards.here(self.shard)

    @property
    def stamp(self) -> str:
        """Another one for other content, as far as the index tells."""
        return f"{self.size} {self.crc:08x}"

    def bytes_at(self, count: int, place: int) -> bytes:
        """Up to ``count`` of its bytes; they are not checked."""
        return self.shards.read(self.shard, max(0, min(count, self.size - place)), self.offset + place)

    def content(self) -> io.BytesIO:
        """Raises: `Unusable`, also for other bytes than were indexed; OSError."""
        content, wrong = self._read()
        if wrong and self.shards.forget(self.shard):
            content, wrong = self._read()
        if wrong:
            raise Unusable(f"{wrong}; copy it again")
        return io.BytesIO(content)

    def _read(self) -> tuple[bytes, str]:
        """Its bytes, and what is wrong with them."""
        content = self.shards.read(self.shard, self.size, self.offset)
        if len(content) < self.size:
            ends, needed = self.offset + len(content), self.offset + self.size
            return content, f"the shard is cut off, {ends} of the {needed} bytes that are needed are there"
        # 0.07 ms for ten seconds of 16-bit samples, where decoding takes 0.1 (WAV) to 2 (FLAC).
        crc = zlib.crc32(content)
        other = "the shard is damaged, or not the one that was indexed"
        return content, "" if crc == self.crc else f"{other}: the CRC-32 is {crc:08x}, in the index {self.crc:08x}"


class Members:
    """Where the clips of a manifest lie in shards, in a few arrays (n,): shard, offset, size, crc. A `Member` is made
    when one is asked for. A clip of shard -1 is a file of its own."""

    def __init__(self, shards: Shards, **columns: np.ndarray) -> None:
        self.shards = shards
        self.columns = {name: columns[name].astype(dtype, copy=False) for name, dtype in _DTYPES.items()}

    @classmethod
    def joined(cls, parts: Sequence[tuple[Members | None, int]]) -> Members | None:
        """Of data sets one after the other, each with its number of clips; None where all are files."""
        if all(members is None for members, _ in parts):
            return None
        shards: list[Shard] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _DTYPES}
        for members, count in parts:
            for name in _DTYPES:
                absent = np.full(count, -1 if name == "shard" else 0, dtype=np.int64)
                columns[name].append(absent if members is None else members.columns[name])
            if members is not None:
                numbers = columns["shard"][-1]
                columns["shard"][-1] = np.where(numbers < 0, numbers, numbers + len(shards))
                shards += members.shards
        return cls(Shards(shards), **{name: np.concatenate(arrays) for name, arrays in columns.items()})

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def take(self, indices: np.ndarray) -> Members:
        """Of these clips, in this order."""
        return Members(self.shards, **{name: column[indices] for name, column in self.columns.items()})

    def get(self, index: int, name: str) -> Member | None:
        """Of the clip with this number and path."""
        shard, offset, size, crc = (int(self.columns[column][index]) for column in _DTYPES)
        return None if shard < 0 else Member(self.shards, shard, offset, size, crc, name)
