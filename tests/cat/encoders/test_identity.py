"""What an encoder's embeddings depend on: another one for other weights or settings, whatever the path."""

from __future__ import annotations

import shutil

import pytest
import torch

from cat.data.features import FeatureConfig
from cat.encoders import CatEncoder, LogMelStatistics, RandomProjection, build_encoder
from cat.encoders.identity import identity, identity_of
from cat.model import Encoder, ModelConfig
from tests.released_encoders import audiomae_file, beats_file, dasheng_file


def tiny(seed: int = 0, pooling: str = "mean") -> CatEncoder:
    torch.manual_seed(seed)
    model = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
    return CatEncoder(Encoder(model), FeatureConfig(frames=64), pooling=pooling)


class Mine(LogMelStatistics):
    """An encoder of the user's."""


def test_it_is_of_weights_and_settings_alone():
    encoders = [tiny(0), tiny(1), tiny(0, "cls"), LogMelStatistics(), LogMelStatistics(FeatureConfig(mean=0.0))]
    encoders += [RandomProjection(seed=0), RandomProjection(seed=1), Mine()]
    found = [identity_of(encoder) for encoder in encoders]
    assert len(set(found)) == len(found)
    assert found == [identity_of(encoder) for encoder in encoders]
    again = tiny(0)
    again.name, again.device, again.threads = "elsewhere", torch.device("cuda"), 7
    assert identity_of(again) == found[0]


def clap(path):
    from tests.cat.encoders.test_clap import save_clap

    save_clap(path, mel_bins=16, truncation="rand_trunc")
    return f"clap:{path}"


def ast(path):
    from tests.cat.encoders.test_ast import save_ast

    save_ast(path)
    return f"ast:{path}"


def laion(path):
    from tests.cat.encoders.test_laion import laions, network, write

    return f"clap:{write(path.with_suffix('.pt'), laions(network(fused=False)))}"


def onnx(path):
    from tests.cat.encoders.test_modelfile import product

    return f"onnx:{product(path.with_suffix('.onnx'), ['N', 160])}?sample_rate=8000&output=embedding"


FAMILIES = {
    "clap": clap,
    "laion": laion,
    "ast": ast,
    "audiomae": lambda path: f"audiomae:{audiomae_file(path.with_suffix('.pth'))}",
    "beats": lambda path: f"beats:{beats_file(path.with_suffix('.pt'))}",
    "dasheng": lambda path: f"dasheng:{dasheng_file(path.with_suffix('.pt'))}",
    "onnx": onnx,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one_that_its_path_does_not_change(family, tmp_path):
    if family in ("clap", "laion", "ast"):
        pytest.importorskip("transformers")
    (tmp_path / "a").mkdir()
    spec = FAMILIES[family](tmp_path / "a" / "model")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, moved = build_encoder(spec), build_encoder(spec.replace(str(tmp_path / "a"), str(tmp_path / "b")))
    assert one.name != moved.name
    identity(one)  # known, not only as far as it is seen
    assert identity_of(one) == identity_of(moved)
    if hasattr(moved, "model"):
        with torch.no_grad():
            next(moved.model.parameters()).flatten()[0] += 1e-3
    else:
        moved = build_encoder(spec + "&hop=80")
    assert identity_of(one) != identity_of(moved)


MINE = """
import torch
class Level:
    name, sample_rate, dim = 'level', 16000, 1
    def __init__(self):
        self.gain = torch.ones(1)
    def __call__(self, wave, lengths=None):
        ends = [wave.shape[1]] * len(wave) if lengths is None else lengths.tolist()
        return torch.stack([w[:n].square().mean()[None] * self.gain for w, n in zip(wave, ends)])
def level(device):
    return Level()
"""


def test_an_encoder_of_the_users_is_told_apart_by_what_can_be_seen(tmp_path):
    def build(source: str):
        (tmp_path / "mine.py").write_text(source)
        return build_encoder(f"{tmp_path / 'mine.py'}:level")

    encoder = build(MINE)
    first = identity_of(encoder)
    assert identity_of(build(MINE)) == first
    encoder.gain *= 3
    assert identity_of(encoder) != first
    assert identity_of(build(MINE.replace("square", "abs"))) != first
    encoder.identity = "version 2"
    assert identity_of(encoder) == "version 2"
