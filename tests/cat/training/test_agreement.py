"""Whole runs of the tiny model with the kernels and with the dense formula: their losses agree within noise.

Needs no more than PyTorch and pytest, so that it runs on a bare machine with a GPU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cat.data import FeatureConfig, log_mel
from cat.data.masks import MaskConfig, inverse_block_masks
from cat.data.synth import clip_rng
from cat.experiments.kernels import AGREEMENT, agreement
from cat.model import CAT, PRESETS, ObjectiveConfig
from cat.sounds import CLASSES, make_clip
from cat.training.optim import EmaConfig, OptimConfig, ema_decay, learning_rate
from cat.training.pretraining import LOSSES
from cat.training.step import PretrainStep

STEPS = 300
OPTIM = OptimConfig(lr=3e-4, warmup_steps=30, steps=STEPS)
EMA = EmaConfig(start=0.99, end=0.999, steps=STEPS)


@pytest.fixture(scope="module")
def specs():
    """Spectrograms of five synthetic clips of every class, (n, 1, 64, 128)."""
    config = FeatureConfig(frames=64)
    waves = (make_clip(clip_rng(0, "train", c, i), c, (1.0, 1.0), (10.0, 35.0))[0] for c in CLASSES for i in range(5))
    return torch.cat([log_mel(torch.from_numpy(wave[:1].astype(np.float32)), config) for wave in waves])


def train(kernels, specs, *, seed, steps, precision):
    """Train rows of a run. The weights are the same for every seed."""
    torch.manual_seed(0)
    model = CAT(dataclasses.replace(PRESETS["tiny"], kernels=kernels), ObjectiveConfig(global_loss_reduction="mean"))
    update = PretrainStep(model.to(specs.device).train(), OPTIM, precision=precision)
    rows = []
    for step in range(steps):
        order = torch.Generator().manual_seed(1000 * seed + step)
        clips = torch.randperm(len(specs), generator=order)[:4]
        visible = inverse_block_masks(MaskConfig(num_masks=2), (4, 8), seed=seed, step=step, clips=clips)
        clips, visible, rng = (t.to(specs.device) for t in (clips, visible, torch.tensor([seed, step << 32])))
        lr, decay = learning_rate(OPTIM, step), ema_decay(EMA, step + 1)
        rows.append(update(specs[clips], visible, None, rng, lr=lr, decay=decay).clone())
    return [dict(zip((*LOSSES, "grad_norm"), row, strict=True)) for row in torch.stack(rows).tolist()]


@pytest.mark.parametrize(
    ("device", "kernels", "precision", "steps"),
    [
        ("cpu", "reference", "fp32", 8),
        pytest.param("cuda", "triton", "bf16", STEPS, marks=pytest.mark.gpu),
    ],
)
def test_losses_agree_within_the_noise_of_a_reseeded_run(specs, device, kernels, precision, steps):
    specs, how = specs.to(device), {"steps": steps, "precision": precision}
    curves = {name: train(name, specs, seed=0, **how) for name in ("dense", kernels)}
    curves |= {f"re-seeded {seed}": train("dense", specs, seed=seed, **how) for seed in (1, 2)}
    for key, row in agreement(curves, kernels).items():
        assert row["noise"] > 0, key
        assert row["difference"] <= AGREEMENT[precision] * row["noise"], (key, row)
        assert row["largest"] <= row["noise"], (key, row)
    losses = [row["loss"] for row in curves[kernels]]
    assert losses[-1] < losses[0]


def test_agreement_compares_running_means():
    dense = np.linspace(20, 10, 40)
    wave = np.sin(np.arange(40))
    lines = {"dense": dense, "k": dense + 0.01, "other": dense + 2.0, "another": dense - 1.0}
    curves = {
        name: [{"loss": v, "regression": v / 2 + w, "global": v / 2 - w} for v, w in zip(line, wave, strict=True)]
        for name, line in lines.items()
    }
    found = agreement(curves, "k")
    assert found["loss"] == pytest.approx(
        {"first": 0.01, "difference": 0.01, "largest": 0.01, "noise": np.sqrt((4 + 1) / 2)}
    )
    assert found["global"] == pytest.approx({name: value / 2 for name, value in found["loss"].items()})
    curves["k"][9]["loss"] += 1.0  # shows in the mean of two steps, twice
    row = agreement(curves, "k")["loss"]
    assert row["largest"] == pytest.approx(0.51)
    assert row["difference"] == pytest.approx(np.sqrt((38 * 0.01**2 + 2 * 0.51**2) / 40))
