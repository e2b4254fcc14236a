"""Frozen encoders: the controls, a CAT checkpoint, and how one is asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cat.data.features import FeatureConfig
from cat.encoders import (
    CatEncoder,
    FrozenEncoder,
    LogMelStatistics,
    RandomProjection,
    build_encoder,
)
from cat.encoders.frozen import mean_direction, weighted_mean
from cat.model import Encoder, ModelConfig

TINY = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
FEATURES = FeatureConfig(frames=64)


def noise(clips: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def tiny_encoder(pooling: str = "mean") -> CatEncoder:
    torch.manual_seed(0)
    return CatEncoder(Encoder(TINY), FEATURES, pooling=pooling)


def encoders() -> list[FrozenEncoder]:
    return [tiny_encoder(), tiny_encoder("cls"), tiny_encoder("both"), LogMelStatistics(), RandomProjection(dim=40)]


@pytest.mark.parametrize("encoder", encoders(), ids=lambda e: f"{e.name}-{e.dim}")
def test_embedding_depends_on_the_clip_alone(encoder):
    waveform, lengths = noise(3, 9000), torch.tensor([9000, 5000, 1000])
    together = encoder(waveform, lengths)
    assert isinstance(encoder, FrozenEncoder)
    assert together.shape == (3, encoder.dim)
    assert together.dtype == torch.float32
    poisoned = waveform.clone()
    poisoned[1, 5000:] = 7.0  # behind the clip's end
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(poisoned[b : b + 1, :n])[0], together[b], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(encoder(poisoned, lengths), together, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_padding_is_hidden_from_a_checkpoint():
    encoder = tiny_encoder()
    waveform = noise(1, FEATURES.frame_length + 19 * FEATURES.frame_shift)  # 20 frames: two of four rows of patches
    from cat.data.features import log_mel

    two_rows = dataclasses.replace(FEATURES, frames=32)
    tokens = encoder.encoder(log_mel(waveform, two_rows))[0]
    torch.testing.assert_close(encoder(waveform)[0], tokens[1:].mean(dim=0))
    both = tiny_encoder("both")(waveform)[0]
    torch.testing.assert_close(both, torch.cat([tokens[0], tokens[1:].mean(dim=0)]))


def test_statistics_of_windows_are_those_of_the_whole():
    """To rounding, where the windows leave no frame out: their first samples are a multiple of the shift apart."""
    encoder, wave = LogMelStatistics(FEATURES), noise(1, 400 + 160 * 99)
    wave -= wave.mean()
    cuts = [(0, 40), (40, 90), (90, 100)]  # frames
    windows = [wave[:, 160 * a : 160 * (b - 1) + 400] for a, b in cuts]
    windows = [window - window.mean() + 1e-3 for window in windows]  # each loses its own mean, as it does alone
    rows = torch.cat([encoder(window) for window in windows])
    frames = torch.cat([encoder_frames(window) for window in windows])
    expected = torch.cat([frames.mean(0), frames.std(0, correction=0)])
    lengths = torch.tensor([window.shape[1] for window in windows])
    torch.testing.assert_close(encoder.combine(rows, lengths), expected, rtol=1e-4, atol=1e-4)


def encoder_frames(window):
    from cat.data.features import log_mel

    count = 1 + (window.shape[1] - 400) // 160
    return log_mel(window, dataclasses.replace(FEATURES, frames=count))[0, 0]


def test_a_mean_of_windows_counts_their_lengths():
    rows, lengths = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 1])
    assert weighted_mean(rows, lengths).tolist() == [0.75, 0.25]
    torch.testing.assert_close(mean_direction(rows, lengths), torch.tensor([3.0, 1.0]) / 10**0.5)


def test_untrained_twin_is_another_but_reproducible_encoder():
    encoder, waveform = tiny_encoder(), noise(2, 9000)
    state = torch.get_rng_state()
    twin = encoder.untrained_twin(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(twin(waveform), encoder.untrained_twin(3)(waveform))
    assert not torch.allclose(twin(waveform), encoder(waveform))
    assert not torch.allclose(twin(waveform), encoder.untrained_twin(4)(waveform))
    assert not any(p.requires_grad for p in twin.encoder.parameters())


def test_log_mel_statistics_against_numpy():
    from cat.data.features import log_mel

    waveform = noise(1, 8000)
    frames = 1 + (8000 - 400) // 160
    spec = log_mel(waveform, dataclasses.replace(FeatureConfig(), frames=frames))[0, 0].numpy()
    expected = np.concatenate([spec.mean(axis=0), spec.std(axis=0)])
    np.testing.assert_allclose(LogMelStatistics()(waveform)[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_random_projection_is_fixed_by_its_seed():
    waveform = noise(2, 8000)
    embedding = RandomProjection(seed=1)(waveform)
    assert torch.equal(embedding, build_encoder("random:1")(waveform))
    assert not torch.allclose(embedding, build_encoder("random")(waveform), atol=1e-3)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert (RandomProjection(seed=1)(2 * waveform) * embedding).sum(1).min() > 0.99  # it does not tell the level


def test_bad_requests_say_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither one of clap"):
        build_encoder(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="whole number, got 'x'"):
        build_encoder("random:x")
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, both"):
        CatEncoder(Encoder(TINY), FEATURES, pooling="max")
    with pytest.raises(ValueError, match=r"\(clips, samples\)"):
        LogMelStatistics()(torch.zeros(100))
    with pytest.raises(ValueError, match=r"lengths must hold one sample count in 1..1000"):
        LogMelStatistics()(torch.zeros(2, 1000), torch.tensor([1000, 2000]))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        RandomProjection(0)
