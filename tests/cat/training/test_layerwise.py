"""Rates, groups and decay of fine-tuning, against the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from cat.model import Classifier, HeadConfig, ModelConfig
from cat.training.layerwise import FinetuneOptimConfig, build_layerwise, layer_scale, scaled_rate, set_layer_rates
from cat.training.optim import trainable

MODEL = ModelConfig(channels=(8, 8), embed_dim=16, depth=3, num_heads=2, decoder_layers=0)
OURS = FinetuneOptimConfig(warmup_steps=400, steps=4_000)
RELEASED = FinetuneOptimConfig(
    warmup_steps=400, steps=4_000, decay_stem=False, scale_minimum=False, weight_decay_on="all"
)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(MODEL, HeadConfig(), 4)


def test_every_parameter_has_the_scale_of_its_layer(classifier):
    found = {name: layer_scale(name, 3, OURS) for name in trainable(classifier)}
    for name, scale in found.items():
        if name.startswith("head."):
            assert scale == 1
        elif ".blocks." in name:
            assert scale == 0.65 ** (3 - int(name.split(".")[2]))
        else:
            assert name.split(".")[1] in ("stem", "cls", "norm")
            assert scale == 0.65**4
    assert {name: layer_scale(name, 3, RELEASED) for name in found} == {
        name: 1 if ".blocks." not in name else scale for name, scale in found.items()
    }


@pytest.mark.parametrize("scale", [1.0, 0.65, 0.65**11])
def test_our_schedule_is_the_same_for_all_layers(scale):
    for step in (0, 1, 200, 399, 400, 401, 2_200, 3_999, 4_000):
        assert scaled_rate(OURS, step, scale) == pytest.approx(scale * scaled_rate(OURS, step), rel=1e-12)
    assert scaled_rate(OURS, 0) == 1e-6
    assert scaled_rate(OURS, 200) == pytest.approx((1e-6 + 5e-5) / 2)
    assert scaled_rate(OURS, 400) == 5e-5
    assert scaled_rate(OURS, 1_300) == pytest.approx(1e-6 + 4.9e-5 * (1 + math.cos(math.pi / 4)) / 2)
    assert scaled_rate(OURS, 4_000) == pytest.approx(1e-6)


def test_the_released_minimum_is_that_of_all_layers():
    peaks = [5e-5 * 0.65 ** (11 - i) for i in range(11)]
    assert [peak < 1e-6 for peak in peaks] == [True, True] + [False] * 9
    for i, peak in enumerate(peaks):
        rates = [scaled_rate(RELEASED, step, 0.65 ** (11 - i)) for step in (0, 200, 400, 2_200, 4_000)]
        if i < 2:
            assert rates == pytest.approx([peak] * 5, rel=1e-12)
        else:
            middle = (peak + 1e-6) / 2
            assert rates == pytest.approx([1e-6, middle, peak, middle, 1e-6], rel=1e-9)


@pytest.mark.parametrize("config", [OURS, RELEASED])
def test_groups_hold_every_parameter_once_with_its_rate_and_decay(classifier, config):
    parameters = trainable(classifier)
    optimizer = build_layerwise(parameters, 3, config)
    names = {id(parameter): name for name, parameter in parameters.items()}
    grouped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(parameters)
    set_layer_rates(optimizer, config, 777)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == scaled_rate(config, 777, layer_scale(names[id(parameter)], 3, config))
            decayed = config.weight_decay_on == "all" or parameter.ndim > 1
            assert group["weight_decay"] == (0.05 if decayed else 0.0)
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)


def test_an_update_moves_layers_by_their_rates(classifier):
    """AdamW's first update is lr x sign of the gradient, so that it shows the rate."""
    config = FinetuneOptimConfig(warmup_steps=0, steps=10, weight_decay=0)
    parameters = trainable(classifier)
    optimizer = build_layerwise(parameters, 3, config)
    set_layer_rates(optimizer, config, 0)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in parameters.items():
        moved = (before[name] - parameter.detach()).mean().item()
        assert moved == pytest.approx(5e-5 * layer_scale(name, 3, config), rel=0.05), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0}, "layer_decay is 0"),
        ({"layer_decay": 1.1}, r"layer_decay is 1\.1"),
        ({"min_lr": 1e-3}, r"min_lr is 0\.001; expected 0 to lr"),
        ({"warmup_lr": -1.0}, "warmup_lr"),
        ({"warmup_steps": 9, "steps": 8}, "warmup_steps is 9"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0"),
        ({"average": 1.0}, "average"),
        ({"patience": -1}, "patience"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptimConfig(**changes)
