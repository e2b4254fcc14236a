"""What checkpoints hold and whether they are whole, without training or hearing anything.

A path is a run, which stands for all its checkpoints, a checkpoint, a folder of `cat.checkpoints.hub`, or a
.safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cat.checkpoints.store as store
from cat.checkpoints.classifier import load_classifier
from cat.checkpoints.encoder import load_encoder
from cat.checkpoints.store import CheckpointError, PathLike

_VALUES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorInfo:
    """Of a tensor, without its values."""

    dtype: str  # as safetensors names it: "F32"
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        return self.values * _VALUES.get(self.dtype, 1)


@dataclass(frozen=True)
class Row:
    """A checkpoint in a list; what is not known is None."""

    path: Path
    step: int | None
    score: float | None  # lower is better
    bytes: int
    newest: bool
    best: bool
    damage: str | None  # that shows without reading the tensors


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint or file."""

    path: Path
    step: int | None
    config: Mapping[str, Any]
    state: Mapping[str, Any]  # of state.json; empty of a single file
    files: Mapping[str, Mapping[str, TensorInfo]]  # file's name -> its tensors
    about: Mapping[str, str]  # the rest of a single file's metadata


def members(path: PathLike) -> list[Path]:
    """The checkpoints of a run, oldest first, or the checkpoint or file itself. Raises: `CheckpointError`."""
    path = Path(path)
    found = store.list_checkpoints(path / "checkpoints") or store.list_checkpoints(path)
    if found:
        return found
    if path.is_file() or (path / store.STATE).exists() or (path / store.MODEL).exists():
        return [path]
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path} {what}; expected a run with checkpoints/step-*, a checkpoint, or a .safetensors file"
    )


def listed(path: PathLike) -> list[Row]:
    """A row for each of `members`."""
    paths = members(path)
    scores = {p: score for p in paths if (score := _state(p).get("score")) is not None}
    best = min(scores, key=lambda p: (scores[p], p.name)) if scores else None
    rows = []
    for p in paths:
        damage = None
        try:
            step = contents(p).step
            size = sum(file.stat().st_size for file in ([p] if p.is_file() else p.iterdir()) if file.is_file())
        except FileNotFoundError:  # a run that goes on has deleted it
            continue
        except CheckpointError as error:
            if not p.exists():
                continue
            step, damage, size = _state(p).get("step"), str(error), 0
        rows.append(Row(p, step, scores.get(p), size, p == paths[-1], p == best, damage))
    return rows


def contents(path: PathLike) -> Contents:
    """Reads names, shapes and state, not the tensors. Raises: `CheckpointError`."""
    path = Path(path)
    if (path / store.STATE).exists() or path.name.startswith("step-"):
        state = store.read_state(path)
        files = {name: _headers(path / name)[0] for name in store.TENSORS}
        return Contents(path, state["step"], state["config"], state, files, {})
    file = path / store.MODEL if path.is_dir() else path
    tensors, metadata = _headers(file)
    step = int(metadata["step"]) if metadata.get("step", "").isdigit() else None
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError:
        config = {}
    about = {key: value for key, value in metadata.items() if key not in ("step", "config", "format")}
    return Contents(path, step, config if isinstance(config, dict) else {}, {}, {file.name: tensors}, about)


def verify(path: PathLike) -> list[str]:
    """Read a checkpoint or file whole; what is wrong with it.

    It must be complete, its bytes those that were written (checkpoints of version 0.1 and single files have no
    checksums), its files of one step, all values finite, and its tensors those of the model that it says it is.
    """
    path = Path(path)
    try:
        if path.is_file() or not (path / store.STATE).exists():
            file = path if path.is_file() else path / store.MODEL
            tensors = {file.name: store.read_tensors(file)[0]}
        else:
            found = store.load(path)
            tensors = {store.MODEL: found.model, store.OPTIMIZER: found.optimizer}
    except CheckpointError as error:
        return [str(error)]
    problems = [problem for name, group in tensors.items() for problem in _not_finite(name, group)]
    if store.OPTIMIZER in tensors:
        problems += _moments_of_nothing(tensors[store.MODEL], tensors[store.OPTIMIZER])
    try:
        if "head" in contents(path).config:
            load_classifier(path)
        elif any(name.startswith("teacher.") for name in next(iter(tensors.values()))):
            load_encoder(path, "student")
            load_encoder(path, "teacher")
        else:
            load_encoder(path)
    except (CheckpointError, ValueError) as error:
        problems.append(str(error))
    return problems


def _not_finite(file: str, tensors: Mapping[str, Tensor]) -> list[str]:
    counts = {name: t.numel() - int(t.isfinite().sum()) for name, t in tensors.items() if t.is_floating_point()}
    return [
        f"{file}: {count} of the {tensors[name].numel()} values of {name} are not finite"
        for name, count in counts.items()
        if count
    ]


def _moments_of_nothing(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key, tensor in optimizer.items():
        kind, _, name = key.partition(".")
        if name not in model:
            problems.append(f"{store.OPTIMIZER}: {key} belongs to no tensor of {store.MODEL}")
        elif kind != "step" and tensor.shape != model[name].shape:
            problems.append(f"{store.OPTIMIZER}: {key} is {tuple(tensor.shape)}, expected {tuple(model[name].shape)}")
    return problems


def _headers(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Names and shapes of the tensors, and the metadata."""
    with store.opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        tensors = {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        return tensors, dict(file.metadata() or {})


def _state(path: Path) -> Mapping[str, Any]:
    """As far as it can be read."""
    try:
        return store.read_state(path)
    except CheckpointError:
        return {}
