"""Every operator and a small pre-training step under pytest-benchmark: what `benchmarks.regressions` runs.

    pytest benchmarks/bench_calls.py --benchmark-columns=min,median,rounds

Sizes are the specifications' (base width), one clip on a CPU, 96 on a GPU. Whether results are right, other tests say.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.operators import OperatorProvider
from benchmarks.runner import DTYPES, default_dtypes, setup, synchronize
from benchmarks.step_time import StepProvider
from cat_kernels.specs import specs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
CLIPS = 96 if CUDA else 1
STEP = {"preset": "small", "clips": 16, "masks": 4, "frames": 1024} if CUDA else {
    "preset": "tiny", "clips": 2, "masks": 4, "frames": 256
}  # fmt: skip
SPECS = {spec.name: spec for spec in specs() if spec.benchmark is not None}
OPERATORS = [
    (name, mode, dtype)
    for name, spec in SPECS.items()
    for dtype in default_dtypes(DEVICE)
    if DTYPES[dtype] in spec.dtypes
    for mode in ("forward", "forward+backward")
]


@pytest.fixture(autouse=True)
def _same_arithmetic():
    setup(DEVICE, None)
    torch.manual_seed(0)


def _time(benchmark: Callable[..., object], call: Callable[[], object]) -> None:
    def waited() -> None:
        call()
        synchronize(DEVICE)

    waited()  # compiles, allocates
    benchmark(waited)


@pytest.mark.parametrize(("name", "mode", "dtype"), OPERATORS)
def test_operator(benchmark, name, mode, dtype):
    spec = SPECS[name]
    sample = spec.benchmark(DEVICE, DTYPES[dtype], CLIPS)
    if mode != "forward" and not sample.differentiable:
        pytest.skip(f"{name} has no backward")
    _time(benchmark, OperatorProvider(spec, sample, "operator", mode).call)


@pytest.mark.parametrize("dtype", default_dtypes(DEVICE))
def test_step(benchmark, dtype):
    _time(benchmark, StepProvider("triton" if CUDA else "visible", STEP, dtype, DEVICE).call)


@pytest.mark.parametrize("work", ["copy", "product"])
def test_machine(benchmark, work):
    """No code of ours: slower here means a slower machine."""
    if work == "copy":
        source, target = torch.ones(2, 1 << 26, device=DEVICE)
        _time(benchmark, lambda: target.copy_(source))
    else:
        a = torch.randn(1024, 1024, device=DEVICE)
        _time(benchmark, lambda: a @ a)
