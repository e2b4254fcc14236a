"""Losses of fine-tuning, each as a sum and what it is divided by.

Shapes: B clips, H rows of patches, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cat.model import ClassifierOutput


@dataclass(frozen=True)
class LossConfig:
    """How the loss of a batch comes from those of its clips and classes."""

    over: Literal["clips", "positives", "mean"] = "clips"
    """What the sum is divided by: the number of clips, of positive labels (as released for AudioSet; mixed labels count
    by their share), or of clips times classes. With cross-entropy "clips" alone."""
    label_smoothing: float = 0.0
    """Of cross-entropy, in training only: so much of every target is spread evenly over the classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected 0 (off) to below 1")


def cross_entropy(logits_BC: Tensor, targets_BC: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,): of targets that may be mixed, and are then smoothed."""
    return F.cross_entropy(logits_BC.float(), targets_BC, reduction="none", label_smoothing=smoothing)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of every class on its own, in the shape of ``logits``."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")


def of_frames(
    output: ClassifierOutput, targets_BC: Tensor, frame_targets_BHC: Tensor, frame_weights_BH: Tensor
) -> Tensor:
    """(B, C): a clip's mean over the rows whose targets are known (weight 1); of a clip without any such row, the loss
    of its pooled probability."""
    if output.frames is None:
        raise ValueError("frame targets for a classifier without frames; expected HeadConfig(kind='frames')")
    weight_BH1 = frame_weights_BH[:, :, None]
    known_B1 = weight_BH1.sum(1)
    rows_BC = (binary_cross_entropy(output.frames, frame_targets_BHC) * weight_BH1).sum(1) / known_B1.clamp(min=1)
    return torch.where(known_B1 > 0, rows_BC, binary_cross_entropy(output.clip, targets_BC))


def reduced(losses: Tensor, targets_BC: Tensor, over: Literal["clips", "positives", "mean"]) -> tuple[Tensor, Tensor]:
    """The sum of losses (B,) or (B, C), and what it is divided by; both 0-dim. The loss of several batches is the
    quotient of the sums of both."""
    return losses.sum(), counted(targets_BC, over).clamp(min=1)


def counted(targets_BC: Tensor, over: Literal["clips", "positives", "mean"]) -> Tensor:
    """What the sum of the losses of these clips is divided by, 0-dim, should it not be 0."""
    if over == "positives":
        return targets_BC.sum()
    return targets_BC.new_full((), targets_BC.shape[0] if over == "clips" else targets_BC.numel())
