"""Twins with random weights: of each kind of network, from a seed, and nothing else changed by it."""

from __future__ import annotations

import pytest
import torch

from cat.encoders import build_encoder
from tests.cat.encoders.test_frozen import noise
from tests.released_encoders import audiomae_file, beats_file, dasheng_file


def transformers_directory(family):
    def save(path):
        pytest.importorskip("transformers")
        from tests.cat.encoders.test_ast import save_ast
        from tests.cat.encoders.test_clap import save_clap

        if family == "ast":
            save_ast(path)
        else:
            save_clap(path, mel_bins=16, truncation="rand_trunc")
        return path

    return save


FAMILIES = {
    "ast": transformers_directory("ast"),
    "clap": transformers_directory("clap"),
    "audiomae": lambda path: audiomae_file(path / "file.pt"),
    "beats": lambda path: beats_file(path / "file.pt"),
    "dasheng": lambda path: dasheng_file(path / "file.pt"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request, tmp_path_factory):
    return f"{request.param}:{FAMILIES[request.param](tmp_path_factory.mktemp(request.param))}"


def test_a_twin_is_the_network_with_weights_from_the_seed(spec):
    encoder, state = build_encoder(spec), torch.get_rng_state()
    waveform, trained = noise(2, 24_000), {name: w.clone() for name, w in encoder.model.state_dict().items()}
    before = encoder(waveform)
    twin, same, other = encoder.untrained_twin(3), build_encoder(f"untrained:3:{spec}"), encoder.untrained_twin(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert (twin.name, twin.dim) == (f"untrained:3:{spec}", encoder.dim)
    assert torch.equal(twin(waveform), same(waveform))
    assert torch.equal(encoder(waveform), before)
    for name, weight in encoder.model.state_dict().items():
        assert torch.equal(weight, trained[name])
    apart = torch.nn.functional.cosine_similarity
    assert apart(twin(waveform), before).max() < 0.99
    assert apart(twin(waveform), other(waveform)).max() < 0.99
    assert not twin.model.training
    assert not any(parameter.requires_grad for parameter in twin.model.parameters())


def test_no_weight_of_the_trained_network_is_left(spec):
    """Biases, norms and tokens as well: all as they are before any training, but what normalises the input, and
    Audio-MAE's positions, which are sines."""
    encoder = build_encoder(spec)
    trained = {name: w for name, w in encoder.model.state_dict().items() if w.is_floating_point()}
    for weight in trained.values():
        weight += 0.5 + torch.rand_like(weight)  # which nothing has to begin with
    twin = encoder.untrained_twin(0).model.state_dict()
    left = [name for name, weight in trained.items() if torch.equal(weight, twin[name])]
    kept = {"audiomae": ["pos_embed"], "dasheng": ["init_bn.1.running_mean", "init_bn.1.running_var"]}
    kept["clap"] = [f"audio_model.audio_encoder.batch_norm.running_{which}" for which in ("mean", "var")]
    assert left == kept.get(spec.partition(":")[0], [])
    assert all(twin[name].isfinite().all() and twin[name].abs().max() < 10 for name in trained if name not in left)


def test_drawing_leaves_gpus_generators_alone(monkeypatch):
    """torch.manual_seed would seed every GPU, for good."""
    from cat.encoders.untrained import drawing

    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    with drawing(3):
        one = torch.rand(2)
    assert torch.equal(one, torch.rand(2, generator=torch.Generator().manual_seed(3)))
