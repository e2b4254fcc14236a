"""When a run is to stop, or to save: signals, on which several processes agree before every update."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from cat.distributed import Processes
from cat.signals import StopSignals

T = TypeVar("T")


class Stop:
    """`StopSignals` of all processes: a signal to one is one to all, from the next time that they agree."""

    def __init__(self, world: Processes) -> None:
        self._world, self._signals = world, StopSignals()
        self._agreed: int | None = None
        self._save = False

    def __enter__(self) -> Stop:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, value, trace)

    def wait(self, get: Callable[[], T]) -> T | None:
        """As `StopSignals.wait`."""
        return self._signals.wait(get)

    def agree(self, other: bool = False) -> bool:
        """Tell each other of signals, and whether ``other`` is so in any process; returns that."""
        if not self._world.several:
            return other
        asked = [self._own or 0, int(self._signals.save_asked()), int(other)]
        stopped, save, found = self._world.agreed(asked)
        self._agreed, self._save = stopped or None, self._save or bool(save)
        return bool(found)

    @property
    def received(self) -> int | None:
        """The signal that ends the run."""
        return self._agreed if self._world.several else self._own

    def save_asked(self) -> bool:
        """Whether SIGUSR1 came since the last time that this was asked; of several processes, before they agreed."""
        if not self._world.several:
            return self._signals.save_asked()
        asked, self._save = self._save, False
        return asked

    @property
    def _own(self) -> int | None:
        """The signal that this process was sent, or should have been."""
        return self._signals.received or (signal.SIGTERM if self._world.abandoned else None)
