"""BEATs' files: weight norm, position biases and layers against direct formulas, padding, files that do not fit.

Compared by hand with the package `openbeats` 0.1.1 (random weights, three layers, clips of 0.2 to 10 s, alone and in a
ragged batch): preprocessing to 1e-4 of 2.4, embedding to 6e-6 of 1.4.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import conv1d, gelu, layer_norm

from cat.checkpoints import CheckpointError
from cat.encoders import build_encoder
from cat.encoders.beats import BEATsNetwork, deep_norm_alpha, relative_buckets
from cat_kernels import fbank
from tests.released_encoders import beats, beats_file


def noise(clips: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_encoder(f"beats:{beats_file(tmp_path_factory.mktemp('beats') / 'BEATs.pt')}")


def bucket(distance: int) -> int:
    """T5's formula, of 320 buckets up to a distance of 800: 160 a side, one each below 80."""
    side, far = 160 * (distance > 0), abs(distance)
    if far < 80:
        return side + far
    return side + min(159, 80 + int(math.log(far / 80) / math.log(800 / 80) * 80))


def test_buckets_of_relative_positions():
    table = relative_buckets(1000, 320, 800)
    assert table.dtype == torch.int64
    # Where the logarithm meets a whole number, float32 and float64 may fall on either side of it.
    ties = {d for d in range(80, 1000) if abs((x := math.log(d / 80) / math.log(10) * 80) - round(x)) < 1e-4}
    for distance in set(range(1000)) - ties:
        assert table[0, distance] == bucket(distance)
        assert table[distance, 0] == bucket(-distance)
    assert len(ties) < 5
    assert torch.equal(table[3:9, 5:11], table[:6, 2:8])


def test_alpha_of_deep_norm():
    assert deep_norm_alpha(12) == pytest.approx(2.2133638)  # 24 ** (1 / 4)


