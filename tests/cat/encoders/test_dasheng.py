"""Dasheng's files: the front end against direct formulas, pieces, padding, files that do not fit.

Compared by hand with the package `dasheng` 0.0.9 (random weights, three blocks of 96, clips of 0.03 to 10.5 s): dB to
1e-4 of 100, embedding to 1.2e-6 of 2.9; in a batch of a loud and a silent clip the package's own embedding of the
silent one moves by 0.46 of 3.2, ours by 2e-7.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cat.checkpoints import CheckpointError
from cat.encoders import build_encoder
from cat.encoders.dasheng import HEADS, DashengNetwork, decibels
from tests.released_encoders import dasheng, dasheng_file


def noise(clips: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_encoder(f"dasheng:{dasheng_file(tmp_path_factory.mktemp('dasheng') / 'dasheng_base.pt')}")


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def filters() -> np.ndarray:
    """(257, 64), bin by bin."""
    corners = [700 * (10 ** (i * mel(8000) / 65 / 2595) - 1) for i in range(66)]
    bank = np.zeros((257, 64))
    for n in range(257):
        hertz = n * 16000 / 512
        for f, (left, middle, right) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
            bank[n, f] = max(0, min((hertz - left) / (middle - left), (right - hertz) / (right - middle)))
    return bank


def spectrum(wave: np.ndarray) -> np.ndarray:
    """(64, T) in dB."""
    padded, window = np.pad(wave, 256, mode="reflect"), np.hanning(513)[:-1]
    frames = [padded[at : at + 512] * window for at in range(0, len(padded) - 511, 160)]
    power = np.abs(np.fft.rfft(frames)) ** 2 @ filters()
    db = 10 * np.log10(np.maximum(power, 1e-10)).T
    return np.maximum(db, db.max() - 120)


def test_spectrogram_in_decibels():
    wave = noise(1, 9_000)
    wave[:, :4_000] *= 1e-6  # far below the loudest
    found = decibels(wave, torch.tensor([9_000]))[0]
    np.testing.assert_allclose(found.numpy(), spectrum(wave[0].double().numpy()), atol=5e-3)
    assert found.shape == (64, 1 + 9_000 // 160)


def test_the_range_ends_below_the_clips_own_maximum():
    wave = torch.cat([20 * noise(1, 8_000), 1e-5 * noise(1, 8_000)])
    both = decibels(wave, torch.tensor([8_000, 8_000]))
    assert torch.equal(both[1:], decibels(wave[1:], torch.tensor([8_000])))
    assert (both[1] < both[0].max() - 120).float().mean() > 0.5  # of the whole batch's maximum it would be flat there
    assert both[1].std() > 1


def test_clip_alone_is_the_clip_in_a_batch(encoder):
    wave, lengths = noise(4, 20_000), torch.tensor([20_000, 11_111, 480, 20_000])  # 31, 17, 1 and 31 tokens
    together = encoder(wave, lengths)
    wave[1, 11_111:] = 7.0  # what lies behind the end is not heard
    assert torch.equal(encoder(wave, lengths), together)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(wave[b : b + 1, :n])[0], together[b], atol=1e-5, rtol=1e-4)
    assert (encoder.sample_rate, encoder.dim, encoder.min_samples) == (16_000, 32, 480)


def test_pieces_know_nothing_of_each_other(encoder):
    """Ten tokens of four frames a piece; the mean is over all tokens."""
    spec = decibels(noise(1, 16_000), torch.tensor([16_000]))[:, :, :100]  # 10, 10 and 5 tokens
    whole = encoder.model(spec, torch.tensor([25]))
    parts = [encoder.model(part, torch.tensor([part.shape[2] // 4])) for part in spec.split(40, dim=2)]
    torch.testing.assert_close(whole, (10 * parts[0] + 10 * parts[1] + 5 * parts[2]) / 25, atol=1e-6, rtol=1e-5)


def test_a_clip_without_a_token_is_refused(encoder):
    with pytest.raises(ValueError, match="a clip has 479 samples at 16 kHz; Dasheng hears no fewer than 480"):
        encoder(noise(2, 4_000), torch.tensor([4_000, 479]))


def test_released_size():
    with torch.device("meta"):
        network = DashengNetwork(768, 12, HEADS[768], 3072, 252)
    assert network.state_dict().keys() == dasheng(depth=12).keys()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 85.4
    assert {width // heads for width, heads in HEADS.items()} == {64, 80}


def test_a_released_file_brings_its_front_end(encoder, tmp_path):
    """As buffers, which must be those that ours computes."""
    buffers = {
        "front_end.0.spectrogram.window": torch.hann_window(512),
        "front_end.0.mel_scale.fb": torch.from_numpy(filters()).float(),
    }
    path = tmp_path / "dasheng.pt"
    same = build_encoder(f"dasheng:{dasheng_file(path, dasheng() | buffers)}")
    assert torch.equal(same(noise(1, 8_000)), encoder(noise(1, 8_000)))
    for name, wrong in (("window", torch.hamming_window(512)), ("fb", torch.zeros(201, 64))):
        full = next(buffer for buffer in buffers if buffer.endswith(name))
        with pytest.raises(CheckpointError, match=f"{full}.* is not that of 64 HTK mel bins up to 8000 Hz"):
            build_encoder(f"dasheng:{dasheng_file(path, dasheng() | buffers | {full: wrong})}")


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"time_pos_embed": None}, {}, "no tensor time_pos_embed; expected a released file of Dasheng"),
        ({"blocks.1.norm2.bias": None}, {}, r"1 missing \(first: blocks.1.norm2.bias\)"),
        ({"cls_token": torch.zeros(1, 1, 32)}, {}, r"1 unknown \(first: cls_token\)"),
        ({"norm.bias": torch.zeros(9)}, {}, r"norm.bias is \(9,\), expected \(32,\)"),
        ({}, {"num_heads": 5}, "num_heads is 5 for a width of 32; expected a divisor"),
        ({}, {"num_heads": None}, "num_heads is None for a width of 32; expected a divisor"),
        ({}, {"hop_size": 320}, "was trained with hop_size=320; only Dasheng with hop_size=160"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, settings, message):
    tensors = {name: t for name, t in (dasheng() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        build_encoder(f"dasheng:{dasheng_file(tmp_path / 'other.pt', tensors, **settings)}")
