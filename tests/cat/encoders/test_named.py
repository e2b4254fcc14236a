"""Encoders that a function of the user's returns: found, called once, and checked before they are used."""

from __future__ import annotations

import pytest
import torch

from cat.encoders import CatEncoder, build_encoder
from cat.encoders.named import check_encoder
from cat.evaluation.cache import UnknownIdentity, identity

GOOD = """
import torch

class Loudness(torch.nn.Module):
    name, sample_rate, dim = "loudness", 1000, 2

    def forward(self, waveform, lengths=None):
        ends = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
        clips = [clip[:end] for clip, end in zip(waveform, ends)]
        return torch.stack([torch.stack([clip.std(), clip.abs().mean()]) for clip in clips])

CALLS = []

def loudness(device):
    CALLS.append(device)
    return Loudness()

def nothing(device):
    pass

def two(one, other):
    pass
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def test_a_function_of_a_file_or_a_module(file, monkeypatch):
    encoder = build_encoder(f"{file}:loudness")
    assert (encoder.name, encoder.dim) == ("loudness", 2)
    monkeypatch.syspath_prepend(file.parent)
    assert build_encoder("mine:loudness").name == "loudness"
    import mine

    assert [call.type for call in mine.CALLS] == ["cpu"]
    with pytest.raises(UnknownIdentity, match="may change"):
        identity(encoder)  # the file may say something else next time


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{file}:loud", ImportError, "has no function 'loud'; it has loudness, nothing, two"),
        ("{file}:nothing", TypeError, "is None; expected that the function returns an encoder"),
        ("{file}:two", TypeError, r"expected two\(device\), which is called as two\(device=...\): missing"),
        ("{file}x.py:two", FileNotFoundError, "no such file"),
        ("no_such_package_here.encoders:clap", ImportError, "no module 'no_such_package_here'; expected one that is"),
        ("clpa:base", ImportError, "no module 'clpa'"),
    ],
)
def test_what_cannot_be_called_is_named(file, spec, error, message):
    with pytest.raises(error, match=message):
        build_encoder(spec.format(file=file))


class Plain:
    name, sample_rate, dim = "plain", 1000, 1

    def __call__(self, waveform, lengths=None):
        ends = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
        return torch.stack([clip[:end].std()[None] for clip, end in zip(waveform, ends, strict=True)])


def plain(device):
    return Plain()


def make(**changes):
    return type("Changed", (Plain,), changes)()


def padded(self, waveform, lengths=None):
    return waveform.std(dim=1, keepdim=True)


def random(self, waveform, lengths=None):
    return torch.rand(len(waveform), 1)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (object(), "has no attribute 'name'"),
        (make(name=""), "has name=''; expected name, a name"),
        (make(sample_rate=16e3), "has sample_rate=16000.0; expected sample_rate, a whole number above 0"),
        (make(dim=2), r"gave \(2, 1\) torch.float32 for 2 clips; expected a float32 tensor \(2, 2\)"),
        (make(__call__=lambda self, x, n=None: x.numpy()), "gave ndarray for 2 clips"),
        (make(__call__=lambda self, x, n=None: torch.full((len(x), 1), torch.nan)), "gave NaN or infinite values"),
        (
            make(__call__=lambda self, x, n=None: torch.ones(len(x), 1, requires_grad=True)),
            "gave embeddings with gradients",
        ),
        (make(__call__=padded), "gave a clip alone another embedding than beside a longer one"),
        (make(__call__=random), "gave two embeddings for one clip"),
    ],
)
def test_what_is_no_encoder(encoder, message):
    with pytest.raises(TypeError, match=f"encoder 'mine' {message}"):
        check_encoder(encoder, "mine")
    check_encoder(Plain(), "mine")


def test_the_same_network_with_random_weights(tmp_path, monkeypatch):
    from tests.cat.encoders.test_frozen import noise, tiny_encoder

    trained = tiny_encoder()
    monkeypatch.setattr(CatEncoder, "from_checkpoint", lambda *_, **__: trained)
    twin, other = build_encoder(f"untrained:{tmp_path}"), build_encoder(f"untrained:3:{tmp_path}")
    assert twin.name == "untrained:0:cat"
    waveform = noise(1, 9000)
    assert torch.equal(twin(waveform), trained.untrained_twin(0)(waveform))
    assert torch.equal(other(waveform), trained.untrained_twin(3)(waveform))
    assert not torch.allclose(twin(waveform), other(waveform), atol=1e-3)


@pytest.mark.parametrize("spec", ["logmel", "random:3", "tests.cat.encoders.test_named:plain"])
def test_what_has_no_network_has_no_twin(spec):
    with pytest.raises(ValueError, match=r"^encoder 'untrained:.* has no twin with random weights; expected a network"):
        build_encoder(f"untrained:{spec}")
