"""Shared by all tests: one thread, and a test marked `gpu` is skipped where there is no CUDA device."""

import os
from collections.abc import Iterable

# Tests are small: a second thread gains nothing and, where the cores are busy, waits at every operation (measured on
# two shared cores: parity of the stem 7 s with one thread, 99 s with two). Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads it when it is imported: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
