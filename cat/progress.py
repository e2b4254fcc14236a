"""What a command tells people on stderr while it works: a bar on a terminal, a line now and then elsewhere.

Telling must not stop the work: where stderr is closed, its reader is gone or its disk is full, nothing is said.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

muted = False  # in all processes but one, where several train one model (`cat.distributed`)


class _Stderr:
    """``sys.stderr``, whatever it is at the time, without its errors."""

    def write(self, text: str) -> int:
        try:
            if sys.stderr is not None and not muted:
                sys.stderr.write(text)
        except (OSError, ValueError):  # ValueError: closed
            pass
        return len(text)

    def flush(self) -> None:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except (OSError, ValueError):
            pass

    def isatty(self) -> bool:
        try:
            return sys.stderr is not None and not muted and sys.stderr.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:  # tqdm asks a terminal for its width
        return sys.stderr.fileno() if sys.stderr is not None else -1

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"


STDERR: Any = _Stderr()


def say(text: str) -> None:
    """A line on stderr, if anybody listens."""
    STDERR.write(text + "\n")
    STDERR.flush()


class Progress:
    """How much of ``total`` is done, and the time left.

    Args:
        start: done before, by an earlier run.
        label: what is being done.
        unit: what is counted, in the plural.
        enabled: False says nothing at all.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        label: str,
        unit: str = "steps",
        enabled: bool = True,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self._total, self._start, self._label, self._unit = total, start, label, unit
        self._interval, self._begun, self._last_line = seconds_between_lines, time.monotonic(), -math.inf
        self._enabled = enabled
        self._bar = _bar(total, start, label, unit) if enabled and STDERR.isatty() else None

    def advance(self, done: int, note: str = "") -> None:
        """So many are done by now; ``note`` is shown beside the count."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._enabled and (now - self._last_line >= self._interval or done == self._total):
            self._last_line = now
            left = (self._total - done) * (now - self._begun) / max(1, done - self._start)
            parts = [f"{self._label}: {done}/{self._total} {self._unit}", note, f"{_duration(left)} left"]
            say(", ".join(filter(None, parts)))

    def say(self, text: str) -> None:
        """A line that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=STDERR)
        elif self._enabled:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[T], total: int, *, label: str, unit: str, enabled: bool = True) -> Iterator[T]:
    """The items, with the progress of going through them."""
    progress = Progress(total, label=label, unit=unit, enabled=enabled)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            progress.advance(done)
    finally:
        progress.close()


def _bar(total: int, start: int, label: str, unit: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("the progress display needs tqdm: pip install 'cat-kernels[train]'") from None
    layout = (
        f"{{desc}} {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit} [{{elapsed}}<{{remaining}}{{postfix}}]"
    )
    return tqdm(total=total, initial=start, desc=label, bar_format=layout, dynamic_ncols=True, file=STDERR)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
