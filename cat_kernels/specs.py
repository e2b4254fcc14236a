"""The specifications of all operators (`OperatorSpec`): what tests, benchmarks and the kernel hub go through."""

import importlib

from .spec import OperatorSpec

# Folders of cat_kernels that hold a spec.py, in the order of a training step.
FOLDERS = ("stem", "gather", "residual_norm", "grid_conv", "norm_gelu", "restore", "targets", "loss", "ema", "mel")


def specs() -> tuple[OperatorSpec, ...]:
    """In the order of `FOLDERS`."""
    return tuple(importlib.import_module(f".{folder}.spec", __package__).SPEC for folder in FOLDERS)
