"""Exponential moving average of all parameters, with low-precision copies written in the same pass."""

from cat_kernels.ema.module import EMA
from cat_kernels.ema.op import ema_update_
from cat_kernels.ema.reference import ema_update_reference

__all__ = ["EMA", "ema_update_", "ema_update_reference"]
