"""Models on disk: checkpoints of ours, encoders out of them, released files."""

from cat.checkpoints.classifier import ClassifierInfo, load_classifier
from cat.checkpoints.encoder import EncoderInfo, load_encoder
from cat.checkpoints.store import Checkpoint, CheckpointError, save_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ClassifierInfo",
    "EncoderInfo",
    "load_classifier",
    "load_encoder",
    "save_tensors",
]
