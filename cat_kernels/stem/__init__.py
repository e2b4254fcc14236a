"""The multi-resolution convolution stem."""

from .module import MultiResConv

__all__ = ["MultiResConv"]
