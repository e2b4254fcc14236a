"""AST's real architecture with random weights, small."""

from __future__ import annotations

import pytest
import torch

from cat.encoders import build_encoder
from cat.encoders.ast import AstEncoder
from tests.cat.encoders.test_frozen import noise

transformers = pytest.importorskip("transformers")
FRAMES, MEL = 64, 32
WINDOW = 160 * FRAMES  # samples from one window to the next


def save_ast(directory, network="ASTModel", frames: int = FRAMES, **extractor) -> None:
    config = transformers.ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=FRAMES,
        num_mel_bins=MEL,
    )
    torch.manual_seed(0)
    model = getattr(transformers, network)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # position embeddings and tokens begin at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    transformers.ASTFeatureExtractor(num_mel_bins=MEL, max_length=frames, **extractor).save_pretrained(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("ast")
    save_ast(path)
    return path


def theirs(directory, wave: torch.Tensor) -> torch.Tensor:
    """Through transformers alone: (E,) of a clip of one window."""
    model = transformers.ASTModel.from_pretrained(directory).eval()
    extractor = transformers.ASTFeatureExtractor.from_pretrained(directory)
    with torch.no_grad():
        values = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
        tokens = model(values).last_hidden_state[0]
    return (tokens[0] + tokens[1]) / 2


@pytest.mark.parametrize("samples", [WINDOW + 240, 4000], ids=["one window", "padded"])
def test_agrees_with_transformers_own_path(directory, samples):
    encoder, wave = build_encoder(f"ast:{directory}"), noise(1, samples) + 0.05  # its mean is not subtracted
    assert (encoder.sample_rate, encoder.dim, encoder.min_samples) == (16000, 16, 400)
    torch.testing.assert_close(encoder(wave)[0], theirs(directory, wave[0]), atol=2e-3, rtol=1e-3)


def test_longer_clips_are_the_mean_of_windows(directory):
    encoder, wave = AstEncoder(directory), noise(1, 2 * WINDOW + 240 + 160 * 16)  # two windows and 16 frames
    parts = [wave[:, start : start + WINDOW + 240] for start in (0, WINDOW, 2 * WINDOW)]
    rows = torch.cat([encoder(part) for part in parts])
    expected = (rows * torch.tensor([64.0, 64.0, 16.0])[:, None]).sum(0) / 144
    torch.testing.assert_close(encoder(wave)[0], expected, atol=1e-5, rtol=1e-4)


def test_an_embedding_depends_on_the_clip_alone(directory):
    encoder, wave, lengths = AstEncoder(directory), noise(3, 3 * WINDOW), torch.tensor([3 * WINDOW, WINDOW, 400])
    together = encoder(wave, lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(wave[b : b + 1, :n])[0], together[b], atol=1e-5, rtol=1e-4)


def test_reads_the_classifier_that_is_on_the_hub(directory, tmp_path):
    save_ast(tmp_path, "ASTForAudioClassification")
    wave = noise(1, 8000)
    torch.testing.assert_close(AstEncoder(tmp_path)(wave)[0], theirs(tmp_path, wave[0]), atol=2e-3, rtol=1e-3)


def test_what_does_not_fit_is_an_error(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    save_ast(tmp_path, frames=1024)
    with pytest.raises(ValueError, match=r"makes 32 mel bins by 1024 frames .* a network of 32 by 64"):
        AstEncoder(tmp_path)
    save_ast(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the ASTModel \(first: layernorm.weight\)"):
        AstEncoder(tmp_path)
    with pytest.raises(ValueError, match=r"names a ASTFeatureExtractor; expected a ClapFeatureExtractor"):
        build_encoder(f"clap:{directory}")
    with pytest.raises(ValueError, match="expected ast:PATH_OR_HUB_NAME"):
        build_encoder("ast")
