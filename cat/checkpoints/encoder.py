"""The encoder alone, from whatever holds one: a run, a checkpoint or a single file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints.store import MODEL, STATE, CheckpointError, PathLike, load_tensors, newest, read_tensors
from cat.config import ConfigError, from_mapping
from cat.data.features import FeatureConfig
from cat.model import Encoder, ModelConfig


@dataclass(frozen=True)
class EncoderInfo:
    """Where an encoder came from and how its input was made."""

    path: Path
    weights: str
    step: int | None
    model: ModelConfig
    features: FeatureConfig
    config: dict[str, Any]


def load_encoder(
    path: PathLike, weights: str = "student", device: torch.device | str = "cpu"
) -> tuple[Encoder, EncoderInfo]:
    """The encoder of a run directory (newest checkpoint), a checkpoint directory or a .safetensors file, in eval mode.

    ``weights``: "student" (what the released recipe fine-tunes) or "teacher" (its moving average).

    Raises: `CheckpointError`.
    """
    if weights not in ("student", "teacher"):
        raise ValueError(f"weights is {weights!r}; expected 'student' or 'teacher'")
    file = _model_file(Path(path))
    tensors, metadata = read_tensors(file, device)
    try:
        config = json.loads(metadata["config"])
        model = from_mapping(ModelConfig, config["model"], source=f"{file} (its configuration)")
        features = from_mapping(FeatureConfig, config["features"], source=f"{file} (its configuration)")
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{file} does not say how its model is built ({error}); expected a file written by cat; "
            "released checkpoints go through cat.checkpoints.released first"
        ) from None
    own = {
        name.removeprefix(f"{weights}."): tensor for name, tensor in tensors.items() if name.startswith(f"{weights}.")
    }
    encoder = Encoder(model).to(device)
    load_tensors(encoder, own, f"{file}: {weights}")
    step = int(metadata["step"]) if "step" in metadata else None
    return encoder.eval(), EncoderInfo(file, weights, step, model, features, config)


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected a run directory, a checkpoint directory or a .safetensors file"
        )
    if (path / MODEL).exists() or (path / STATE).exists():
        return path / MODEL
    checkpoint = newest(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; expected a run directory with checkpoints/step-*, a checkpoint directory or "
            "a .safetensors file"
        )
    return checkpoint / MODEL
