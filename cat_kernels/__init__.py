"""Kernels of the Convolutional Audio Transformer: exact, fast PyTorch operators with references beside them."""

__version__ = "0.1.0"
