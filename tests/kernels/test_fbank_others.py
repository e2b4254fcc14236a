"""fbank against two other packages' own code, torchaudio's file and kaldi-native-fbank, over settings and sounds."""

import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import others
from cat_kernels import backends, fbank
from cat_kernels.mel.reference import ENERGY_FLOOR, WINDOWS

GOLDEN = Path(__file__).parents[1] / "golden" / "fbank_torchaudio.safetensors"
RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
FRAMES = ((25.0, 10.0), (32.0, 10.0), (20.0, 5.0), (10.0, 5.0))  # length and shift in milliseconds
BINS = (23, 40, 64, 80, 128)

needs_torchaudio = pytest.mark.skipif(bool(others.why_not("torchaudio")), reason=str(others.why_not("torchaudio")))
needs_kaldi = pytest.mark.skipif(
    bool(others.why_not("kaldi-native-fbank")), reason=str(others.why_not("kaldi-native-fbank"))
)


def implementations():
    """Every backend on every device; those on a GPU only where there is one."""
    for device, name in itertools.product(("cpu", "cuda"), backends.OPERATORS["fbank"]):
        yield pytest.param((device, name), id=f"{device}-{name}", marks=[pytest.mark.gpu] if device == "cuda" else [])


@pytest.fixture(params=implementations())
def ours(request):
    """fbank of one clip by one backend, on the CPU again."""
    device, backend = request.param
    reason = backends.why_not("fbank", backend, device)
    if reason is not None:
        pytest.skip(reason)
    return lambda wave, **options: fbank(wave.to(device), backend=backend, **options).cpu()


@pytest.fixture(scope="module")
def golden():
    """The waves of the golden file, by name."""
    tensors = pytest.importorskip("safetensors.torch").load_file(GOLDEN)
    return {name.removeprefix("wave."): wave for name, wave in tensors.items() if name.startswith("wave.")}


# --- sounds ----------------------------------------------------------------------------------------------------------


def white(rate, seconds=0.25):
    return 0.1 * torch.randn(int(rate * seconds), generator=torch.Generator().manual_seed(0))


def chirp(rate, seconds=0.25):
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return (0.5 * torch.sin(2 * math.pi * (50 * t + (0.45 * rate - 50) / (2 * seconds) * t**2))).float()


