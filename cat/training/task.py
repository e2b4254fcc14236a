"""What the loop is told of a task: pre-training, fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cat.data import Batch, Manifest
from cat.data.share import Share
from cat.distributed import Processes
from cat.training.recipe import Recipe

Warn = Callable[[str], None]


class Task(Protocol):
    """A model that learns from batches. Everything random in it is a function of the recipe and the step."""

    manifest: Manifest
    valid: Manifest | None
    identity: dict[str, Any]
    """JSON-able: the data; see `cat.training.identity`."""
    world: Processes
    share: Share
    """What this process computes of every batch."""
    device: torch.device
    parameters: dict[str, nn.Parameter]
    """What is trained, by name."""

    @property
    def command(self) -> str:
        """What resumes a run: "cat-audio pretrain"."""
        ...

    @property
    def one_shape(self) -> bool:
        """Whether the batches of all updates have the same shape."""
        ...

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the numbers an update gives, in order; "loss" and "grad_norm" are among them."""
        ...

    @property
    def config(self) -> Recipe:
        """A checkpoint holds all of it."""
        ...

    @property
    def precision(self) -> str: ...

    @property
    def model(self) -> nn.Module:
        """Its state dict is a checkpoint's."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the weights are of one step; not so after an error in the middle of an update."""
        ...

    @property
    def made_with(self) -> dict[str, Any]:
        """What bit-for-bit equality depends on besides configuration and data."""
        ...

    def begin(self) -> None:
        """Make the model ready for its first update; not called where a checkpoint is taken up."""
        ...

    def advice(self) -> list[str]:
        """What people should know before the first update; asked for whenever a run begins or goes on."""
        ...

    def train_mode(self) -> None: ...

    def batches(self, start: int, count: int, warn: Warn) -> Iterator[list[Batch]]:
        """This process's pieces of the updates that follow ``start`` others."""
        ...

    def train(self, pieces: Sequence[Batch], step: int) -> tuple[Tensor, dict[str, float]]:
        """The update that follows ``step`` others, without waiting for the device: its `values`, those of the whole
        batch, and what else is to be recorded of it."""
        ...

    def flops(self, batch: Batch) -> int:
        """Of the matrix products, convolutions and attention of its update; asked for where a device's peak is
        known."""
        ...

    def derived(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What follows from an update's numbers and is recorded with them."""
        ...

    def warnings(self, rows: list[dict[str, Any]]) -> list[str]:
        """What people should know of the updates just recorded."""
        ...

    def scoring_batches(self, warn: Warn) -> Iterator[Batch]:
        """Every clip of `valid` once, in one of the processes; batches may be empty where there are several."""
        ...

    def evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """The numbers of one evaluation, of the batches of all processes, the same whenever the weights are the same.
        What ``batches`` raises passes through."""
        ...

    def told(self, values: Mapping[str, float]) -> str:
        """An evaluation in words: "loss 0.1234"."""
        ...

    def score(self, values: Mapping[str, float]) -> float:
        """What the best checkpoint is chosen by; lower is better."""
        ...

    def enough(self, evaluations: list[dict[str, Any]]) -> bool:
        """Whether the run is to end early, after all these evaluations."""
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold besides the model."""
        ...

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Raises: ValueError saying what does not fit."""
        ...
