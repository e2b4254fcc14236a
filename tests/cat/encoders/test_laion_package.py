"""CLAP through LAION's package. It does not import beside a torch without CUDA: one that looks like it stands in."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from cat.encoders import build_encoder

pytest.importorskip("transformers")  # of which the network is made whose tensors the package gets

from tests.cat.encoders.test_frozen import noise
from tests.cat.encoders.test_laion import laions, network, write


class Model(torch.nn.Module):
    """With the tensors of the file, under its names."""

    def __init__(self, names):
        super().__init__()
        self.names, self.loaded = names, {}

    def state_dict(self):
        return dict.fromkeys(self.names)

    def load_state_dict(self, state, strict):
        self.loaded = state
        unexpected = sorted(state.keys() - self.names)
        return types.SimpleNamespace(missing_keys=sorted(self.names - state.keys()), unexpected_keys=unexpected)


@pytest.fixture
def package(monkeypatch, tmp_path):
    state = laions(network(fused=True, width=96))
    names = {name.removeprefix("module.") for name in state} - {"text_branch.embeddings.position_ids"}

    class CLAPModule(torch.nn.Module):
        def __init__(self, enable_fusion, device, amodel):
            super().__init__()
            print("the package prints")
            self.asked = (enable_fusion, device, amodel)
            self.model = Model(names)

        def get_audio_embedding_from_data(self, x, use_tensor):
            assert not self.training
            assert not use_tensor
            start = np.random.randint(0, 1000)  # noqa: NPY002
            return np.stack([clip[start : start + 4] for clip in x])

    monkeypatch.setitem(sys.modules, "laion_clap", types.SimpleNamespace(CLAP_Module=CLAPModule))
    return write(tmp_path / "630k-fusion-best.pt", state), names


def test_embeds_clip_by_clip_with_the_tower_that_the_file_holds(package, capsys):
    path, names = package
    encoder = build_encoder(f"laion-clap:{path}")
    assert capsys.readouterr().out == ""  # it is the command's own
    assert encoder.module.asked == (True, "cpu", "HTSAT-tiny")
    assert encoder.module.model.loaded.keys() == names
    assert (encoder.sample_rate, encoder.dim) == (48000, 24)
    wave, lengths = noise(2, 3000), torch.tensor([3000, 2000])
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    together = encoder(wave, lengths)
    assert torch.equal(together[1:], encoder(wave[1:, :2000]))
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_file_that_does_not_fit_is_an_error(package):
    path, names = package
    names.add("text_branch.pooler.dense.bias")
    with pytest.raises(ValueError, match=r"missing or have no place \(first: text_branch.pooler.dense.bias\)"):
        build_encoder(f"laion-clap:{path}")


def test_a_package_that_cannot_be_imported_is_an_error_with_the_remedy(package, monkeypatch):
    path, _ = package
    monkeypatch.setitem(sys.modules, "laion_clap", None)
    with pytest.raises(ImportError, match=r"laion_clap.*pip install laion-clap.*clap:PATH reads the same files"):
        build_encoder(f"laion-clap:{path}")
    with pytest.raises(ValueError, match="expected laion-clap:PATH"):
        build_encoder("laion-clap")
