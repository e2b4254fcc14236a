"""CLAP's real architecture with random weights, small: as transformers has it, and in files like LAION's."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from cat.encoders import ClapEncoder, build_encoder
from cat.encoders.clap import ClapFeatures
from tests.cat.encoders.test_frozen import noise

transformers = pytest.importorskip("transformers")


def save_clap(directory, *, mel_bins: int, truncation: str, **audio) -> None:
    """CLAP as transformers builds it, small, saved as a newcomer would have it on disk."""
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


@pytest.mark.parametrize("samples", [700, 48000, 48479, 48480, 50000, 200_000])
@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_features_are_those_of_transformers_extractor(truncation, samples):
    extractor = transformers.ClapFeatureExtractor(max_length_s=1, truncation=truncation, frequency_min=50)
    wave = noise(1, samples)[0]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    spec, longer = ClapFeatures.of(extractor, quantised=False)(wave)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002 - it draws crops from there
    theirs = extractor(wave.numpy(), sampling_rate=48000, return_tensors="pt")["input_features"][0]
    torch.testing.assert_close(spec, theirs.float(), atol=1e-3, rtol=0)
    # Fused, a clip that is longer by less than a frame has no more frames. The extractor calls some clip longer always.
    assert longer == (samples >= 48480 if truncation == "fusion" else samples > 48000)


def test_clap_with_a_feature_extractor_of_another_network(clap_directory, tmp_path):
    for file in clap_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    transformers.ClapFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"makes 64 mel bins with fusion .* a network of 16 without it"):
        ClapEncoder(tmp_path)


def test_clap_that_lacks_weights_is_an_error(clap_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clap_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["audio_projection.linear1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"lacks 1 tensors of the ClapAudioModelWithProjection .first: audio_projection.linear1.weight\)",
    ):
        ClapEncoder(tmp_path)


def test_clap_agrees_with_transformers_own_path(clap_directory):
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
