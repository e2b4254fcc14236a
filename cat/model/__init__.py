"""The paper: the encoder, its pre-training, and classifiers on it."""

from cat.model.classifier import Classifier, ClassifierOutput, HeadConfig
from cat.model.encoder import PRESETS, Encoder, ModelConfig, rows_of, sincos_positions
from cat.model.pretraining import (
    CAT,
    SCHEDULES,
    ObjectiveConfig,
    PretrainOutput,
    masked_indices,
    squared_distance,
    visible_to_mask,
)

__all__ = [
    "CAT",
    "PRESETS",
    "SCHEDULES",
    "Classifier",
    "ClassifierOutput",
    "Encoder",
    "HeadConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PretrainOutput",
    "masked_indices",
    "rows_of",
    "sincos_positions",
    "squared_distance",
    "visible_to_mask",
]
