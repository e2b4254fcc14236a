"""Shared by all tests: a test marked `gpu` is skipped where there is no CUDA device."""

from collections.abc import Iterable

import pytest
import torch


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
