"""Which clip is where in the endless sequence of epochs: each epoch a pure function of (seed, epoch)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from cat.data.randomness import Purpose, generator


class Order:
    """Epochs of ``epoch_clips`` of the ``clips`` clips (None: all of them), none of them twice in an epoch.

    Without ``weights`` an epoch is the beginning of a random permutation. With ``weights`` (n,), clips are drawn one
    after the other, each with a chance in proportion to its weight among those that are left; ones of weight 0 never
    are. What was drawn is then shuffled, because heavy clips are drawn early.
    """

    def __init__(
        self, clips: int, *, seed: int, epoch_clips: int | None = None, weights: np.ndarray | None = None
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
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Clips of an epoch."""
        return self._length

    def epoch(self, number: int) -> np.ndarray:
        """(len(self),) int64 indices. Drawing them takes O(clips), so that the last two epochs' are kept."""
        if number not in self._epochs:
            self._epochs[number] = self._draw(number)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def following(self, position: int, most: int) -> Iterator[tuple[int, int]]:
        """(epoch, clip) at a position of the endless sequence, then at the next ones of the same epoch, which is gone
        round; ``most`` of them, and no place twice."""
        epoch, place = divmod(position, self._length)
        order = self.epoch(epoch)
        for offset in range(min(self._length, most)):
            yield epoch, int(order[(place + offset) % self._length])

    def _draw(self, epoch: int) -> np.ndarray:
        if self._weights is None:
            return generator(self._seed, Purpose.PERMUTATION, epoch).permutation(self._clips)[: self._length]
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006): with E exponential, the clips of
        # the k smallest E / w are k draws without replacement.
        random = generator(self._seed, Purpose.WEIGHTED, epoch)
        with np.errstate(divide="ignore"):
            keys = random.standard_exponential(self._clips) / self._weights
        return random.permutation(np.argpartition(keys, self._length - 1)[: self._length])
