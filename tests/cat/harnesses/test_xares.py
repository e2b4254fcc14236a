"""X-ARES: what its runner looks for in the file, and its own checker."""

from __future__ import annotations

import pytest
import torch

from cat.harnesses import xares
from tests.cat.harnesses.conftest import noise


def test_one_name_ends_in_encoder():
    assert [name for name in dir(xares) if name.endswith("Encoder")] == ["XaresEncoder"]


@pytest.mark.parametrize(("milliseconds", "frames"), [("40", 79), ("80", 40), ("160", 20)])
def test_the_interface(checkpoint, monkeypatch, milliseconds, frames):
    monkeypatch.setenv("CAT_STEP_MS", milliseconds)
    encoder = xares.XaresEncoder()
    assert isinstance(encoder, torch.nn.Module)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 16, float(milliseconds))
    audio = noise(2, 50000)
    both = encoder(audio)
    assert (both.shape, both.dtype, both.requires_grad) == ((2, frames, 16), torch.float32, False)
    alone = encoder(audio[1])
    torch.testing.assert_close(alone, both[1:], rtol=1e-4, atol=1e-5)


def test_a_clip_of_ten_minutes(checkpoint, monkeypatch):
    monkeypatch.setenv("CAT_STEP_MS", "160")
    assert xares.XaresEncoder()(noise(1, 600 * 16000)).shape == (1, 3750, 16)


def test_xares_own_checker(checkpoint):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    from xares.utils import attr_from_py_path

    for path in ("cat/harnesses/xares.py", "cat.harnesses.xares"):
        encoder = attr_from_py_path(path, endswith="Encoder")()
        assert checker.check_audio_encoder(encoder)
