"""Losses of fine-tuning against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from cat.model import ClassifierOutput
from cat.training.losses import LossConfig, binary_cross_entropy, cross_entropy, of_frames, reduced

B, H, C = 5, 4, 3


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(B, C, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> torch.Tensor:
    """Of mixed clips: soft, and with one clip that has none of the classes."""
    mixed = 0.3 * torch.eye(C)[[0, 1, 2, 0, 0]] + 0.7 * torch.eye(C)[[2, 1, 0, 0, 1]]
    mixed[4] = 0
    return mixed


def bce(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_mixed_targets(logits, targets, smoothing):
    targets = targets[:4]
    found = cross_entropy(logits[:4], targets, smoothing)
    for b in range(4):
        row = logits[b].double()
        log_p = row - row.logsumexp(0)
        smooth = (1 - smoothing) * targets[b].double() + smoothing / C
        assert found[b].item() == pytest.approx(-(smooth * log_p).sum().item(), rel=1e-5)
    total, count = reduced(found, targets, "clips")
    assert (total / count).item() == pytest.approx(found.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("over", ["clips", "positives", "mean"])
def test_binary_cross_entropy(logits, targets, over):
    expected = sum(bce(logits[b, c].item(), targets[b, c].item()) for b in range(B) for c in range(C))
    count = {"clips": B, "positives": targets.double().sum().item(), "mean": B * C}[over]
    total, divisor = reduced(binary_cross_entropy(logits, targets), targets, over)
    assert divisor.item() == pytest.approx(count)
    assert (total / divisor).item() == pytest.approx(expected / count, rel=1e-5)


def test_a_batch_without_positives_is_divided_by_one(logits):
    nothing = torch.zeros(B, C)
    total, divisor = reduced(binary_cross_entropy(logits, nothing), nothing, "positives")
    assert divisor.item() == 1
    assert total.isfinite()


def test_strong_labels_teach_frames_and_weak_ones_the_clip(logits, targets):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(B, H, C, generator=generator)
    frame_targets = (torch.rand(B, H, C, generator=generator) > 0.5).float()
    weights = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).float()
    frames.requires_grad_(True)
    logits.requires_grad_(True)
    found = of_frames(ClassifierOutput(logits, frames), targets, frame_targets, weights)
    for b, rows in enumerate([4, 2, 0, 1, 0]):
        for c in range(C):
            if rows:
                each = [bce(frames[b, h, c].item(), frame_targets[b, h, c].item()) for h in range(rows)]
                expected = sum(each) / rows
            else:
                expected = bce(logits[b, c].item(), targets[b, c].item())
            assert found[b, c].item() == pytest.approx(expected, rel=1e-5)
    found.sum().backward()
    assert (frames.grad.abs().sum(2) > 0).equal(weights > 0)
    assert (logits.grad.abs().sum(1) > 0).equal(weights.sum(1) == 0)


def test_label_smoothing_is_a_share():
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        LossConfig(label_smoothing=1.0)
