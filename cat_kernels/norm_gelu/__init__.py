"""LayerNorm, GELU and residual of a block of the decoder, in one pass."""

from .op import layer_norm_gelu
from .reference import layer_norm_gelu_reference

__all__ = ["layer_norm_gelu", "layer_norm_gelu_reference"]