def expected(tensors, wave, depth=2, heads=2):
    """Token by token the paper's formulas; one clip (n,)."""
    spec = fbank(wave, window="povey", scale=32768.0, mean=15.41663, std=6.55582)
    rows = len(spec) // 16
    kernel = tensors["patch_embedding.weight"]
    x = torch.nn.functional.conv2d(spec[None, None, : rows * 16], kernel, stride=16)[0].flatten(1).T

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    x = linear(norm(x, "layer_norm"), "post_extract_proj")
    g, v = tensors["encoder.pos_conv.0.weight_g"], tensors["encoder.pos_conv.0.weight_v"]
    weight = torch._weight_norm(v, g, 2)
    place = conv1d(x.T[None], weight, tensors["encoder.pos_conv.0.bias"], padding=64, groups=16)[0, :, :-1]
    x = norm(x + gelu(place).T, "encoder.layer_norm")
    length, width = x.shape
    buckets = torch.tensor([[bucket(j - i) for j in range(length)] for i in range(length)])
    table = tensors["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for i in range(depth):
        name = f"encoder.layers.{i}"
        q, k, v = (linear(x, f"{name}.self_attn.{which}_proj") for which in "qkv")
        outputs = []
        for h in range(heads):
            of = slice(h * width // heads, (h + 1) * width // heads)
            update, reset = linear(q[:, of], f"{name}.self_attn.grep_linear").unflatten(1, (2, 4)).sum(2).sigmoid().T
            gate = update * (reset * tensors[f"{name}.self_attn.grep_a"][0, h] - 1).flatten() + 2
            scores = q[:, of] @ k[:, of].T / (width // heads) ** 0.5 + gate[:, None] * table[buckets, h]
            outputs.append(scores.softmax(1) @ v[:, of])
        alpha = (2 * depth) ** 0.25
        attended = linear(torch.cat(outputs, 1), f"{name}.self_attn.out_proj")
        x = norm(alpha * x + attended, f"{name}.self_attn_layer_norm")
        x = norm(alpha * x + linear(gelu(linear(x, f"{name}.fc1")), f"{name}.fc2"), f"{name}.final_layer_norm")
    return x.mean(0)


def test_embedding_is_the_formula(encoder):
    wave = noise(1, 33_000)  # 12 rows of patches: 96 tokens, past the 80 distances that have buckets of their own
    torch.testing.assert_close(encoder(wave)[0], expected(beats(), wave[0]), atol=2e-5, rtol=1e-4)
    assert (encoder.sample_rate, encoder.dim, encoder.min_samples) == (16_000, 32, 2_800)


def test_clip_alone_is_the_clip_in_a_batch(encoder):
    wave, lengths = noise(3, 20_000), torch.tensor([20_000, 11_000, 2_800])
    together = encoder(wave, lengths)
    wave[1, 11_000:] = 7.0  # what lies behind the end is not heard
    torch.testing.assert_close(encoder(wave, lengths), together, atol=1e-6, rtol=1e-5)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(wave[b : b + 1, :n])[0], together[b], atol=1e-5, rtol=1e-4)


def test_the_first_ten_seconds_are_heard(encoder):
    wave = noise(1, 170_000)
    assert torch.equal(encoder(wave), encoder(wave[:, :160_000]))
    assert not torch.equal(encoder(wave), encoder(wave[:, :150_000]))


def test_a_clip_without_a_token_is_refused(encoder):
    with pytest.raises(ValueError, match="a clip has 2799 samples at 16 kHz; BEATs hears no fewer than 2800"):
        encoder(noise(2, 4_000), torch.tensor([4_000, 2_799]))


def test_a_fine_tuned_files_classifier_is_not_used(encoder, tmp_path):
    tensors = beats() | {"predictor.weight": torch.ones(5, 32), "predictor.bias": torch.ones(5)}
    tuned = build_encoder(f"beats:{beats_file(tmp_path / 'tuned.pt', tensors, finetuned_model=True)}")
    assert torch.equal(tuned(noise(1, 9_000)), encoder(noise(1, 9_000)))


def test_the_distance_comes_from_the_settings(encoder, tmp_path):
    wave = noise(1, 33_000)
    other = build_encoder(f"beats:{beats_file(tmp_path / 'BEATs.pt', max_distance=90)}")
    assert not torch.allclose(other(wave), encoder(wave), atol=1e-4)


def test_released_size():
    """250 tensors: weight norm has two for one, and the table of biases is in every layer."""
    with torch.device("meta"):
        network = BEATsNetwork(512, 768, 12, 12, 3072, 128, 16, 320)
    names = network.state_dict().keys()
    assert len(names) + 1 + 11 == 250 == len(beats(depth=12))
    assert names - {"encoder.pos_conv.0.weight", "encoder.relative_attention_bias"} < beats(depth=12).keys()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 90.3


TABLE = "encoder.layers.1.self_attn.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            {"post_extract_proj.weight": None},
            {},
            "no tensor post_extract_proj.weight; expected a released file of BEATs",
        ),
        ({"encoder.layers.1.fc2.bias": None}, {}, r"1 missing \(first: encoder.layers.1.fc2.bias\)"),
        ({"surprise": torch.zeros(2)}, {}, r"1 unknown \(first: surprise\)"),
        ({"layer_norm.bias": torch.zeros(9)}, {}, r"layer_norm.bias is \(9,\), expected \(16,\)"),
        ({"encoder.pos_conv.0.weight_g": torch.ones(32, 1, 1)}, {}, r"weight_g has shape \(32, 1, 1\).*\(1, 1, 128\)"),
        ({TABLE: torch.zeros(320, 2)}, {}, rf"{TABLE} differs from the first layer's"),
        ({}, {"deep_norm": False}, "was trained with deep_norm=False; only BEATs with deep_norm=True"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, settings, message):
    tensors = {name: t for name, t in (beats() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        build_encoder(f"beats:{beats_file(tmp_path / 'other.pt', tensors, **settings)}")
