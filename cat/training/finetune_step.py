"""One optimiser step of fine-tuning: loss, backward, AdamW by layers, the average of the weights.

Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cat.data import Batch
from cat.distributed import Processes, current
from cat.model import Classifier, ClassifierOutput
from cat.parts import part
from cat.training.descent import LOW, Descent
from cat.training.layerwise import FinetuneOptimConfig, build_layerwise, set_layer_rates
from cat.training.losses import LossConfig, binary_cross_entropy, counted, cross_entropy, of_frames, reduced
from cat.training.optim import trainable
from cat.training.parallel import at_hand, gathering, is_sharded, local, replicated, shard, swapped
from cat.training.step import COMPILER


def frozen_parts(model: Classifier, freeze: int | Literal["encoder"]) -> list[nn.Module | nn.Parameter]:
    """What ``freeze`` leaves as it is: all of the encoder, or its lowest blocks and what lies before them."""
    encoder = model.encoder
    if freeze == "encoder":
        return [encoder]
    return [encoder.stem, encoder.cls, encoder.norm, *encoder.blocks[:freeze]] if freeze else []


class FinetuneStep:
    """A classifier with its optimiser; a call is one update.

    With ``optim.average`` the model gets a part ``average``, a classifier with the moving average of the weights: in
    the state dict beside the weights themselves.

    Args:
        precision: "bf16" and "fp16" run under autocast, "fp16" with scaled losses.
        compile: "blocks": torch.compile of the blocks, which see clips of all lengths in one shape; "step": of the
            whole classifier.
        pieces: as how many pieces a batch is computed, by all processes together.
        world: the processes that train the model together.
        parallel: how; with "fsdp" each is left a shard of the classifier and of its average alike.
    """

    def __init__(
        self,
        model: Classifier,
        optim: FinetuneOptimConfig,
        loss: LossConfig,
        *,
        freeze: int | Literal["encoder"] = 0,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        compile: Literal["none", "blocks", "step"] = "none",
        pieces: int = 1,
        world: Processes | None = None,
        parallel: Literal["ddp", "fsdp"] = "ddp",
    ) -> None:
        self.model, self.optim, self.loss = model, optim, loss
        self._pieces, self._world = pieces, world or current()
        self.device = model.encoder.cls.device
        self._frozen = frozen_parts(model, freeze)
        for frozen in self._frozen:
            frozen.requires_grad_(False)
        self.scored = model  # what is evaluated
        if optim.average:
            self.scored = model.average = copy.deepcopy(model).requires_grad_(False)
        if parallel == "fsdp" and self._world.several:
            average = None if self.scored is model else self.scored
            shard(model, self._world, blocks=model.encoder.blocks, kept=average)
        self.parameters = trainable(model)
        self.optimizer = build_layerwise(self.parameters, len(model.encoder.blocks), optim)
        self.descent = Descent(self.optimizer, self.parameters, optim.clip_norm, precision=precision)
        if optim.average:
            averages = dict(self.scored.named_parameters())
            self._averages = [averages[name] for name in self.parameters]
            self._average = get_ema_multi_avg_fn(optim.average)
        # A sharded model computes as a whole, and its average is a part of it: see `scoring`.
        self._scored = model if is_sharded(model) else self.scored
        self._low = LOW.get(precision)
        self._forward = (
            cast(nn.Module, torch.compile(model, backend=COMPILER, dynamic=False)) if compile == "step" else model
        )
        if compile == "blocks":
            for block in model.encoder.blocks:
                block.compile(dynamic=False, backend=COMPILER)
        self.whole = True  # False after an error between two parts of an update: the weights fit no step

    def train_mode(self) -> None:
        self.model.train()
        for frozen in self._frozen:
            if isinstance(frozen, nn.Module):
                frozen.eval()

    @functools.cached_property
    def _trained(self) -> nn.Module:
        """Made at the first update, when the weights are those that the run begins or goes on with."""
        return replicated(self._forward, self._world)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """For evaluations: each process may compute other batches, or none."""
        with contextlib.ExitStack() as stack:
            if self._scored is not self.scored:
                stack.enter_context(swapped(self._averages, list(self.parameters.values())))
            stack.enter_context(at_hand(self.model))
            yield

    def outputs(
        self, batch: Batch, keep: Tensor | None = None, *, scored: bool = False, trained: bool = False
    ) -> ClassifierOutput:
        """``scored``: of the weights that are evaluated; ``trained``: for a backward that all processes do together."""
        module = self._scored if scored else self._trained if trained else self._forward
        with torch.autocast(self.device.type, self._low, enabled=self._low is not None), part("forward, rest"):
            return module(batch.spec, rows=batch.rows, keep=keep)

    def losses(self, output: ClassifierOutput, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """As `cat.training.losses.reduced`."""
        targets = batch.targets
        if targets is None:
            raise ValueError("a batch without targets; expected one of cat.data.finetuning")
        if self.model.config.loss == "ce":
            losses = cross_entropy(output.clip, targets, smoothing)
        elif batch.frame_targets is not None and batch.frame_weights is not None:
            losses = of_frames(output, targets, batch.frame_targets, batch.frame_weights)
        else:
            losses = binary_cross_entropy(output.clip, targets)
        return reduced(losses, targets, self.loss.over)

    def __call__(self, batch: Batch, keep: Tensor | None, *, step: int) -> Tensor:
        """`of_pieces` of a whole batch."""
        return self.of_pieces([(batch, keep)], step=step)

    def of_pieces(self, pieces: Sequence[tuple[Batch, Tensor | None]], *, step: int) -> Tensor:
        """The update that follows ``step`` others, on this process's pieces of its batch. Returns the loss and
        `Descent.numbers`, float32."""
        set_layer_rates(self.optimizer, self.optim, step)
        count = self._count([batch for batch, _ in pieces])
        told: list[Tensor] = []
        for batch, keep in pieces:
            with gathering(self._trained, last=len(told) + 1 == len(pieces)):
                output = self.outputs(batch, keep, trained=True)
                with part("loss"):
                    loss = self.losses(output, batch, self.loss.label_smoothing)[0] / count
                self.descent.backward(loss)
            told.append(loss.detach().float())
        with part("optimiser"):
            loss = told[0] if self._pieces == 1 else self._world.mean_(torch.stack(told).sum())
            self.whole = False
            numbers = self.descent.step()
        if self.optim.average:
            with part("EMA"):
                self._average(local(self._averages), local(self.parameters.values()), 0)
        self.whole = True
        return torch.stack([loss, *(value.float() for value in numbers)])

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """What the sum of this process's losses is divided by, so that the mean over the processes is the loss of the
        whole batch."""
        counts = [counted(batch.targets, self.loss.over) for batch in batches if batch.targets is not None]
        if self._pieces == 1:
            return counts[0].clamp(min=1)
        own = torch.stack(counts).sum()
        if self.loss.over != "positives":  # pieces have as many of anything else
            return own
        return self._world.sum_(own).clamp(min=1) / self._world.size
