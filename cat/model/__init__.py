"""The paper: the encoder, its pre-training, and classifiers on it."""

from cat.model.classifier import Classifier, ClassifierOutput, HeadConfig
from cat.model.encoder import PRESETS, Encoder, ModelConfig, rows_of, sincos_positions
from cat.model.pretraining import (
    CAT,
    ObjectiveConfig,
    PretrainOutput,
    masked_indices,
    visible_to_mask,
)
from cat.model.regularisation import (
    SCHEDULES,
    GuideConfig,
    Regularisation,
    check_guide_names,
    squared_distance,
)

__all__ = [
    "CAT",
    "PRESETS",
    "SCHEDULES",
    "Classifier",
    "ClassifierOutput",
    "Encoder",
    "GuideConfig",
    "HeadConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PretrainOutput",
    "Regularisation",
    "check_guide_names",
    "masked_indices",
    "rows_of",
    "sincos_positions",
    "squared_distance",
    "visible_to_mask",
]
