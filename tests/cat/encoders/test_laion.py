"""CLAP from files like LAION's: a network of transformers', small, under LAION's names."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cat.encoders import ClapEncoder
from tests.cat.encoders.test_frozen import noise

transformers = pytest.importorskip("transformers")


def network(fused: bool, width: int = 8):
    """With no parameter or statistic left at the zero or one it starts as."""
    torch.manual_seed(0)
    config = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=width,
        hidden_size=2 * width,
        depths=[1, 2],
        num_attention_heads=[1, 2],
        num_hidden_layers=2,
        projection_dim=24,
        mlp_ratio=2.0,
        enable_fusion=fused,
        fusion_type="aff_2d" if fused else None,
    )
    model = transformers.ClapAudioModelWithProjection(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.2 * torch.rand_like(tensor))
    return model


def laions(model) -> dict[str, torch.Tensor]:
    """The state dict as LAION's training writes it."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^audio_model\.audio_encoder\.", "audio_branch.", name)
        name = re.sub(r"^audio_projection\.linear(\d)", lambda m: f"audio_projection.{2 * int(m[1]) - 2}", name)
        for ours, theirs in (
            ("attention.output.dense", "attn.proj"),
            ("attention.self", "attn"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("batch_norm", "bn0"),
        ):
            name = name.replace(f".{ours}.", f".{theirs}.")
        if ".attn.key." in name or ".attn.value." in name:
            joined = re.sub("key|value", "qkv", name)
            state[joined] = torch.cat([state[joined], tensor])  # behind the query
        else:
            state[name.replace(".attn.query.", ".attn.qkv.")] = tensor
    others = {
        "audio_branch.spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024),
        "audio_branch.logmel_extractor.melW": (513, 64),
        "audio_branch.layers.0.blocks.1.attn_mask": (4, 16, 16),
        "audio_branch.tscam_conv.weight": (527, 16, 2, 3),
        "audio_branch.head.bias": (527,),
        "audio_transform.sequential.0.weight": (24, 24),
        "text_branch.embeddings.position_ids": (1, 514),
        "logit_scale_a": (),
    }
    state |= {name: torch.zeros(shape) for name, shape in others.items()}
    return {f"module.{name}": tensor for name, tensor in state.items()}


def write(path, state) -> str:
    """With what a training state has beside its weights; such a NumPy scalar is no weight."""
    torch.save({"epoch": 45, "name": "clap", "loss": np.float64(0.5), "state_dict": state}, path)
    return str(path)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_same_embedding_as_the_network_it_was_made_of(tmp_path, fused):
    model = network(fused)
    encoder = ClapEncoder(write(tmp_path / "630k-best.pt", laions(model)))
    assert (encoder.dim, encoder.sample_rate, encoder.features.fused) == (24, 48000, fused)
    wave = 3 * noise(1, 500_000)
    cut = (wave[0].numpy().clip(-1, 1) * 32767).astype(np.int16) / 32767
    extractor = transformers.ClapFeatureExtractor(frequency_min=50, truncation="fusion" if fused else "rand_trunc")
    np.random.seed(0)  # noqa: NPY002 - transformers draws the crop from it
    inputs = extractor(cut, sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        expected = model(inputs["input_features"].float(), is_longer=inputs["is_longer"]).audio_embeds
    torch.testing.assert_close(encoder(wave), torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_reads_safetensors(tmp_path):
    from safetensors.torch import save_file

    state = laions(network(fused=False))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    wave = noise(1, 48000)
    pickled = ClapEncoder(write(tmp_path / "a.pt", state))(wave)
    assert torch.equal(ClapEncoder(tmp_path / "a.safetensors")(wave), pickled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("audio_branch.norm.weight"), "lacks 1 tensors .*audio_encoder.norm.weight"),
        (lambda s: s.pop("audio_branch.bn0.weight"), "lacks audio_branch.bn0.weight; expected the HTS-AT tower"),
        (lambda s: s.update({"audio_branch.conv": torch.zeros(1)}), "1 tensors without a place .*conv"),
        (lambda s: s.update({"audio_projection.2.bias": torch.zeros(3)}), "1 tensors of other shapes .*linear2.bias"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("audio_")], "holds no audio tower; .* found .'logit"),
    ],
    ids=["lacks one", "lacks what tells its size", "one too many", "another shape", "no tower"],
)
def test_a_file_that_does_not_fit_says_what_is_wrong(tmp_path, change, message):
    state = {name.removeprefix("module."): tensor for name, tensor in laions(network(fused=False)).items()}
    change(state)
    with pytest.raises(ValueError, match=f"CLAP '.*/x.pt' .*{message}"):
        ClapEncoder(write(tmp_path / "x.pt", state))
