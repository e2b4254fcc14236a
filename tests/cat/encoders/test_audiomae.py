"""Audio-MAE's files: the network against the formula, its released size, the length rule, files that do not fit.

Compared by hand with torchaudio's fbank, and with timm's block as the package `dasheng` copied it (random weights, two
blocks of 128): preprocessing to 7e-5 of 1.3, embedding to 1.2e-6 of 2.6.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from cat.checkpoints import CheckpointError
from cat.data.features import FeatureConfig, log_mel
from cat.encoders import build_encoder
from cat.encoders.audiomae import AudioMAENetwork
from tests.released_encoders import audiomae, audiomae_file

DIM, FRAMES = 128, 64


def noise(clips: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_encoder(f"audiomae:{audiomae_file(tmp_path_factory.mktemp('audiomae') / 'pretrained.pth')}")


def block(x_BLD, tensors, name):
    """timm's, head by head of 64."""

    def norm(x, which):
        return layer_norm(x, (DIM,), tensors[f"{name}.{which}.weight"], tensors[f"{name}.{which}.bias"], 1e-6)

    def linear(x, which):
        return x @ tensors[f"{name}.{which}.weight"].T + tensors[f"{name}.{which}.bias"]

    q, k, v = linear(norm(x_BLD, "norm1"), "attn.qkv").split(DIM, dim=2)
    heads = [slice(0, 64), slice(64, 128)]
    mixed = [(q[..., h] @ k[..., h].mT / 64**0.5).softmax(-1) @ v[..., h] for h in heads]
    x_BLD = x_BLD + linear(torch.cat(mixed, 2), "attn.proj")
    return x_BLD + linear(gelu(linear(norm(x_BLD, "norm2"), "mlp.fc1")), "mlp.fc2")


def expected(tensors, wave, weight=None, bias=None):
    features = FeatureConfig(frames=FRAMES, mean=-4.2677393, std=4.5689974)
    spec = log_mel(wave, features)
    patches = spec.unfold(2, 16, 16).unfold(3, 16, 16).flatten(1, 3).flatten(2)  # rows of time, then of frequency
    x = patches @ tensors["patch_embed.proj.weight"].flatten(1).T + tensors["patch_embed.proj.bias"]
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], 1) + tensors["pos_embed"]
    for i in range(2):
        x = block(x, tensors, f"blocks.{i}")
    return layer_norm(x[:, 1:].mean(1), (DIM,), weight, bias, 1e-6)


def test_embedding_is_the_formula(encoder):
    wave = noise(2, 12_000) + 0.05
    embedding = encoder(wave)
    torch.testing.assert_close(embedding, expected(audiomae(), wave), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(embedding.norm(dim=1), torch.full((2,), DIM**0.5), rtol=1e-4, atol=0)
    assert (encoder.sample_rate, encoder.dim, encoder.min_samples) == (16_000, DIM, 400)


def test_clip_alone_is_the_clip_in_a_batch(encoder):
    wave, lengths = noise(3, 20_000), torch.tensor([20_000, 9_000, 400])
    together = encoder(wave, lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(wave[b : b + 1, :n])[0], together[b], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_only_the_first_frames_are_heard(encoder):
    """But for the mean that is removed, which is that of the whole clip."""
    wave = noise(1, 20_000)
    wave[:, 400 + 160 * (FRAMES - 1) :] = 0
    other = wave.clone()
    other[:, -4000:] = torch.tensor([0.5, -0.5]).repeat(2000)
    torch.testing.assert_close(encoder(other), encoder(wave), atol=1e-5, rtol=1e-4)


def test_a_fine_tuned_file_brings_the_norm_behind_the_mean(tmp_path):
    tensors = {name: t for name, t in audiomae().items() if not name.startswith(("norm.", "decoder_", "mask_"))}
    weight, bias = torch.linspace(0.5, 2, DIM), torch.linspace(-1, 1, DIM)
    tensors |= {"fc_norm.weight": weight, "fc_norm.bias": bias, "head.weight": torch.ones(5, DIM)}
    encoder = build_encoder(f"audiomae:{audiomae_file(tmp_path / 'finetuned.pth', tensors)}")
    wave = noise(2, 12_000)
    torch.testing.assert_close(encoder(wave), expected(tensors, wave, weight, bias), atol=2e-5, rtol=1e-4)


def test_released_size():
    """85,659,407 trainable parameters in the authors' log, 527 * 769 of them the head's, and none for the positions."""
    with torch.device("meta"):
        network = AudioMAENetwork(768, 12, 3072, 513)
    assert sum(p.numel() for p in network.parameters()) - 513 * 768 == 85_659_407 - 527 * 769
    assert network.state_dict().keys() == audiomae(dim=64, depth=12).keys() - {
        name for name in audiomae() if name.startswith(("decoder_", "mask_token", "norm."))
    } | {"fc_norm.weight", "fc_norm.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": None}, "no tensor pos_embed; expected a released file of Audio-MAE"),
        ({"blocks.1.attn.qkv.bias": None}, r"1 missing \(first: blocks.1.attn.qkv.bias\)"),
        ({"surprise": torch.zeros(2)}, r"1 unknown \(first: surprise\)"),
        ({"cls_token": torch.zeros(1, 1, 64)}, r"cls_token is \(1, 1, 64\), expected \(1, 1, 128\)"),
        ({"pos_embed": torch.zeros(1, 34, 128)}, r"pos_embed has shape \(1, 34, 128\); expected .* 8 patches"),
        ({"pos_embed": torch.zeros(33, 128)}, r"pos_embed has shape \(33, 128\); Audio-MAE's has 3 dimensions"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, message):
    tensors = {name: t for name, t in (audiomae() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        build_encoder(f"audiomae:{audiomae_file(tmp_path / 'other.pth', tensors)}")


def test_safetensors_hold_the_same(tmp_path, encoder):
    from safetensors.torch import save_file

    save_file(audiomae(), tmp_path / "model.safetensors")
    wave = noise(1, 9_000)
    assert torch.equal(build_encoder(f"audiomae:{tmp_path / 'model.safetensors'}")(wave), encoder(wave))


def test_no_such_file_and_no_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        build_encoder(f"audiomae:{tmp_path / 'nothing.pth'}")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list without tensors under 'model'"):
        build_encoder(f"audiomae:{tmp_path / 'list.pth'}")
