"""Released files of frozen encoders: their tensors and settings, and how they come into a network of ours.

Sizes are read from the tensors' shapes; what leaves no trace there is checked against the settings in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cat.checkpoints.foreign import read_foreign
from cat.checkpoints.store import CheckpointError, load_tensors, unwrapped

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Weights:
    """What a file holds; `family` and `path` are for messages."""

    family: str
    path: Path
    tensors: dict[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Raises: `CheckpointError` where there is no such tensor, or one of another rank."""
        if name not in self.tensors:
            some = ", ".join(sorted(self.tensors)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.path} has no tensor {name}; expected a released file of {self.family}. It holds "
                f"{len(self.tensors)} tensors, among them {some}"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise CheckpointError(f"{self.path}: {name} has shape {shape}; {self.family}'s has {dims} dimensions")
        return shape

    def depth(self, prefix: str) -> int:
        """Blocks ``prefix.0.`` to ``prefix.N.``."""
        numbered = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
        return 1 + max((int(found[1]) for name in self.tensors if (found := numbered.match(name))), default=-1)

    def without(self, unused: str) -> Weights:
        """Without the tensors whose names match the pattern from their beginning."""
        kept = {name: tensor for name, tensor in self.tensors.items() if not re.match(unused, name)}
        return Weights(self.family, self.path, kept, self.settings)

    def check_settings(self, expected: Mapping[str, Any]) -> None:
        """Raises: `CheckpointError` where the file's settings are others; what they do not say is as expected."""
        for name, value in expected.items():
            if self.settings.get(name, value) != value:
                raise CheckpointError(
                    f"{self.path} was trained with {name}={self.settings[name]!r}; only {self.family} with "
                    f"{name}={value!r}, as released, can be read"
                )

    def into(self, build: Callable[[], Network], device: torch.device | str) -> Network:
        """The network, frozen, with exactly these tensors. It is not initialised first: 1.2 billion parameters would
        take a while. Its state dict must hold all that it computes with. (An nn.Embedding's normal_ on the meta device
        imports 880 modules, sympy among them.)

        Raises: `CheckpointError` that names what is missing, unknown or of another shape.
        """
        with torch.device("meta"):
            network = build()
        network = network.to_empty(device=device)
        load_tensors(network, self.tensors, str(self.path))
        return network.eval().requires_grad_(False)


def read_weights(path: str | Path, family: str, *, settings: str | None = None) -> Weights:
    """Of ``{"model": tensors, settings: {...}}`` as released, or of the tensors alone (a ``.safetensors`` file).

    Raises: as `read_foreign`; `CheckpointError` where there are no tensors.
    """
    path = Path(path)
    content = read_foreign(path)
    model = content.get("model", content) if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in model.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} without tensors under 'model'; expected a released file of "
            f"{family}"
        )
    found = content.get(settings) if settings is not None else None
    return Weights(family, path, unwrapped(tensors, str(path)), found if isinstance(found, Mapping) else {})
