from __future__ import annotations

import pytest
import torch

from cat.model import Encoder, ModelConfig
from cat.training.drop_path import drop_path_factors


def test_rates_rise_linearly_and_the_mean_stays():
    keep = drop_path_factors(0.4, 5, 20_000, seed=3, step=7)
    assert keep.shape == (20_000, 5, 2)
    for block, rate in enumerate([0.0, 0.1, 0.2, 0.3, 0.4]):
        for branch in range(2):
            factors = keep[:, block, branch]
            assert set(factors.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
            assert (factors == 0).double().mean().item() == pytest.approx(rate, abs=0.02)
            assert factors.double().mean().item() == pytest.approx(1, abs=0.02)
    # two branches of a block are dropped independently
    both = (keep[:, 4] == 0).all(1).double().mean().item()
    assert both == pytest.approx(0.16, abs=0.02)


def test_a_function_of_seed_and_step():
    draw = drop_path_factors(0.5, 4, 8, seed=1, step=2)
    assert draw.equal(drop_path_factors(0.5, 4, 8, seed=1, step=2))
    assert not draw.equal(drop_path_factors(0.5, 4, 8, seed=1, step=3))
    assert not draw.equal(drop_path_factors(0.5, 4, 8, seed=2, step=2))


def test_frozen_blocks_keep_all():
    keep = drop_path_factors(0.9, 4, 100, seed=0, step=0, frozen=3)
    assert keep[:, :3].eq(1).all()
    assert keep[:, 3].eq(0).any()


def test_one_block_has_the_rate_of_the_first():
    assert drop_path_factors(0.5, 1, 100, seed=0, step=0).eq(1).all()


def test_a_dropped_branch_gives_no_gradient():
    encoder = Encoder(ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_layers=0))
    keep = torch.ones(2, 2, 2)
    keep[:, 1, 1] = 0  # the MLP of the last block
    encoder(torch.randn(2, 1, 32, 128), keep=keep).square().sum().backward()
    assert encoder.blocks[1].fc1.weight.grad.abs().sum() == 0
    assert encoder.blocks[1].qkv.weight.grad.abs().sum() > 0
