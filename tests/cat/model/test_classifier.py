"""Encoders on clips of different lengths, drop path, and the heads of classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat.model import Classifier, Encoder, HeadConfig, ModelConfig, rows_of

SMALL = ModelConfig(channels=(8, 16), embed_dim=32, depth=3, num_heads=2, decoder_dim=32)
HEADS = [
    HeadConfig(),
    HeadConfig(pooling="mean", loss="bce"),
    *(HeadConfig("frames", pooling, "bce") for pooling in ("linear", "attention", "max")),
]
ROWS = (2, 6, 4, 6, 1, 2)
PER_ROW = 8  # patches


@pytest.fixture
def spec() -> torch.Tensor:
    return torch.randn(len(ROWS), 1, 96, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(SMALL)


@pytest.mark.parametrize("stem", ["multires", "patch"])
@pytest.mark.parametrize("kernels", ["reference", "dense"])
def test_a_clip_does_not_hear_its_neighbours_nor_the_padding(spec, stem, kernels):
    torch.manual_seed(0)
    small = {} if stem == "multires" else {"resolutions": (16,), "channels": ()}
    config = ModelConfig(**{**vars(SMALL), **small, "stem": stem, "kernels": kernels})
    encoder = Encoder(config).double()
    together = encoder(spec.double(), rows=ROWS)
    assert together.shape == (len(ROWS), 1 + 6 * PER_ROW, 32)
    for b, count in enumerate(ROWS):
        alone = encoder(spec[b : b + 1, :, : 16 * count].double())[0]
        assert (together[b, : len(alone)] - alone).abs().max() < 1e-13
        assert not together[b, len(alone) :].any()


def test_what_lies_behind_a_clip_reaches_nothing_not_even_as_nan(spec, encoder):
    poisoned = spec.clone()
    for b, count in enumerate(ROWS):
        poisoned[b, :, 16 * count :] = torch.nan
    assert torch.equal(encoder(poisoned, rows=ROWS), encoder(spec, rows=ROWS))


def test_all_rows_are_no_rows_bit_for_bit(spec, encoder):
    assert torch.equal(encoder(spec, rows=[6] * len(ROWS)), encoder(spec))


def test_what_lies_behind_all_clips_costs_nothing(spec, encoder):
    rows = [min(count, 3) for count in ROWS]
    short = encoder(spec[:, :, :48], rows=rows)
    long = encoder(spec, rows=rows)
    assert long.shape == (len(ROWS), 1 + 6 * PER_ROW, 32)
    assert torch.equal(long[:, : short.shape[1]], short)
    assert not long[:, short.shape[1] :].any()
    assert torch.equal(encoder(spec, rows=[2] * 6)[:, : 1 + 2 * PER_ROW], encoder(spec[:, :, :32]))
    assert [layer.shape for layer in encoder.layers(spec, rows=rows)] == [long.shape] * 4


def test_gradients_are_those_of_the_clips_alone(spec, encoder):
    encoder = encoder.double()
    weight = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (encoder(spec.double(), rows=ROWS) @ weight).sum().backward()
    together = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    for b, count in enumerate(ROWS):
        (encoder(spec[b : b + 1, :, : 16 * count].double()) @ weight).sum().backward()
    for one, other in zip(together, encoder.parameters(), strict=True):
        assert (one - other.grad).abs().max() <= 1e-11 * other.grad.abs().max()


def test_layers_end_with_what_forward_gives(spec, encoder):
    for rows in (None, ROWS):
        layers = encoder.layers(spec, rows=rows)
        assert len(layers) == 1 + SMALL.depth
        assert torch.equal(layers[-1], encoder(spec, rows=rows))
    assert torch.equal(encoder.layers(spec)[0], encoder.embed(spec))


def test_a_block_that_is_dropped_leaves_its_norms(spec, encoder):
    keep = torch.ones(len(ROWS), SMALL.depth, 2)
    assert torch.equal(encoder(spec, keep=keep), encoder(spec))
    keep[1, 2], keep[3, 0, 1] = 0, 2
    kept = encoder(spec, keep=keep)
    others = [b for b in range(len(ROWS)) if b not in (1, 3)]
    assert torch.equal(kept[others], encoder(spec)[others])
    last = encoder.blocks[2]
    assert torch.allclose(kept[1], last.norm2(last.norm1(encoder.layers(spec)[2][1])))
    assert not torch.allclose(kept[3], encoder(spec)[3])


@pytest.mark.parametrize(("rows", "message"), [
    ([6] * 5, "for each of the 6 clips"),
    ([6, 6, 6, 6, 6, 7], "from 1 to 6"),
    ([6, 6, 0, 6, 6, 6], "from 1 to 6"),
])  # fmt: skip
def test_rows_that_do_not_fit(spec, encoder, rows, message):
    with pytest.raises(ValueError, match=message):
        encoder(spec, rows=rows)


def test_rows_and_visible_exclude_each_other(spec, encoder):
    with pytest.raises(ValueError, match="expected one"):
        encoder(spec, torch.zeros(6, 1, dtype=torch.int64), rows=ROWS)
    with pytest.raises(ValueError, match=r"expected \(6, 3, 2\)"):
        encoder(spec, keep=torch.ones(6, 2))


def test_rows_hold_every_frame():
    assert [rows_of(frames, 16) for frames in (0, 1, 16, 17, 1024)] == [1, 1, 1, 2, 64]


# ---------------------------------------------------------------- heads


def classifier(head: HeadConfig, classes: int = 5) -> Classifier:
    torch.manual_seed(0)
    return Classifier(SMALL, head, classes)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.kind}-{head.pooling}")
def test_logits_do_not_depend_on_neighbours(head, spec):
    model = classifier(head).double()
    together = model(spec.double(), rows=ROWS)
    for b, count in enumerate(ROWS):
        alone = model(spec[b : b + 1, :, : 16 * count].double())
        assert (together.clip[b] - alone.clip[0]).abs().max() < 1e-13
        if head.kind == "frames":
            assert (together.frames[b, :count] - alone.frames[0]).abs().max() < 1e-13


def test_the_released_head_is_cls_norm_linear(spec):
    model = classifier(HeadConfig())
    cls = model.encoder(spec)[:, 0]
    expected = torch.nn.functional.layer_norm(cls, (32,), eps=1e-6) @ model.head.linear.weight.T
    assert torch.allclose(model(spec).clip, expected, atol=1e-6)
    assert not model.head.linear.bias.any()
    assert model.head.linear.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "head"}


def test_pooled_probabilities_are_their_formulas(spec):
    for pooling in ("linear", "max", "attention"):
        model = classifier(HeadConfig("frames", pooling, "bce"))
        output = model(spec)
        p = output.frames.sigmoid()
        if pooling == "attention":
            x = model.head.norm(model.encoder(spec)[:, 1:].unflatten(1, (6, 8)).mean(2))
            expected = (model.head.attention(x).softmax(1) * p).sum(1)
        else:
            expected = p.amax(1) if pooling == "max" else p.square().sum(1) / p.sum(1)
        assert torch.allclose(output.clip.sigmoid(), expected, atol=1e-6)


def test_probabilities_are_what_the_loss_says(spec):
    one, each = classifier(HeadConfig()), classifier(HeadConfig(loss="bce"))
    logits = one(spec).clip
    assert np.allclose(one.probabilities(logits).sum(1).detach(), 1)
    assert torch.equal(each.probabilities(logits), logits.sigmoid())


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.kind}-{head.pooling}")
def test_bf16_autocast_stays_near(head, spec):
    model = classifier(head)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(spec, rows=ROWS)
    assert (low.clip.float() - model(spec, rows=ROWS).clip).abs().max() < 0.05


@pytest.mark.parametrize(("fields", "message"), [
    ({"pooling": "max"}, "'cls', 'mean'"),
    ({"kind": "frames", "loss": "bce"}, "'linear', 'attention', 'max'"),
    ({"kind": "frames", "pooling": "max"}, "expected loss='bce'"),
])  # fmt: skip
def test_impossible_heads(fields, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**fields)


def test_no_class_is_no_classifier():
    with pytest.raises(ValueError, match="classes=0"):
        Classifier(SMALL, HeadConfig(), 0)
