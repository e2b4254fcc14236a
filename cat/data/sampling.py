"""Which clip is where in the endless sequence of epochs: each epoch a pure function of (seed, epoch)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from cat.data.epochs import Epochs
from cat.data.randomness import Purpose, generator

WINDOW = 16  # shards whose clips are mixed
_KEPT_WINDOWS = 4

K = TypeVar("K")
V = TypeVar("V")


class Order:
    """Epochs of ``epoch_clips`` of the ``clips`` clips (None: all of them), none of them twice in an epoch.

    Without ``weights`` an epoch is the beginning of a random permutation. With ``weights`` (n,), clips are drawn one
    after the other, each with a chance in proportion to its weight among those that are left; ones of weight 0 never
    are. What was drawn is then shuffled, because heavy clips are drawn early.

    With ``shards`` (m + 1,), clips shards[i] .. shards[i + 1] - 1 lie together, and reading one here and one there is
    slow: an epoch's shards are shuffled, and then the clips of every ``window`` shards that follow each other. Only
    those shards are read from at a time.
    """

    def __init__(
        self,
        clips: int,
        *,
        seed: int,
        epoch_clips: int | None = None,
        weights: np.ndarray | None = None,
        shards: np.ndarray | None = None,
        window: int = WINDOW,
    ) -> None:
        available = clips if weights is None else int(np.count_nonzero(weights))
        self._clips, self._seed, self._weights = clips, seed, weights
        self._length = available if epoch_clips is None else epoch_clips
        if not 1 <= self._length <= available:
            kind = "clips" if weights is None else "clips with a weight above 0"
            raise ValueError(
                f"data.epoch_clips is {self._length}, but there are {available} {kind}, and no clip is drawn twice in "
                f"an epoch; give at most {available}, or null"
            )
        self._places: Epochs | _ByShard
        if shards is None:
            self._places = Epochs(self._length, self._draw)
        else:
            drawn = None if weights is None else Epochs(self._length, self._draw_sorted)
            self._places = _ByShard(shards, seed, window, drawn)

    def __len__(self) -> int:
        """Clips of an epoch."""
        return self._length

    def epoch(self, number: int) -> np.ndarray:
        """(len(self),) int64 indices."""
        return self._places.whole(number)[: self._length]

    def following(self, position: int, most: int) -> Iterator[tuple[int, int]]:
        """(epoch, clip) at a position of the endless sequence, then at the next ones of the same epoch, which is gone
        round; ``most`` of them, and no place twice."""
        epoch, place = divmod(position, self._length)
        for offset in range(min(self._length, most)):
            yield epoch, self._places.at(epoch, (place + offset) % self._length)

    def _draw(self, epoch: int) -> np.ndarray:
        if self._weights is None:
            return generator(self._seed, Purpose.PERMUTATION, epoch).permutation(self._clips)[: self._length]
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006): with E exponential, the clips of
        # the k smallest E / w are k draws without replacement.
        random = generator(self._seed, Purpose.WEIGHTED, epoch)
        with np.errstate(divide="ignore"):
            keys = random.standard_exponential(self._clips) / self._weights
        return random.permutation(np.argpartition(keys, self._length - 1)[: self._length])

    def _draw_sorted(self, epoch: int) -> np.ndarray:
        return np.sort(self._draw(epoch))


def boundaries(shards: np.ndarray) -> np.ndarray:
    """(m + 1,) for `Order`, of the shard of every clip, (n,): where another one begins, and the end."""
    begins = np.flatnonzero(np.diff(shards)) + 1
    return np.concatenate([[0], begins, [len(shards)]])


class _Epoch(NamedTuple):
    """Of an epoch: its shards in their order, and where each one's clips begin there, and in what is drawn."""

    shards: np.ndarray  # (m,)
    places: np.ndarray  # (m + 1,)
    begins: np.ndarray  # (m + 1,) by shard


class _ByShard:
    """Places of epochs whose shards are shuffled, then the clips of each window. What is drawn for it is as long as the
    list of shards, or as a window.

    ``drawn``: the clips of an epoch, sorted; None for all of them.
    """

    def __init__(self, shards: np.ndarray, seed: int, window: int, drawn: Epochs | None) -> None:
        self._begins, self._seed, self._window, self._drawn = np.asarray(shards), seed, window, drawn
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def at(self, epoch: int, place: int) -> int:
        of = self._epoch(epoch)
        window = (int(np.searchsorted(of.places, place, side="right")) - 1) // self._window
        inside = place - int(of.places[window * self._window])
        found = int(self._mixed(epoch, of, window)[inside])
        return found if self._drawn is None else self._drawn.at(epoch, found)

    def whole(self, epoch: int) -> np.ndarray:
        of = self._epoch(epoch)
        windows = range(-(-len(of.shards) // self._window))
        found = np.concatenate([self._mixed(epoch, of, window) for window in windows])
        return found if self._drawn is None else self._drawn.whole(epoch)[found]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            begins = self._begins
            if self._drawn is not None:
                begins = np.searchsorted(self._drawn.whole(epoch), begins)
            shards = generator(self._seed, Purpose.SHARDS, epoch).permutation(len(begins) - 1)
            places = np.append(0, np.cumsum(np.diff(begins)[shards]))
            _keep(self._epochs, epoch, _Epoch(shards, places, begins), 2)
        return self._epochs[epoch]

    def _mixed(self, epoch: int, of: _Epoch, window: int) -> np.ndarray:
        """The clips of a window, by their places in what is drawn, in random order."""
        if (epoch, window) not in self._windows:
            some = of.shards[window * self._window : (window + 1) * self._window]
            clips = np.concatenate([np.arange(of.begins[shard], of.begins[shard + 1]) for shard in some])
            mixed = generator(self._seed, Purpose.WINDOW, epoch, window).permutation(clips)
            _keep(self._windows, (epoch, window), mixed, _KEPT_WINDOWS)
        return self._windows[epoch, window]


def _keep(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
