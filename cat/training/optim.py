"""Optimiser, schedules and gradient clipping of pre-training (paper, section Implementation details)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cat.model import SCHEDULES, Regularisation
from cat.training.parallel import joint, share_of


class AdamW(Protocol):
    """What the optimisers of all tasks have among their settings."""

    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def steps(self) -> int: ...


def check_adamw(config: AdamW) -> None:
    """Raises: ValueError that names the setting."""
    if config.steps < 1:
        raise ValueError(f"steps is {config.steps}; expected at least 1")
    if not 0 <= config.warmup_steps <= config.steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps}; expected 0 to steps ({config.steps}): shorten the warm-up or "
            "lengthen the run"
        )
    if config.lr <= 0 or config.eps <= 0:
        raise ValueError(f"lr is {config.lr} and eps is {config.eps}; expected both above 0")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"betas is {config.betas}; expected two numbers in [0, 1)")
    if config.weight_decay < 0 or config.clip_norm < 0:
        raise ValueError(
            f"weight_decay is {config.weight_decay} and clip_norm is {config.clip_norm}; expected neither below 0"
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine to 0; the defaults are published, but for `weight_decay_on`."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_on: Literal["all", "matrices"] = "matrices"
    """"all": every parameter, biases and norms too, which is what the released code does (it asks for none on vectors,
    but its composite optimiser looks for that under a key that does not exist). "matrices": tensors of two dimensions
    and more: matrices, kernels, the CLS token."""
    warmup_steps: int = 53_333
    steps: int = 400_000
    """Length of the run: the cosine reaches 0 here."""
    clip_norm: float = 4.0
    """Gradients are scaled down to this global L2 norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        check_adamw(self)


@dataclass(frozen=True)
class EmaConfig:
    """The teacher's decay: linear from ``start`` to ``end`` over ``steps`` updates, then ``end``."""

    start: float = 0.9998
    end: float = 0.99999
    steps: int = 100_000

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1):
            raise ValueError(f"start is {self.start} and end is {self.end}; expected both in [0, 1]")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; expected 0 (decay is `end` throughout) or more")


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of the update that follows ``step`` updates.

    Rises linearly to ``lr`` at ``warmup_steps``, then falls along a cosine that would reach 0 at ``steps``. The first
    update already has a rate above 0 (the released code spends its first update at 0).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(config: EmaConfig, step: int) -> float:
    """The teacher's decay after ``step`` updates."""
    if step >= config.steps:
        return config.end
    return config.end - (config.end - config.start) * (1.0 - step / config.steps)


def regularisation_weight(term: Regularisation, step: int) -> float:
    """What an L_r counts in the update that follows ``step`` others."""
    return term.weight * SCHEDULES[term.schedule](step, term.steps)


def decays(parameter: Tensor, on: Literal["all", "matrices"]) -> bool:
    """Whether weight decay applies. 1-D tensors are biases and the weights of norms."""
    return on == "all" or parameter.ndim > 1


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are optimised, by name; the teacher's are not among them."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def build_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimConfig, *, capturable: bool = False
) -> torch.optim.AdamW:
    """AdamW over two groups, with and without weight decay, one fused kernel a group where there is one.

    ``capturable``: for a CUDA graph; the rate is then a tensor on the parameters' device.
    """
    if not parameters:
        raise ValueError("no parameters to optimise; expected at least one with requires_grad=True")
    on = config.weight_decay_on
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if decays(p, on)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if not decays(p, on)], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    lr = torch.tensor(config.lr, device=groups[0]["params"][0].device) if capturable else config.lr
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True, capturable=capturable)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale gradients to a global L2 norm of at most ``clip_norm`` (0: never).

    Returns the norm before, 0-dim, still on the device.
    """
    return joint(nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm > 0 else math.inf))


# ---------------------------------------------------------------- state by name


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's whole state as named tensors, ``exp_avg.<parameter>`` and so on, ``step`` among them."""
    return {
        f"{kind}.{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, exactly.

    Raises: ValueError when a parameter has no state, a wrong shape, or there is state of no parameter.
    """
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise ValueError(f"optimiser state {key!r} belongs to no trained parameter of this model")
        if kind != "step" and value.shape != parameters[name].shape:
            raise ValueError(
                f"optimiser state {key!r} has shape {tuple(value.shape)}; expected {tuple(parameters[name].shape)}"
            )
        state.setdefault(index[id(parameters[name])], {})[kind] = (
            value if kind == "step" else share_of(value, parameters[name])
        )
    missing = [
        name for name, p in parameters.items() if set(state.get(index[id(p)], {})) != {"step", "exp_avg", "exp_avg_sq"}
    ]
    if missing:
        raise ValueError(
            f"optimiser state lacks step, exp_avg or exp_avg_sq of {len(missing)} parameters, first {missing[0]!r}"
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
