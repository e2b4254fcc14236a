"""Stopping at a good moment when told to: Ctrl-C, SIGTERM, a terminal that is closed.

A long command enters `StopSignals` and looks at ``received`` between two pieces of work; for what may take long to come
(a batch) it waits by `wait`, which a signal ends at once::

    with StopSignals() as stop:
        while not stop.received and (item := stop.wait(lambda: next(items, None))) is not None:
            use(item)
    return 128 + stop.received if stop.received else 0
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

T = TypeVar("T")

STOP = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has them all
SAVE = "SIGUSR1"  # as of Slurm's --signal=USR1@300
_TWICE = {getattr(signal, name) for name in ("SIGHUP", SAVE) if hasattr(signal, name)}


class _Interrupt(BaseException):
    """Ends what is waited for; not an Exception, so that nothing on the way takes it for an error of its own."""


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is only noted in ``received``; a second one acts as usual (but
    SIGHUP: a terminal that is closed may send two). SIGUSR1 is noted for `save_asked`.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored. Outside the main thread, where Python has no signal
    handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._save_asked = self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in STOP:
                self._handle(name, self._note)
            self._handle(SAVE, self._note_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def wait(self, get: Callable[[], T]) -> T | None:
        """``get()``; None when a signal comes meanwhile, or came before. ``get`` is then left half-way: it may only
        get something that is not needed any more."""
        try:
            try:
                self._waiting = True
                return None if self.received else get()
            finally:
                self._waiting = False
        except _Interrupt:
            return None
        except Exception:
            if self.received:  # which may have killed those who were to answer
                return None
            raise

    def save_asked(self) -> bool:
        """Whether SIGUSR1 came since the last time this was asked."""
        asked, self._save_asked = self._save_asked, False
        return asked

    def _handle(self, name: str, handler: Any) -> None:
        number = getattr(signal, name, None)
        before = None if number is None else signal.getsignal(number)
        if before is not None and not (name == "SIGHUP" and before == signal.SIG_IGN):
            self._before[cast(int, number)] = before
            signal.signal(cast(int, number), handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for other, before in self._before.items():
            signal.signal(other, signal.SIG_IGN if other in _TWICE else before)
        if self._waiting:
            self._waiting = False
            raise _Interrupt

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save_asked = True
