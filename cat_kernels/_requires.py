"""The oldest Python and PyTorch that the package runs on. pip sees to them; where the package is loaded without pip,
from the kernel hub or a path, importing it stops here and says so. So this file must itself run on older ones."""

import re
import sys
from collections.abc import Sequence

import torch

PYTHON = (3, 11)
TORCH = (2, 11)


def check(python: Sequence[int], pytorch: str) -> None:
    """Raise ImportError where a version is too old. Of PyTorch's only the first two numbers count: 2.11.0a0 is 2.11."""
    found = tuple(int(number) for number in re.findall(r"\d+", pytorch)[:2])
    if tuple(python[:2]) < PYTHON or found < TORCH:
        raise ImportError(
            f"cat_kernels needs Python {_told(PYTHON)} and PyTorch {_told(TORCH)}, or newer; here are Python "
            f"{_told(python[:2])} and PyTorch {pytorch}"
        )


def _told(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


check(sys.version_info[:2], torch.__version__)
