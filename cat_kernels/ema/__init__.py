"""Exponential moving average of all parameters, with low-precision copies written in the same pass."""

from .module import EMA
from .op import ema_update_
from .reference import ema_update_reference

__all__ = ["EMA", "ema_update_", "ema_update_reference"]
