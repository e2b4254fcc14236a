"""Kernels of the Convolutional Audio Transformer: exact, fast PyTorch operators with references beside them.

Every operator has a folder: the mathematics (README.md), the formula in plain PyTorch (reference.py), the registered
operator (op.py) and its specification (spec.py), from which tests and benchmarks are driven. `explain()` tells which
backend runs each of them here.
"""

__version__ = "0.1.0"

from . import _requires  # noqa: F401 - first: what follows need not even compile on an older Python
from .backends import explain
from .ema import EMA, ema_update_
from .gather import gather_tokens
from .grid_conv import grouped_conv2d
from .loss import masked_regression_loss
from .mel import LogMelFbank, fbank
from .norm_gelu import layer_norm_gelu
from .residual_norm import residual_layer_norm
from .restore import restore_tokens
from .stem import MultiResConv
from .targets import average_targets

__all__ = [
    "EMA",
    "LogMelFbank",
    "MultiResConv",
    "__version__",
    "average_targets",
    "ema_update_",
    "explain",
    "fbank",
    "gather_tokens",
    "grouped_conv2d",
    "layer_norm_gelu",
    "masked_regression_loss",
    "residual_layer_norm",
    "restore_tokens",
]
