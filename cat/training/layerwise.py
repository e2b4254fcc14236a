"""Optimiser and schedule of fine-tuning: AdamW whose rate falls from the head down to the stem.

Block i of N learns at ``layer_decay ** (N - i)`` of the head's rate, what lies before the blocks at
``layer_decay ** (N + 1)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cat.training.optim import check_adamw, decays


@dataclass(frozen=True)
class FinetuneOptimConfig:
    """AdamW with a warm-up from ``warmup_lr``, and a cosine to ``min_lr``; the defaults are published, but for what
    `decay_stem`, `scale_minimum` and `weight_decay_on` say."""

    lr: float = 5e-5
    """Of the head, at its peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_on: Literal["all", "matrices"] = "matrices"
    """As in pre-training; the released recipes decay "all"."""
    layer_decay: float = 0.65
    decay_stem: bool = True
    """Whether stem, CLS token and the norm before the blocks have a lower rate too; released: no, they have the
    head's."""
    warmup_steps: int = 400
    steps: int = 4_000
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    scale_minimum: bool = True
    """Whether `warmup_lr` and `min_lr` are scaled like `lr`, so that all layers have one schedule; released: no, and a
    layer whose peak lies below `min_lr` keeps its peak throughout."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this global L2 norm; 0 leaves them alone."""
    drop_path: float = 0.1
    """Probability that a branch of the last block is left out for a clip; it rises linearly from 0 at the first."""
    average: float = 0.0
    """Decay of a moving average of the weights, for example 0.999; it is what is evaluated then, and what a checkpoint
    offers. 0: none."""
    patience: int = 0
    """Stop after so many evaluations in a row without a better one; 0: never."""

    def __post_init__(self) -> None:
        check_adamw(self)
        for name in ("warmup_lr", "min_lr"):
            if not 0 <= getattr(self, name) <= self.lr:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to lr ({self.lr})")
        if self.patience < 0:
            raise ValueError(f"patience is {self.patience}; expected 0 or more")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; expected above 0, at most 1 (no decay)")
        for name in ("drop_path", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 (off) to below 1")


def layer_scale(name: str, depth: int, config: FinetuneOptimConfig) -> float:
    """The share of the head's rate that a parameter of `cat.model.Classifier` has."""
    if name.startswith("head."):
        return 1.0
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block:
        return config.layer_decay ** (depth - int(block[1]))
    return config.layer_decay ** (depth + 1) if config.decay_stem else 1.0


def scaled_rate(config: FinetuneOptimConfig, step: int, scale: float = 1.0) -> float:
    """The rate of the update that follows ``step`` updates, of parameters of this `layer_scale`."""
    peak = config.lr * scale
    start, end = (
        (config.warmup_lr * scale, config.min_lr * scale)
        if config.scale_minimum
        else (min(config.warmup_lr, peak), min(config.min_lr, peak))
    )
    if step < config.warmup_steps:
        return start + (peak - start) * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_layerwise(
    parameters: Mapping[str, nn.Parameter], depth: int, config: FinetuneOptimConfig
) -> torch.optim.AdamW:
    """AdamW with a group for every scale, with and without weight decay; a group's "scale" is its `layer_scale`."""
    if not parameters:
        raise ValueError("no parameters to optimise; expected at least one with requires_grad=True")
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        scale, decayed = layer_scale(name, depth, config), decays(parameter, config.weight_decay_on)
        group = groups.setdefault(
            (scale, decayed),
            {"params": [], "scale": scale, "weight_decay": config.weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_layer_rates(optimizer: torch.optim.Optimizer, config: FinetuneOptimConfig, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = scaled_rate(config, step, group["scale"])
