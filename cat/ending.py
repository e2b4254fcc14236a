"""Ending a command from outside as Ctrl-C does, so that what is half written is cleaned up on the way out; or because
another process has ended."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_HANGUP = getattr(signal, "SIGHUP", None)  # not every system has it


class Ended(SystemExit):
    """SIGTERM or SIGHUP, ``number``, came. ``exit_code`` is what a shell gives a command that one of them ended."""

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, 128 + number
        super().__init__(self.exit_code)


class Unsaid(Exception):
    """This process ends because another one had an error, which that one says (`cat.distributed`)."""


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise `Ended` wherever the work is. A second SIGTERM acts as usual; a second
    SIGHUP, which a terminal that is closed may send, does nothing. One that is ignored (``nohup``) stays ignored.

    Outside the main thread, where Python has no signal handlers, nothing changes.
    """
    mine: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        for other in mine:
            signal.signal(other, signal.SIG_IGN if other == _HANGUP else signal.SIG_DFL)
        raise Ended(number)

    if threading.current_thread() is threading.main_thread():
        mine += [n for n in (signal.SIGTERM, _HANGUP) if n is not None and signal.getsignal(n) == signal.SIG_DFL]
        for number in mine:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
