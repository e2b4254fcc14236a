"""One optimiser step of fine-tuning: loss, backward, AdamW by layers, the average of the weights.

Nothing here waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cat.data import Batch
from cat.model import Classifier, ClassifierOutput
from cat.parts import part
from cat.training.descent import LOW, Descent
from cat.training.layerwise import FinetuneOptimConfig, build_layerwise, set_layer_rates
from cat.training.losses import LossConfig, binary_cross_entropy, cross_entropy, of_frames, reduced
from cat.training.optim import trainable
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
    ) -> None:
        self.model, self.optim, self.loss = model, optim, loss
        self.device = model.encoder.cls.device
        self._frozen = frozen_parts(model, freeze)
        for frozen in self._frozen:
            frozen.requires_grad_(False)
        self.parameters = trainable(model)
        self.optimizer = build_layerwise(self.parameters, len(model.encoder.blocks), optim)
        self.descent = Descent(self.optimizer, self.parameters, optim.clip_norm, precision=precision)
        self.scored = model  # what is evaluated
        if optim.average:
            self.scored = model.average = copy.deepcopy(model).requires_grad_(False)
            average = dict(self.scored.named_parameters())
            self._averages: list[Tensor | nn.Parameter] = [average[name].data for name in self.parameters]
            self._average = get_ema_multi_avg_fn(optim.average)
        self._low = LOW.get(precision)
        self._forward = torch.compile(model, backend=COMPILER, dynamic=False) if compile == "step" else model
        if compile == "blocks":
            for block in model.encoder.blocks:
                block.compile(dynamic=False, backend=COMPILER)
        self.whole = True  # False after an error between two parts of an update: the weights fit no step

    def train_mode(self) -> None:
        self.model.train()
        for frozen in self._frozen:
            if isinstance(frozen, nn.Module):
                frozen.eval()

    def outputs(self, batch: Batch, keep: Tensor | None = None, *, scored: bool = False) -> ClassifierOutput:
        """``scored``: of the weights that are evaluated."""
        with torch.autocast(self.device.type, self._low, enabled=self._low is not None), part("forward, rest"):
            return (self.scored if scored else self._forward)(batch.spec, rows=batch.rows, keep=keep)

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
        """The update that follows ``step`` others. Returns the loss and `Descent.numbers`, float32."""
        set_layer_rates(self.optimizer, self.optim, step)
        output = self.outputs(batch, keep)
        with part("loss"):
            total, count = self.losses(output, batch, self.loss.label_smoothing)
            loss = total / count
        self.descent.backward(loss)
        with part("optimiser"):
            self.whole = False
            numbers = self.descent.step()
        if self.optim.average:
            with part("EMA"):
                self._average(self._averages, _data(list(self.parameters.values())), 0)
        self.whole = True
        return torch.stack([value.detach().float() for value in (loss, *numbers)])


def _data(parameters: Sequence[nn.Parameter]) -> list[Tensor | nn.Parameter]:
    return [parameter.data for parameter in parameters]
