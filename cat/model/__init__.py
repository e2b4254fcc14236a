"""The paper: the encoder, and its pre-training."""

from cat.model.encoder import PRESETS, Encoder, ModelConfig, sincos_positions
from cat.model.pretraining import (
    CAT,
    ObjectiveConfig,
    PretrainOutput,
    masked_indices,
    squared_distance,
    visible_to_mask,
)

__all__ = [
    "CAT",
    "PRESETS",
    "Encoder",
    "ModelConfig",
    "ObjectiveConfig",
    "PretrainOutput",
    "masked_indices",
    "sincos_positions",
    "squared_distance",
    "visible_to_mask",
]
