"""The reference trainer of the Convolutional Audio Transformer (arXiv 2601.21612), on the operators of cat_kernels.

from cat import CATEncoder
encoder = CATEncoder.from_pretrained("runs/quickstart")  # a run, a checkpoint, a .safetensors file, a hub folder
out = encoder(waveforms, sample_rate)                    # out.clip (B, D), out.frames (B, H, D), out.times, ...

from cat import CATClassifier
classifier = CATClassifier.from_pretrained("runs/esc50") # fine-tuned
classifier(waveforms, sample_rate).top(3)                # of each clip, [(label, score), ...]

from cat import load_encoder
encoder, info = load_encoder("runs/quickstart")        # a run, a checkpoint or a .safetensors file
tokens = encoder(spec)                                 # (B, 1+L, D): CLS, then one token per patch
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat.checkpoints import load_encoder
    from cat.data.masks import MaskConfig, inverse_block_masks
    from cat.encoders import CATEncoder
    from cat.model import CAT, PRESETS, Encoder, GuideConfig, ModelConfig, ObjectiveConfig
    from cat.prediction import CATClassifier
    from cat_kernels import __version__

# What brings more modules along is imported when it is first asked for: `cat-audio --help` needs none of it, not torch.
_HOME = {
    "CAT": "cat.model",
    "CATClassifier": "cat.prediction",
    "CATEncoder": "cat.encoders",
    "Encoder": "cat.model",
    "GuideConfig": "cat.model",
    "MaskConfig": "cat.data.masks",
    "ModelConfig": "cat.model",
    "ObjectiveConfig": "cat.model",
    "PRESETS": "cat.model",
    "__version__": "cat_kernels",
    "inverse_block_masks": "cat.data.masks",
    "load_encoder": "cat.checkpoints",
}

__all__ = [
    "CAT",
    "PRESETS",
    "CATClassifier",
    "CATEncoder",
    "Encoder",
    "GuideConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "__version__",
    "inverse_block_masks",
    "load_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
