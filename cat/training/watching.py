"""How fast a run is, and what holds it up."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from cat.data.workers import cores
from cat.training.flops import peak_rate

# The share of the time that a GPU may wait for batches before it is said, once, and the seconds that are looked at.
STARVED, LOOKED_AT = 0.1, 60.0


class Watch:
    """What the updates since the last `restart` took. All clocks are monotonic.

    Args:
        end: the step at which the run ends.
        workers: data workers.
    """

    def __init__(self, device: torch.device, precision: str, *, end: int, workers: int) -> None:
        self._device, self._end, self._workers = device, end, workers
        self.begin(0)
        self.peak = peak_rate(device, precision)
        self._looked_at = self._looked_waiting = 0.0
        self._measured = 0
        self._told = False
        self.restart()

    def begin(self, step: int) -> None:
        """This process goes on from here."""
        self._begun_at, self._begun = step, time.monotonic()

    def restart(self) -> None:
        self._clock, self._waited, self._clips, self._flops = time.perf_counter(), 0.0, 0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For a batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def updated(self, clips: int, flops: int | None) -> None:
        """One update was made, or asked of the device."""
        self._clips += clips
        self._flops += flops or 0

    def measured(self, step: int) -> dict[str, float]:
        """What is recorded of the speed, when the device has done the updates up to ``step``."""
        seconds = time.perf_counter() - self._clock
        self._look(seconds)
        # Of the whole time, evaluations and checkpoints too: that is what the rest will take.
        a_step = (time.monotonic() - self._begun) / max(1, step - self._begun_at)
        found = {
            "clips_per_s": _short(self._clips / seconds),
            "seconds": round(seconds, 3),
            "data_wait": _short(self._waited / seconds),
            "memory_bytes": peak_memory(self._device),
            "left_s": round(a_step * (self._end - step), 1),
        }
        if self.peak and self._flops:
            rate = self._flops / seconds
            found |= {"flops_per_s": _short(rate), "matrix_share": _short(rate / self.peak)}
        return found

    def warnings(self) -> list[str]:
        """That the device waits for data; said once."""
        if self._told or self._looked_at < LOOKED_AT:
            return []
        share = self._looked_waiting / self._looked_at
        looked_at, self._looked_at, self._looked_waiting = self._looked_at, 0.0, 0.0
        if share < STARVED:
            return []
        self._told = True
        return [
            f"the {self._device.type} device waits for data: {100 * share:.0f} % of the last {looked_at:.0f} s. Try "
            f"more data workers (data.num_workers={self._workers} now, and this process may use {cores()} cores), "
            "data.features=gpu, and audio that is 16 kHz int16 already, as WAV or FLAC"
        ]

    def _look(self, seconds: float) -> None:
        self._measured += 1
        if self._device.type != "cpu" and self._measured > 1:  # at first workers start and kernels are compiled
            self._looked_at += seconds
            self._looked_waiting += self._waited


def told(speed: dict[str, Any]) -> str:
    """In words, for the display."""
    parts = [f"{speed['clips_per_s']:.1f} clips/s"]
    if "matrix_share" in speed:
        parts.append(f"{100 * speed['matrix_share']:.0f} % of the matrix rate")
    if speed["data_wait"] >= 0.01:
        parts.append(f"data wait {100 * speed['data_wait']:.0f} %")
    parts.append(f"{speed['memory_bytes'] / 1e9:.1f} GB")
    return ", ".join(parts)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: of the GPU for tensors, on the CPU in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _short(value: float) -> float:
    return float(f"{value:.4g}")
