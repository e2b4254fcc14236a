"""Frozen encoders: CLAP's real architecture with random weights, the controls, a CAT checkpoint."""

from __future__ import annotations

import builtins
import dataclasses

import numpy as np
import pytest
import torch

from cat.data.features import FeatureConfig
from cat.encoders import (
    CatEncoder,
    ClapEncoder,
    FrozenEncoder,
    LogMelStatistics,
    RandomProjection,
    build_encoder,
)
from cat.encoders.frozen import mean_direction, weighted_mean
from cat.model import Encoder, ModelConfig

TINY = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
FEATURES = FeatureConfig(frames=64)


def save_clap(directory, *, mel_bins: int, truncation: str, **audio) -> None:
    """CLAP as transformers builds it, small, saved as a newcomer would have it on disk."""
    transformers = pytest.importorskip("transformers")
    audio |= {
        "num_mel_bins": mel_bins,
        "spec_size": 4 * mel_bins,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "num_hidden_layers": 2,
        "window_size": 4,
        "projection_dim": 24,
    }
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "projection_dim": 24,
    }
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=24)
    torch.manual_seed(0)
    transformers.ClapModel(config).save_pretrained(directory)
    extractor = transformers.ClapFeatureExtractor(feature_size=mel_bins, max_length_s=1, truncation=truncation)
    extractor.save_pretrained(directory)


@pytest.fixture(scope="module")
def clap_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clap")
    save_clap(directory, mel_bins=16, truncation="rand_trunc")
    return directory


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


def test_clap_reads_a_local_directory(clap_directory):
    encoder = build_encoder(f"clap:{clap_directory}")
    assert (encoder.sample_rate, encoder.dim) == (48000, 24)
    waveform, lengths = (
        noise(3, 60000),
        torch.tensor([60000, 48000, 20000]),
    )  # longer than, exactly, less than its second
    embedding = encoder(waveform, lengths)
    assert embedding.shape == (3, 24)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(waveform[b : b + 1, :n])[0], embedding[b], atol=1e-5, rtol=1e-4)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_clap_with_feature_fusion(tmp_path):
    """The default, laion/clap-htsat-fused, is of this kind; the extractor alone would embed short clips by chance."""
    save_clap(tmp_path, mel_bins=64, truncation="fusion", enable_fusion=True, aff_block_r=2)
    encoder, waveform, lengths = ClapEncoder(tmp_path), noise(3, 60000), torch.tensor([60000, 48000, 20000])
    embedding = encoder(waveform, lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(waveform[b : b + 1, :n])[0], embedding[b], atol=1e-5, rtol=1e-4)


def test_clap_that_lacks_weights_is_an_error(clap_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clap_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["audio_projection.linear1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of the audio tower \(first: audio_projection.linear1.weight\)"
    ):
        ClapEncoder(tmp_path)


def test_clap_agrees_with_transformers_own_path(clap_directory):
    import transformers

    model = transformers.ClapModel.from_pretrained(clap_directory).eval()
    extractor = transformers.ClapFeatureExtractor.from_pretrained(clap_directory)
    waveform = noise(1, 48000)
    with torch.no_grad():
        inputs = extractor(waveform[0].numpy(), sampling_rate=48000, return_tensors="pt")
        features = model.get_audio_features(**inputs)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    torch.testing.assert_close(ClapEncoder(clap_directory)(waveform), features, atol=1e-5, rtol=1e-4)


def test_clap_refuses_pickled_weights(clap_directory, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clap_directory / name).read_bytes())
    torch.save({"audio_projection.linear1.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="Weights in pickles are refused"):
        ClapEncoder(tmp_path)


def test_clap_that_is_not_local_when_offline(monkeypatch):
    pytest.importorskip("transformers")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="Give a local directory"):
        ClapEncoder("nobody/has-this-model")


def test_clap_without_transformers(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'cat-kernels\[clap\]'"):
        ClapEncoder("anything")


def test_bad_requests_say_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither 'clap'"):
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
