"""Residual and LayerNorm of a post-norm transformer block, in one pass."""

from .op import residual_layer_norm
from .reference import residual_layer_norm_reference

__all__ = ["residual_layer_norm", "residual_layer_norm_reference"]
