"""Grouped convolution over a patch grid, channels last, as an implicit matrix product."""

from .op import grouped_conv2d
from .reference import grouped_conv2d_reference

__all__ = ["grouped_conv2d", "grouped_conv2d_reference"]
