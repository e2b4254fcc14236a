"""The two ceilings of a machine, measured: copy bandwidth and matrix rate."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.results import Results
from benchmarks.runner import DTYPES, default_dtypes, say, setup, synchronize


def _seconds(call: Callable[[], object], device: torch.device, *, rounds: int, inner: int) -> float:
    """Median over rounds of the time of one of ``inner`` calls in a row."""
    for _ in range(3):
        call()
    synchronize(device)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, *, quick: bool = False) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    size = (1 << 22 if quick else 1 << 28) if device.type == "cpu" else 1 << 32
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, rounds=7, inner=3) / 1e9


def matrix_rate(device: torch.device, dtype: str, *, quick: bool = False) -> float:
    """TFLOP/s of a large matrix product of random numbers."""
    n = (256 if quick else 2048) if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    inner = 2 if device.type == "cpu" else (3 if dtype == "fp32" else 20)
    return 2 * n**3 / _seconds(lambda: a @ b, device, rounds=5, inner=inner) / 1e12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="sizes so small that the numbers mean nothing (tests)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    setup(device, None)
    results = Results()
    results.ceilings["copy_GBps"] = copy_bandwidth(device, quick=options.quick)
    for dtype in default_dtypes(device):
        results.ceilings[f"matmul_{dtype}_TFLOPS"] = matrix_rate(device, dtype, quick=options.quick)
    for name, value in results.ceilings.items():
        say(f"{name}: {value:.4g}")
    if options.out:
        results.write(options.out, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
