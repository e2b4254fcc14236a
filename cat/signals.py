"""Stopping at a good moment when told to: Ctrl-C, SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is only noted in ``received``; a second one acts as usual.

    Outside the main thread, where Python has no signal handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        # A SIGTERM to the process group kills the data workers too, and torch answers a worker's death by raising
        # wherever the main process is. There is a checkpoint to write first.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Stopped(SystemExit):
    """SIGTERM or SIGHUP, ``number``, came. ``exit_code`` is what a shell gives a command that one of them ended."""

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, 128 + number
        super().__init__(self.exit_code)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP end the work as Ctrl-C does: by an exception, so that what is half written is
    cleaned up on the way out. A second one acts as usual. One that is ignored (``nohup``) stays ignored.

    Outside the main thread, where Python has no signal handlers, nothing changes.
    """
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before: dict[int, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        restore()
        raise Stopped(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        restore()