def speechlike(rate, seconds=0.25):
    """Syllables: harmonics of a moving pitch under three formants, and breath; some of it as quiet as a recording."""
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    pitch = 2 * math.pi * 120 * t + torch.sin(2 * math.pi * 2.5 * t)
    wave = torch.zeros_like(t)
    for harmonic in range(1, int(0.45 * rate / 130)):
        formants = ((600, 150, 1.0), (1500, 250, 0.5), (2600, 400, 0.3))
        gain = sum(g * math.exp(-0.5 * ((130 * harmonic - f) / width) ** 2) for f, width, g in formants)
        wave += (gain + 0.02 / harmonic) * torch.sin(harmonic * pitch + harmonic)
    breath = torch.randn(len(t), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (0.05 * (0.5 - 0.5 * torch.cos(2 * math.pi * 8 * t)) * wave + 0.003 * breath).float()


SOUNDS = {"white": white, "speechlike": speechlike, "chirp": chirp}
TONES = ("chirp", "tone_1k")


def check(name, actual, expected):
    """What float32 allows on log-mel energies; a bin far below a tone holds little but the rounding of its frame."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    assert error[expected > expected.max() - 12].max() <= 1e-3
    if name in TONES:
        assert error.max() <= 5e-2
    else:
        assert error.max() <= 3e-3
        assert error.flatten().quantile(0.999) <= 3e-4


# --- torchaudio ------------------------------------------------------------------------------------------------------


def torchaudio_in_float64(wave, **options):
    """torchaudio makes its tables in the default type. In float32 a bin at the foot of a triangle has a weight of few
    digits, or none: energies in it are off by up to several nats, at worst where an edge meets an FFT bin."""
    torch.set_default_dtype(torch.float64)
    try:
        return others.torchaudio_fbank(wave.double(), **options)
    finally:
        torch.set_default_dtype(torch.float32)


def settings(rate, length, shift):
    """One for each number of bins, the rest drawn at random."""
    draw = random.Random(f"{rate} {length}")
    for bins in BINS:
        yield {
            "sample_rate": rate,
            "num_mel_bins": bins,
            "frame_length_ms": length,
            "frame_shift_ms": shift,
            "window": draw.choice(WINDOWS),
            "low_freq": draw.choice((20.0, 0.0, 125.0)),
            "high_freq": draw.choice((0.0, -400.0, 0.4 * rate)),
            "preemphasis": draw.choice((0.97, 0.97, 0.0)),
            "remove_dc": draw.choice((True, True, False)),
        }


@needs_torchaudio
@pytest.mark.parametrize(("length", "shift"), FRAMES)
@pytest.mark.parametrize("rate", RATES)
def test_torchaudio_over_settings(ours, rate, length, shift):
    for options, name in itertools.product(settings(rate, length, shift), SOUNDS):
        wave = SOUNDS[name](rate)
        check(name, ours(wave, **options), torchaudio_in_float64(wave, **options))


@needs_torchaudio
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rate", RATES)
def test_torchaudio_in_float32(ours, rate, window):
    for bins, name in itertools.product(BINS, SOUNDS):
        wave, options = SOUNDS[name](rate), {"sample_rate": rate, "num_mel_bins": bins, "window": window}
        check(name, ours(wave, **options), others.torchaudio_fbank(wave, **options))


@needs_torchaudio
@pytest.mark.parametrize("window", WINDOWS)
def test_torchaudio_on_the_golden_waves(ours, golden, window):
    for name, wave in golden.items():
        check(name, ours(wave, window=window), others.torchaudio_fbank(wave, window=window))


@needs_torchaudio
def test_torchaudio_padded_and_normalised_as_models_are_fed(ours):
    wave = speechlike(16000)
    padded = torch.nn.functional.pad(others.torchaudio_fbank(wave), (0, 0, 0, 9))
    actual = ours(wave, target_length=len(padded), mean=-4.268, std=4.569)
    check("speechlike", actual, (padded + 4.268) / (2 * 4.569))


@needs_torchaudio
def test_torchaudio_of_integer_samples(ours):
    """BEATs: povey window on samples of 16 bits that are not scaled down."""
    wave = (speechlike(16000) * 32768).round().to(torch.int16)
    check(
        "speechlike", ours(wave, window="povey", scale=32768.0), others.torchaudio_fbank(wave.float(), window="povey")
    )


@needs_torchaudio
def test_torchaudios_file_loaded_alone_gives_the_golden_tensors():
    assert others.torchaudio_kaldi().__file__.endswith("torchaudio/compliance/kaldi.py")
    assert "torchaudio" not in sys.modules  # no stub is left behind for others to find
    tensors = pytest.importorskip("safetensors.torch").load_file(GOLDEN)
    for name in ("white_0.1", "speechlike", "silence"):
        torch.testing.assert_close(
            others.torchaudio_fbank(tensors[f"wave.{name}"]), tensors[f"fbank.{name}"], rtol=0, atol=3e-3
        )


# --- kaldi-native-fbank ----------------------------------------------------------------------------------------------


@needs_kaldi
@pytest.mark.parametrize("window", WINDOWS)
def test_kaldi_with_128_bins(ours, golden, window):
    # From 20 Hz one of the bins is empty, which Kaldi refuses. The clip's mean is removed first, as the data pipeline
    # does: a frame's mean is a plain sum in Kaldi, and what is left of a large one reaches the lowest bins.
    options = {"window": window, "low_freq": 25.0}
    for name, wave in golden.items():
        wave = wave - wave.mean()
        check(name, ours(wave, **options), others.kaldi_fbank(wave.tolist(), **options))


@needs_kaldi
@pytest.mark.parametrize("rate", RATES)
def test_kaldi_over_sample_rates(ours, rate):
    options = {"sample_rate": rate, "num_mel_bins": 40, "high_freq": -400.0, "remove_dc": rate != 24000}
    for name, sound in SOUNDS.items():
        wave = sound(rate)
        check(name, ours(wave, **options), others.kaldi_fbank(wave.tolist(), **options))


@needs_kaldi
def test_kaldi_refuses_the_empty_bin():
    """The reason why the comparison starts at 25 Hz."""
    with pytest.raises(ValueError, match="num_mel_bins"):
        others.kaldi_fbank([0.0] * 400)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(others.torchaudio_fbank, marks=needs_torchaudio),
        pytest.param(lambda wave, **options: others.kaldi_fbank(wave.tolist(), **options), marks=needs_kaldi),
    ],
    ids=["torchaudio", "kaldi"],
)
def test_silence_is_the_floor_exactly(ours, theirs):
    wave, options = torch.zeros(800), {"low_freq": 25.0}
    expected = theirs(wave, **options)
    assert expected.eq(torch.tensor(ENERGY_FLOOR).log()).all()
    assert ours(wave, **options).equal(expected)
