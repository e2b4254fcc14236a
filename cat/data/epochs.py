"""The orders of the last epochs, kept once for a process and all data workers that it forks.

Of two million clips an epoch's order is 16 MB as NumPy draws it, and every worker needs this epoch's and, at its end,
the next one's. Here whoever needs an order first draws it into memory that all of them share.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Any

import numpy as np

SHARED_FROM = 1 << 16  # clips; the orders of smaller epochs are less than what a worker allocates anyway
_KEPT = 2  # epochs; workers are less than one apart, the more so as epochs are long
_HEADER = 4096  # bytes


class Epochs:
    """``epochs.at(epoch, place)`` of orders that ``draw(epoch)`` gives, (length,) integers below 2^32; for one thread a
    process. Where processes are not forked, or the system has no such memory, each keeps its own."""

    def __init__(self, length: int, draw: Callable[[int], np.ndarray]) -> None:
        self._length, self._draw = length, draw
        self._own: OrderedDict[int, np.ndarray] = OrderedDict()
        self._shared: _Shared | None = None
        if length >= SHARED_FROM:
            with contextlib.suppress(OSError, AttributeError):  # of Linux only; no memory
                self._shared = _Shared(length)

    def at(self, epoch: int, place: int) -> int:
        """What is at a place of an epoch. Drawing an order takes O(length); the last two epochs' are kept."""
        if self._shared is not None:
            with self._shared.order(epoch, self._draw) as order:
                return int(order[place])
        return int(self._order(epoch)[place])

    def whole(self, epoch: int) -> np.ndarray:
        """(length,) int64."""
        if self._shared is not None:
            with self._shared.order(epoch, self._draw) as order:
                return order.astype(np.int64)
        return self._order(epoch)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._own:
            self._own[epoch] = self._draw(epoch)
            if len(self._own) > _KEPT:
                self._own.popitem(last=False)
        return self._own[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shared": None, "_own": OrderedDict()}


class _Shared:
    """Memory of a file without a name, which is gone with the last process that has it."""

    def __init__(self, length: int) -> None:
        self._descriptor = os.memfd_create("orders")
        weakref.finalize(self, os.close, self._descriptor)
        size = _HEADER + _KEPT * length * 4
        os.ftruncate(self._descriptor, size)
        memory = mmap(self._descriptor, size)
        self._epochs = np.frombuffer(memory, dtype=np.int64, count=_KEPT)  # which one a row has; 0 for none, else + 1
        self._orders = np.frombuffer(memory, dtype=np.uint32, offset=_HEADER).reshape(_KEPT, length)

    @contextlib.contextmanager
    def order(self, epoch: int, draw: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
        """The order of an epoch, which nobody changes until the context is left."""
        row = epoch % _KEPT
        with self._locked(row, fcntl.LOCK_SH):
            if self._epochs[row] == epoch + 1:
                yield self._orders[row]
                return
        with self._locked(row, fcntl.LOCK_EX):
            if self._epochs[row] != epoch + 1:  # nobody has drawn it meanwhile
                self._epochs[row] = 0  # should this process be killed now, the next one draws it again
                self._orders[row] = draw(epoch)
                self._epochs[row] = epoch + 1
            yield self._orders[row]

    @contextlib.contextmanager
    def _locked(self, row: int, kind: int) -> Iterator[None]:
        # lockf: a lock of the process, which its end releases; one of flock would be shared by forked ones.
        fcntl.lockf(self._descriptor, kind, 1, row)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, row)
