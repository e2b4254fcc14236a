"""Which clips of an update a process computes, and in how many pieces.

The batch of an update, ``data.global_batch`` clips, is cut into pieces of one size, at most ``data.batch_size`` clips,
and every process has as many of them as the others, one behind the other. A piece is an item of the data set: a process
reads its own and no others. What a piece holds depends on the whole batch and its own number alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from cat.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The pieces ``first`` .. ``first + own - 1`` of the ``pieces`` that batches of ``clips`` clips are cut into.

    ``paired``: clip i is in the piece of clip ``clips`` - 1 - i, with which fine-tuning mixes it, and as far from the
    piece's end as that from its beginning. Else a piece is a contiguous part of the batch.
    """

    clips: int
    pieces: int = 1
    first: int = 0
    own: int = 1
    paired: bool = False

    @property
    def size(self) -> int:
        """Clips of a piece."""
        return self.clips // self.pieces

    def keys(self, start: int, steps: int) -> list[int]:
        """Of this process's pieces of so many updates from ``start`` on, in order; `place` tells them apart."""
        return [step * self.pieces + self.first + i for step in range(start, start + steps) for i in range(self.own)]

    def place(self, key: int) -> tuple[int, list[int]]:
        """The update that a piece is of, and the places that its clips have in the update's batch."""
        step, piece = divmod(key, self.pieces)
        return step, self.places(piece)

    def places(self, piece: int) -> list[int]:
        size = self.size
        if not self.paired or self.pieces == 1:
            return list(range(piece * size, (piece + 1) * size))
        half = size // 2
        ahead = range(piece * half, (piece + 1) * half)
        return [*ahead, *(self.clips - 1 - place for place in reversed(ahead))]

    def updates(self, pieces: Iterator[T]) -> Iterator[list[T]]:
        """What ``keys`` are for, an update at a time."""
        while group := list(itertools.islice(pieces, self.own)):
            yield group


def share_out(clips: int, most: int, *, processes: int = 1, rank: int = 0, paired: bool = False) -> Share:
    """What the process ``rank`` of ``processes`` computes of batches of ``clips`` clips, at most ``most`` at once.

    Raises: `ConfigError` for a number of processes that does not fit; it names those that do.
    """
    size = _piece(clips, most, processes, paired)
    if size:
        pieces = clips // size
        own = pieces // processes
        return Share(clips, pieces, rank * own, own, paired)
    fitting = [str(n) for n in range(1, clips + 1) if _piece(clips, most, n, paired)]
    pairs = ", in the pairs that augment.mixup mixes," if paired else ""
    raise ConfigError(
        f"the {clips} clips of an update (data.global_batch, or data.batch_size where that is null){pairs} cannot be "
        f"shared out to {processes} process{'es' * (processes > 1)} alike, at most data.batch_size={most} at once; "
        f"numbers of processes that fit: {', '.join(fitting) or 'none'}. Start one of these, or choose another "
        f"data.global_batch{', an even one' * paired}"
    )


def largest_piece(clips: int, most: int) -> int:
    """The largest part of ``clips`` that is at most ``most``, whatever the processes: evaluations go by it."""
    return _piece(clips, most, 1, False)


def _piece(clips: int, most: int, processes: int, paired: bool) -> int:
    """Clips of a piece; 0 where there is no such thing."""
    if clips % processes:
        return 0
    own = clips // processes
    sizes = (size for size in range(min(own, most), 0, -1) if own % size == 0)
    return next((size for size in sizes if not paired or size % 2 == 0 or size == clips), 0)
