"""Shared by all tests: one thread, and which tests run where.

`gpu`: needs a CUDA device, skipped without one. `either`: runs on whatever is there; where that is a CUDA device the
test is marked `gpu` as well, so that `pytest -m gpu` runs it. A module marked `either` takes its tensors to `DEVICE`,
or to a fixture `device`: "cuda" where there is one, else the CPU, where Triton's kernels run in its interpreter.
"""

import gc
import importlib.metadata
import os
import signal
from collections.abc import Callable, Iterable, Iterator

# Tests are small: a second thread gains nothing and, where the cores are busy, waits at every operation (measured on
# two shared cores: parity of the stem 7 s with one thread, 99 s with two). Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# float32 means float32: PyTorch's default for convolutions on a GPU is TF32.
torch.backends.cudnn.allow_tf32 = False

# Triton reads it when it is imported: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    reason = why_not_interpreted()
    if reason is not None:
        raise pytest.UsageError(reason)


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """SIGINT and SIGHUP act, for the tests that send them, also where they were ignored from the start: in the
    background of a shell, under ``nohup``."""
    acting = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in acting if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, acting[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def why_not_interpreted() -> str | None:
    """Triton 3.6's interpreter makes numbers of one-element arrays, which NumPy 2.4 refuses ("only 0-dimensional
    arrays can be converted to Python scalars"): hundreds of tests would fail without saying why."""
    if os.environ.get("TRITON_INTERPRET") != "1" or _version("triton") >= (3, 7) or _version("numpy") < (2, 4):
        return None
    return (
        "the interpreter of Triton 3.6, which runs the kernels' tests where there is no GPU, fails under NumPy 2.4 and "
        "newer; install an older one: pip install 'numpy<2.4'"
    )


def _version(package: str) -> tuple[int, ...]:
    """Major and minor; of what is not installed nothing is asked."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (1 << 30,) if package == "triton" else (0,)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    here = torch.cuda.is_available()
    for item in items:
        if here and item.get_closest_marker("either"):
            item.add_marker(pytest.mark.gpu)
        elif not here and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def gpu_memory() -> Callable[[float], None]:
    """`gpu_memory(count)` skips a test where that many bytes are not free. What PyTorch's allocator holds for tensors
    that are gone, those of the tests before, is given back first."""

    def wanted(count: float) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < count:
            pytest.skip(f"needs {count / 2**30:.0f} GiB of GPU memory; free are {free / 2**30:.0f}")

    return wanted
