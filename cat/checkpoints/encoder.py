"""The encoder alone, from whatever holds one: a run, a checkpoint or a single file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat.checkpoints.store import (
    MODEL,
    STATE,
    CheckpointError,
    PathLike,
    best,
    load_tensors,
    newest,
    read_state,
    read_tensors,
)
from cat.config import from_mapping
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
    """The encoder of a run directory (its `chosen` checkpoint), a checkpoint directory or a .safetensors file, in eval
    mode.

    ``weights``: "student" (what the released recipe fine-tunes) or "teacher" (its moving average); of a fine-tuned
    checkpoint the one encoder that it has is the student. Names may have the
    prefixes of wrappers (``module.``, ``_orig_mod.``), values another floating-point dtype, and a file may hold one
    encoder alone, which is the student.

    Raises: `CheckpointError`.
    """
    if weights not in ("student", "teacher"):
        raise ValueError(f"weights is {weights!r}; expected 'student' or 'teacher'")
    found = read_model(path, device)
    encoder = Encoder(found.model).to(device)
    tensors = _encoder_tensors(found.tensors, weights, encoder, found.file)
    load_tensors(encoder, tensors, f"{found.file}: {weights}")
    return encoder.eval(), EncoderInfo(found.file, weights, found.step, found.model, found.features, found.config)


@dataclass(frozen=True)
class ModelFile:
    """What the file of a model holds."""

    file: Path
    tensors: dict[str, Tensor]
    step: int | None
    model: ModelConfig
    features: FeatureConfig
    config: dict[str, Any]


def read_model(path: PathLike, device: torch.device | str = "cpu") -> ModelFile:
    """The file with the weights of a run directory (of its `chosen` checkpoint), a checkpoint directory or a
    .safetensors file.

    Raises: `CheckpointError`.
    """
    file = _model_file(Path(path))
    try:
        tensors, metadata = read_tensors(file, device)
    except CheckpointError:
        gone, file = file, _model_file(Path(path))
        if file == gone:
            raise
        tensors, metadata = read_tensors(file, device)  # a run that goes on has replaced its newest checkpoint
    try:
        config = json.loads(metadata["config"])
        model = from_mapping(ModelConfig, config["model"], source=f"{file} (its configuration)")
        features = from_mapping(FeatureConfig, config["features"], source=f"{file} (its configuration)")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} does not say how its model is built ({error}); expected a file written by cat; "
            "released checkpoints go through cat.checkpoints.released first"
        ) from None
    return ModelFile(file, tensors, int(metadata["step"]) if "step" in metadata else None, model, features, config)


def classifier_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a fine-tuned checkpoint is used: the average of its weights, ``average.*``, where it was kept, else the
    weights themselves, ``encoder.*`` and ``head.*``."""
    average = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
    return average or dict(tensors)


def _encoder_tensors(tensors: Mapping[str, Tensor], weights: str, encoder: Encoder, file: Path) -> Mapping[str, Tensor]:
    own = _below(weights, tensors)
    if own or not tensors:
        return own
    fine_tuned = _below("encoder", classifier_tensors(tensors))
    if fine_tuned and weights == "student":
        return fine_tuned
    if fine_tuned:
        raise CheckpointError(f"{file} is fine-tuned, and has one encoder, without a teacher; use weights='student'")
    if tensors.keys() == encoder.state_dict().keys():
        if weights == "student":
            return tensors
        raise CheckpointError(f"{file} holds one encoder, without a teacher; use weights='student'")
    kinds = Counter(name.partition(".")[0] for name in tensors)
    listed = ", ".join(f"{kind}.* ({count})" for kind, count in kinds.most_common(5))
    raise CheckpointError(
        f"{file} has no tensors {weights}.*; it holds {listed}{' and others' if len(kinds) > 5 else ''}, the first is "
        f"{next(iter(tensors))}; expected the names of a pre-training checkpoint, or of the encoder alone"
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def chosen(run_dir: PathLike) -> Path | None:
    """The checkpoint that a run offers: of fine-tuning the best on its validation split, of pre-training the newest."""
    last = newest(run_dir)
    if last is None or "classes" not in read_state(last)["config"]:
        return last
    return best(run_dir) or last


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected a run directory, a checkpoint directory or a .safetensors file"
        )
    if (path / MODEL).exists() or (path / STATE).exists():
        return path / MODEL
    checkpoint = chosen(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; expected a run directory with checkpoints/step-*, a checkpoint directory or "
            "a .safetensors file"
        )
    return checkpoint / MODEL
