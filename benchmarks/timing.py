"""Timing: all candidates in one run, in turn, so that a slow spell of the machine hits them alike.

A round calls every candidate once, in an order that rotates from round to round. Before each call the caches are swept:
inputs of one call must not be found in them by the next. A ratio is taken pair by pair: both times of a pair come from
one round.

On a GPU events tell the device's time. It would contain the host's wherever the device waits for the next launch, and a
small operator's launches take longer than its kernels; so the device sleeps before the first event for as long as the
host takes for the whole call. A call that takes the host longer than `LONGEST_SLEEP_S`, as a training step does, is
timed as it runs, waiting included.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

CPU_SWEEP_BYTES = 64 << 20  # twice the last-level cache of one chiplet of current server CPUs
LONGEST_SLEEP_S = 2e-3
SLEEP_HZ = 2e9  # of the clock that counts a sleep; GPUs run at 2 GHz or less, and then sleep longer


@dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: Sequence[float]) -> Quantiles:
        """With fewer than three values the percentiles are the smallest and the largest."""
        if not values:
            raise ValueError("no values to take quantiles of; expected at least one")
        if len(values) < 3:
            return Quantiles(statistics.median(values), min(values), max(values))
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return Quantiles(statistics.median(values), p20, p80)


def ratio(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Quantiles:
    """How many times faster ``fast`` is, from pairs of the same round."""
    return Quantiles.of([slow / fast for slow, fast in zip(slow_ms, fast_ms, strict=True)])


class _Sweep:
    """Overwrites a buffer larger than the caches."""

    def __init__(self, device: torch.device) -> None:
        size = CPU_SWEEP_BYTES
        if device.type == "cuda":
            size = max(size, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.fill_(1)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    warmup: int = 1,
    min_rounds: int = 3,
    max_rounds: int = 50,
    budget_s: float = 10.0,
) -> dict[str, list[float]]:
    """Milliseconds of every call, by name, one entry a round.

    Args:
        calls: what to time; each does the same work every time.
        warmup: untimed rounds first (compilation, allocation, handles).
        min_rounds, max_rounds, budget_s: rounds go on until the budget of wall seconds is used up, within these bounds.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    sweep = _Sweep(device)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    sleeps = {name: _host_seconds(calls[name], device) for name in names} if device.type == "cuda" else {}
    start = time.perf_counter()
    for i in range(max_rounds):
        if i >= min_rounds and time.perf_counter() - start > budget_s:
            break
        shift = i % max(1, len(names))
        order = names[shift:] + names[:shift]
        found = _round_cuda(calls, order, sweep, sleeps) if sleeps else _round_cpu(calls, order, sweep)
        for name, milliseconds in found.items():
            times[name].append(milliseconds)
    return times


def _round_cpu(calls: Mapping[str, Callable[[], object]], order: list[str], sweep: _Sweep) -> dict[str, float]:
    times = {}
    for name in order:
        sweep()
        start = time.perf_counter()
        result = calls[name]()
        times[name] = 1e3 * (time.perf_counter() - start)
        del result
    return times


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """What a call takes the host while the device is idle: the best of three, unless that is too long to sleep for."""
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
        del result
        if best > 10 * LONGEST_SLEEP_S:
            break
    torch.cuda.synchronize(device)
    return best


def _round_cuda(
    calls: Mapping[str, Callable[[], object]], order: list[str], sweep: _Sweep, sleeps: Mapping[str, float]
) -> dict[str, float]:
    events = {}
    for name in order:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        sweep()
        if sleeps[name] <= LONGEST_SLEEP_S:
            torch.cuda._sleep(int(1.5 * sleeps[name] * SLEEP_HZ))  # half again: the host is not always as fast
        begin.record()
        calls[name]()
        end.record()
        events[name] = (begin, end)
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


def overhead_us(call: Callable[[], object], device: torch.device, *, calls: int = 200) -> float:
    """Host microseconds of a call, to be made on inputs so small that only the call costs: median of five batches."""
    for _ in range(20):
        call()
    batches = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // 5):
            call()
        batches.append((time.perf_counter() - start) / (calls // 5))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * statistics.median(batches)
