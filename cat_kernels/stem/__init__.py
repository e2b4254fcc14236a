"""The multi-resolution convolution stem."""

from cat_kernels.stem.module import MultiResConv

__all__ = ["MultiResConv"]
