"""The parts of a training step: ranges in a profiler's trace, or, while a `PartTimer` is active, rows of its table.

A part's time is its own, without the parts inside it, so the parts of a step add up to it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Listener(Protocol):
    """Whoever wants to know in which part the step is."""

    def span(self, name: str) -> AbstractContextManager[None]: ...


_ACTIVE: list[Listener] = []


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Parts are told to this one meanwhile."""
    _ACTIVE.append(listener)
    try:
        yield
    finally:
        _ACTIVE.remove(listener)


def part(name: str) -> AbstractContextManager[Any]:
    """A part of the step, as a context. Compiled code has none: what encloses it gets its time."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _ACTIVE[-1].span(name) if _ACTIVE else torch.profiler.record_function(name)


@dataclass
class _Span:
    name: str
    start: Any
    stop: Any
    parent: _Span | None


class PartTimer:
    """Time that every part takes, while ``with timer:`` holds.

    On a GPU it is the device's: events in the stream, read when all is done. Where the device waits for the host, the
    part that it waits in has the waiting. On the CPU it is the clock's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[_Span] = []
        self._spans: list[_Span] = []

    def __enter__(self) -> PartTimer:
        _ACTIVE.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.remove(self)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        span = _Span(name, self._now(), None, self._open[-1] if self._open else None)
        self._open.append(span)
        try:
            yield
        finally:
            span.stop = self._now()
            self._spans.append(self._open.pop())

    def seconds(self) -> dict[str, float]:
        """Part -> seconds in all, in the order in which parts ended. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total: dict[str, float] = {}
        for span in self._spans:
            elapsed = self._between(span)
            total[span.name] = total.get(span.name, 0.0) + elapsed
            if span.parent is not None:
                total[span.parent.name] = total.get(span.parent.name, 0.0) - elapsed
        return total

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, span: _Span) -> float:
        if self._device.type != "cuda":
            return span.stop - span.start
        return span.start.elapsed_time(span.stop) / 1e3
