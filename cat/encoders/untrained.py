"""Controls: an encoder around the same network with random weights.

A network of ours has the method ``initialise()``, which draws its weights as its authors did before they trained it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Encoder = TypeVar("Encoder", bound=Any)


@contextlib.contextmanager
def drawing(seed: int) -> Iterator[None]:
    """PyTorch draws as after `seed`, on the CPU; then its generators are as they were, those of GPUs too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' for good
        yield


def untrained_twin(encoder: Encoder, seed: int, build: Callable[[], nn.Module]) -> Encoder:
    """A copy of the encoder around the network that `build` draws on the CPU, so that it is the same on any device."""
    with drawing(seed):
        network = build()
    twin = copy.copy(encoder)
    twin.model = network.to(encoder.device).eval().requires_grad_(False)
    twin.name = f"untrained:{seed}:{encoder.name}"
    return twin


def drawn_again(network: nn.Module) -> nn.Module:
    """A copy on the CPU with random weights, of a network with ``initialise()``."""
    fresh = copy.deepcopy(network).cpu()
    with torch.no_grad():
        fresh.initialise()  # type: ignore[operator]
    return fresh


def initialise_layers(network: nn.Module, weight: Callable[[Tensor], Tensor]) -> None:
    """Linear layers by `weight`, without bias; norms to pass on what they normalise."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            weight(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm | nn.BatchNorm1d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
