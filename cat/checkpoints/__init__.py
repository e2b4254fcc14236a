"""Models on disk: checkpoints of ours, encoders out of them, released files."""

from cat.checkpoints.encoder import EncoderInfo, load_encoder
from cat.checkpoints.store import Checkpoint, CheckpointError, save_tensors

__all__ = ["Checkpoint", "CheckpointError", "EncoderInfo", "load_encoder", "save_tensors"]
