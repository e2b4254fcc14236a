"""Schedules at their corners, weight decay groups, clipping, and optimiser state that comes back exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from cat.model import ObjectiveConfig
from cat.training.optim import (
    EmaConfig,
    OptimConfig,
    build_optimizer,
    clip_gradients,
    ema_decay,
    learning_rate,
    optimizer_tensors,
    regularisation_weight,
    restore_optimizer,
    set_learning_rate,
    trainable,
)


def test_learning_rate_rises_to_lr_and_falls_to_nothing():
    config = OptimConfig(lr=1.0, warmup_steps=10, steps=110)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0
    assert max(rates) == 1.0
    assert rates[60] == pytest.approx(0.5)  # half way down
    assert rates[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[110] == pytest.approx(0.0, abs=1e-15)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_learning_rate_without_warm_up_and_with_nothing_else():
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0, steps=5), 0) == 2.0
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=5, steps=5), 4) == pytest.approx(2.0 * 5 / 6)


def test_ema_decay_is_linear_then_constant():
    config = EmaConfig(0.9998, 0.99999, 100_000)
    assert ema_decay(config, 0) == pytest.approx(0.9998, abs=1e-12)
    assert ema_decay(config, 50_000) == pytest.approx((0.9998 + 0.99999) / 2, abs=1e-12)
    assert ema_decay(config, 100_000) == ema_decay(config, 10**9) == 0.99999
    assert ema_decay(EmaConfig(0.5, 0.9, 0), 0) == 0.9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0] * 6),
        ("warmup", [0.4, 0.8, 1.2, 1.6, 2.0, 2.0]),
        ("decay", [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        ("stop", [2.0, 2.0, 2.0, 2.0, 0.0, 0.0]),
    ],
)
def test_weight_of_the_regularisation(schedule, expected):
    config = ObjectiveConfig(regularisation_weight=2.0, regularisation_schedule=schedule, regularisation_steps=4)
    assert [regularisation_weight(config.regularisation, step) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"warmup_steps": 11, "steps": 10}, "warmup_steps is 11"),
        ({"steps": 0, "warmup_steps": 0}, "steps is 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_norm": -1.0}, "clip_norm is -1"),
    ],
)
def test_impossible_settings(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


def test_impossible_ema():
    with pytest.raises(ValueError, match=r"start is 1\.5"):
        EmaConfig(start=1.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 1)
        self.cls = nn.Parameter(torch.randn(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def loss(self, seed: int) -> torch.Tensor:
        x = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
        return self.linear(self.norm(self.conv(x).mean((2, 3)) + self.cls)).square().mean()


def decay_of_each(on):
    net = Net()
    optimizer = build_optimizer(trainable(net), OptimConfig(weight_decay=0.3, weight_decay_on=on))
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_weight_decay_spares_vectors_and_the_frozen_are_not_trained():
    assert decay_of_each("matrices") == {
        "conv.weight": 0.3, "linear.weight": 0.3, "cls": 0.0,
        "conv.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "linear.bias": 0.0,
    }  # fmt: skip


def test_weight_decay_of_the_released_code_spares_nothing():
    decay = decay_of_each("all")
    assert set(decay.values()) == {0.3}
    assert decay.keys() == decay_of_each("matrices").keys()


def test_clipping_gives_the_norm_before():
    parameter = nn.Parameter(torch.zeros(2))
    for clip_norm, after in ((4.0, 4.0), (10.0, 5.0), (0.0, 5.0)):
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients([parameter], clip_norm).item() == 5.0
        assert parameter.grad.norm().item() == pytest.approx(after, rel=1e-5)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        set_learning_rate(optimizer, 0.1 / (step + 1))
        loss = net.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_state_restored_by_name_continues_bit_for_bit():
    net = Net()
    optimizer = build_optimizer(trainable(net), OptimConfig())
    train(net, optimizer, range(3))
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer_tensors(optimizer, trainable(net)).items()}
    assert state["step.cls"].item() == 3
    through = train(net, optimizer, range(3, 8))

    other = Net()
    other.load_state_dict(weights)
    resumed = build_optimizer(trainable(other), OptimConfig())
    restore_optimizer(resumed, trainable(other), state)
    assert train(other, resumed, range(3, 8)) == through
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_state_that_does_not_fit():
    net = Net()
    optimizer = build_optimizer(trainable(net), OptimConfig())
    train(net, optimizer, range(1))
    good = optimizer_tensors(optimizer, trainable(net))
    fresh = build_optimizer(trainable(net), OptimConfig())
    with pytest.raises(ValueError, match=r"lacks .* 1 parameters, first 'cls'"):
        restore_optimizer(fresh, trainable(net), {k: v for k, v in good.items() if k != "exp_avg.cls"})
    with pytest.raises(ValueError, match=r"exp_avg\.cls' has shape \(3,\); expected \(4,\)"):
        restore_optimizer(fresh, trainable(net), good | {"exp_avg.cls": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'exp_avg\.other' belongs to no trained parameter"):
        restore_optimizer(fresh, trainable(net), good | {"exp_avg.other": torch.zeros(3)})
