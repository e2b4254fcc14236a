"""The reference trainer of the Convolutional Audio Transformer (arXiv 2601.21612), on the operators of cat_kernels.

from cat import load_encoder
encoder, info = load_encoder("runs/quickstart")        # a run, a checkpoint or a .safetensors file
tokens = encoder(spec)                                 # (B, 1+L, D): CLS, then one token per patch
"""

from cat_kernels import __version__  # isort: skip

from cat.checkpoints import load_encoder
from cat.data.masks import MaskConfig, inverse_block_masks
from cat.model import CAT, PRESETS, Encoder, ModelConfig, ObjectiveConfig

__all__ = [
    "CAT",
    "PRESETS",
    "Encoder",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "__version__",
    "inverse_block_masks",
    "load_encoder",
]
