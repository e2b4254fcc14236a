"""The average of several checkpoints of one model, as one file.

Each tensor is averaged by itself: with equal weights (arXiv 1803.05407, 2203.05482), or as the moving average
a = d a + (1 - d) w over the checkpoints in the order of their steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat.checkpoints.encoder import ModelFile, read_model
from cat.checkpoints.inspection import contents
from cat.checkpoints.store import CheckpointError, PathLike, save_tensors

AVERAGED = "averaged"  # in the file's metadata: what it is the average of


@dataclasses.dataclass(frozen=True)
class Average:
    """A model, and the files that it is the average of."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]  # of the last one
    of: tuple[Path, ...]
    shares: tuple[float, ...]  # which add up to 1

    def save(self, path: PathLike) -> None:
        """As one .safetensors file, which every command takes for a model."""
        of = [{"file": str(file), "share": share} for file, share in zip(self.of, self.shares, strict=True)]
        save_tensors(path, self.tensors, config=self.config, about={AVERAGED: json.dumps(of)})


def average(paths: Sequence[PathLike], *, ema: float | None = None) -> Average:
    """Of two or more checkpoints or .safetensors files, in the order of their steps; in the given order where a file
    has none. ``ema``: the decay d of a moving average; None: equal weights.

    Sums are taken in float64 and rounded once.

    Raises: `CheckpointError` naming the files whose models differ, or a tensor that is not finite.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} checkpoint to average; expected two or more")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"the decay of the moving average is {ema}; expected a number between 0 and 1")
    shares = _shares(len(paths), ema)
    first, *others = _by_step(paths)
    model = read_model(first)
    sums = {name: shares[0] * tensor.double() for name, tensor in _averageable(model).items()}
    found = model
    files = [model.file]
    for path, share in zip(others, shares[1:], strict=True):
        found = read_model(path)
        _check_same(model, found)
        for name, tensor in _averageable(found).items():
            sums[name] += share * tensor.double()
        files.append(found.file)
    tensors = {name: sums[name].to(t.dtype) if name in sums else t for name, t in model.tensors.items()}
    return Average(tensors, found.config, tuple(files), shares)


def _by_step(paths: Sequence[PathLike]) -> list[PathLike]:
    steps = [contents(path).step for path in paths]
    known = [step for step in steps if step is not None]
    if len(known) < len(paths):
        return list(paths)
    return [path for _, path in sorted(zip(known, paths, strict=True), key=lambda entry: entry[0])]


def _shares(count: int, ema: float | None) -> tuple[float, ...]:
    if ema is None:
        return (1 / count,) * count
    return (ema ** (count - 1), *((1 - ema) * ema ** (count - 1 - i) for i in range(1, count)))


def _averageable(found: ModelFile) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in found.tensors.items() if tensor.is_floating_point()}
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(f"{found.file}: {bad} is not finite; leave that checkpoint out")
    return tensors


def _check_same(one: ModelFile, other: ModelFile) -> None:
    def refuse(what: str) -> None:
        raise CheckpointError(f"{one.file} and {other.file} {what}; expected checkpoints of one model")

    if dataclasses.replace(one.model, kernels="auto") != dataclasses.replace(other.model, kernels="auto"):
        refuse("are built differently (section model)")
    if one.features != other.features:
        refuse("hear other spectrograms (section features)")
    for key in ("head", "classes"):
        if one.config.get(key) != other.config.get(key):
            refuse(f"differ in their {key}")
    if strange := sorted(one.tensors.keys() ^ other.tensors.keys()):
        refuse(f"do not hold the same tensors (only one has {strange[0]})")
    for name, tensor in one.tensors.items():
        same = other.tensors[name]
        if tensor.shape != same.shape or tensor.dtype != same.dtype:
            refuse(f"differ in the shape or dtype of {name}")
        if not tensor.is_floating_point() and not torch.equal(tensor, same):
            refuse(f"differ in {name}, whole numbers that have no average")
