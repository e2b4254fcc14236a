"""fbank against torchaudio's output, against float64, and each of the details re-implementations get wrong."""

import math
from pathlib import Path

import pytest
import torch

from cat_kernels import backends
from cat_kernels.mel import FBANK_PRESETS, FbankSettings, LogMelFbank, fbank, fbank_reference
from cat_kernels.mel.reference import ENERGY_FLOOR, _kept_tables, _make_tables, _spectrum, mel_matrix

GOLDEN = Path(__file__).parents[1] / "golden" / "fbank_torchaudio.safetensors"
FLOOR = math.log(ENERGY_FLOOR)
CLIPS = ["chirp", "clipped", "dc_plus_noise", "impulse", "one_frame", "silence", "speechlike", "tiny_1e-6", "tone_1k"]
CLIPS += ["two_frames_minus_one", "white_0.1"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden():
    return pytest.importorskip("safetensors.torch").load_file(GOLDEN)


@pytest.fixture(params=backends.OPERATORS["fbank"])
def backend(request):
    reason = backends.why_not("fbank", request.param, "cpu")
    return request.param if reason is None else pytest.skip(reason)


def noise(*shape, seed=0, scale=0.1, dtype=torch.float32):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
def test_matches_torchaudio(golden, backend, name):
    expected = golden[f"fbank.{name}"]
    error = (fbank(golden[f"wave.{name}"], backend=backend) - expected).abs()
    assert error[expected > expected.max() - 12].max() <= 1e-3
    if name in ("silence", "tiny_1e-6"):
        assert error.max() == 0
    elif name in ("chirp", "tone_1k"):
        assert error.max() <= 5e-2
    else:
        assert error.max() <= 3e-3
        assert error.flatten().quantile(0.999) <= 3e-4


def test_all_golden_clips_are_tested(golden):
    assert {key.removeprefix("wave.") for key in golden if key.startswith("wave.")} == set(CLIPS)


@pytest.mark.parametrize("name", CLIPS)
def test_error_bound_against_float64(golden, backend, name):
    """|sqrt(E) - sqrt(E_ref)| <= 16 eps ||windowed frame|| sqrt(row sum) + 4 eps sqrt(E)."""
    wave = golden[f"wave.{name}"][None].double()
    settings, eps = FbankSettings(), torch.finfo(torch.float32).eps
    expected = fbank_reference(wave, None, settings).exp().sqrt()
    assert expected.dtype == torch.float64
    # Parseval: the frame's norm from its spectrum (first and last bin once, the others twice).
    power = _spectrum(wave, None, settings, 0.97, True, 1.0).abs().square()
    norm = ((2 * power.sum(-1) - power[..., 0] - power[..., -1]) / settings.fft_length).sqrt()
    row_sum = mel_matrix(settings, CPU, torch.float64).sum(0)
    bound = 16 * eps * norm[..., None] * row_sum.sqrt() + 4 * eps * expected
    found = fbank(wave.float(), backend=backend).double().exp().sqrt()
    assert ((found - expected).abs() <= bound).all()


def test_float64_stays_float64():
    assert fbank(noise(1, 800, dtype=torch.float64)).dtype == torch.float64
    assert fbank_reference(noise(1, 800, dtype=torch.float64), None, FbankSettings()).dtype == torch.float64


# --- the eight points ------------------------------------------------------------------------------------------------


def test_1_clip_mean_is_not_removed_here(backend):
    wave = noise(1, 800)
    with_offset, without = (fbank(wave + offset, remove_dc=False, backend=backend) for offset in (0.5, 0.0))
    assert (with_offset - without).abs().max() > 1


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (160_000, 998)])
def test_2_only_whole_frames(samples, frames, backend):
    assert fbank(torch.zeros(samples), backend=backend).shape == (frames, 128)


def test_3_frame_mean_preemphasis_window_padding():
    """One frame, spelt out sample by sample."""
    wave = noise(400, dtype=torch.float64) + 0.3
    centred = [float(x) - float(wave.mean()) for x in wave]
    emphasised = [centred[0] - 0.97 * centred[0]] + [centred[i] - 0.97 * centred[i - 1] for i in range(1, 400)]
    windowed = [y * (0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) for i, y in enumerate(emphasised)]
    spectrum = torch.fft.fft(torch.tensor(windowed + [0.0] * 112, dtype=torch.float64))
    energies = spectrum[:257].abs().square() @ mel_matrix(FbankSettings(), CPU, torch.float64)
    torch.testing.assert_close(fbank(wave), energies.clamp(min=ENERGY_FLOOR).log()[None], rtol=1e-10, atol=1e-10)


def test_3_nothing_is_carried_from_frame_to_frame(backend):
    wave = noise(1, 4000)
    torch.testing.assert_close(
        fbank(wave, backend=backend)[:, 7],
        fbank(wave[:, 7 * 160 : 7 * 160 + 400], backend=backend)[:, 0],
        rtol=0,
        atol=2e-5,
    )


def test_4_power_without_normalisation_and_no_nyquist():
    # Twice the amplitude: four times the power.
    wave = noise(1, 400)
    torch.testing.assert_close(
        fbank(2 * wave, dtype=torch.float32)[..., 4:], fbank(wave)[..., 4:] + math.log(4), rtol=0, atol=1e-5
    )
    assert mel_matrix(FbankSettings(), CPU, torch.float64)[256].eq(0).all()


def test_5_triangles_linear_in_mel_and_the_empty_row():
    weights = mel_matrix(FbankSettings(), CPU, torch.float64)
    assert [f for f in range(128) if weights[:, f].max() == 0] == [3]
    assert fbank(noise(1, 4000))[..., 3].eq(torch.tensor(FLOOR)).all()
    # Bin 100 (3125 Hz) by hand.
    mel = [1127 * math.log(1 + f / 700) for f in (20, 8000, 3125)]
    place = (mel[2] - mel[0]) / ((mel[1] - mel[0]) / 129)
    row = int(place)  # the bin lies between the centres of rows row - 1 and row
    assert weights[100, row - 1].item() == pytest.approx(1 - (place - row), abs=1e-9)
    assert weights[100, row].item() == pytest.approx(place - row, abs=1e-9)


def test_6_floor(backend):
    assert fbank(torch.zeros(1, 400), backend=backend).eq(torch.tensor(-15.942385)).all()


def test_6_nan_comes_through(backend):
    wave = noise(2, 1200)
    wave[0, 500] = math.nan
    spec = fbank(wave, backend=backend)
    hit = [t for t in range(6) if 160 * t <= 500 < 160 * t + 400]
    assert spec[0, hit].isnan().all()
    assert spec[0, [t for t in range(6) if t not in hit]].isfinite().all()
    assert spec[1].isfinite().all()


def test_7_padding_comes_before_the_normalisation(backend):
    wave = noise(1, 1040)  # 5 frames
    plain = fbank(wave, backend=backend)
    longer = fbank(wave, target_length=8, mean=-4.268, std=4.569, backend=backend)
    torch.testing.assert_close(longer[:, :5], (plain + 4.268) / (2 * 4.569))
    torch.testing.assert_close(longer[:, 5:], torch.full((1, 3, 128), 4.268 / (2 * 4.569)))
    assert longer[0, 5, 0].item() == pytest.approx(0.467, abs=1e-3)
    assert fbank(wave, target_length=3, backend=backend).equal(plain[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8_output_dtypes(dtype, backend):
    wave = noise(2, 1000)
    torch.testing.assert_close(
        fbank(wave, dtype=dtype, backend=backend), fbank(wave, backend=backend).to(dtype), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
def test_8_input_dtypes(dtype, backend):
    wave = (noise(2, 1000) * 32768).round().to(torch.int16)
    scaled = wave.float() / 32768
    given = wave if dtype == torch.int16 else scaled.to(dtype)
    assert fbank(given, backend=backend).equal(
        fbank(scaled if dtype == torch.int16 else given.float(), backend=backend)
    )
    assert fbank(given, backend=backend).dtype == torch.float32


# --- everything else -------------------------------------------------------------------------------------------------


def test_ragged_batch_equals_clip_by_clip(backend):
    lengths = torch.tensor([400, 1999, 2000])
    wave = noise(3, 2000)
    for row, length in zip(wave, lengths, strict=True):
        row[length:] = math.nan  # must not be read
    options = {"target_length": 14, "mean": -4.0, "std": 4.5}
    spec = fbank(wave, lengths, **options, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(spec[b], fbank(wave[b, :length], **options, backend=backend), rtol=0, atol=1e-5)
    assert fbank(wave, lengths, backend=backend)[0, 1:].eq(0).all()


def test_ragged_gradient_ignores_what_lies_behind():
    wave = noise(2, 1000)
    wave[0, 600:] = math.nan
    wave.requires_grad_()
    fbank(wave, torch.tensor([600, 1000])).sum().backward()
    assert wave.grad.isfinite().all()
    assert wave.grad[0, 600:].eq(0).all()
    assert wave.grad[0, :560].ne(0).any()


@pytest.mark.parametrize("window", ["hanning", "povey", "hamming"])
@pytest.mark.parametrize(
    "options", [{}, {"lengths": torch.tensor([150, 100]), "target_length": 5, "mean": -4.0, "std": 4.5}]
)
def test_gradcheck(window, options):
    # A small general setting: 4 kHz, frames of 60 samples, 64-point FFT.
    settings = {"sample_rate": 4000, "num_mel_bins": 6, "frame_length_ms": 15, "frame_shift_ms": 6, "scale": 3.0}
    wave = noise(2, 150, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fbank(x, window=window, **settings, **options), (wave,))


def test_gradient_equals_autograd_through_the_reference():
    wave = noise(2, 3000, dtype=torch.float64)
    wave[1, 500:1500] = 0  # some energies are at the floor
    spec_grad = noise(2, 17, 128, seed=1, dtype=torch.float64)
    grads = []
    for function in (fbank, lambda x: fbank_reference(x, None, FbankSettings())):
        x = wave.clone().requires_grad_()
        function(x).backward(spec_grad)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_windows():
    for name, middle, edge in (("hanning", 1.0, 0.0), ("povey", 1.0, 0.0), ("hamming", 1.0, 0.08)):
        window = _make_tables(FbankSettings(sample_rate=16040, window=name), CPU, torch.float64)[0]  # 401 samples
        assert (window[200].item(), window[0].item()) == pytest.approx((middle, edge))
    hann, povey = (_make_tables(FbankSettings(window=name), CPU, torch.float64)[0] for name in ("hanning", "povey"))
    torch.testing.assert_close(povey, hann**0.85)


def test_scale_and_band(backend):
    wave = noise(1, 800)
    torch.testing.assert_close(fbank(wave, scale=32768.0, backend=backend), fbank(wave * 32768, backend=backend))
    assert fbank(wave, high_freq=-400, backend=backend).equal(fbank(wave, high_freq=7600, backend=backend))
    # 22.05 kHz: frames of int(551.25) samples
    assert fbank(wave, sample_rate=22050, backend=backend).shape == (1, 2, 128)


def test_one_clip_empty_batch_and_strides(backend):
    wave = noise(4, 1600)
    batched = fbank(wave, backend=backend)
    torch.testing.assert_close(fbank(wave[2], backend=backend), batched[2], rtol=0, atol=1e-5)
    assert fbank(wave[:0], backend=backend).shape == (0, 8, 128)
    assert fbank(wave[:0], target_length=3, backend=backend).shape == (0, 3, 128)
    torch.testing.assert_close(fbank(wave.T.contiguous().T, backend=backend), batched, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        fbank(wave[:1].expand(3, -1), backend=backend), batched[:1].expand(3, -1, -1), rtol=0, atol=1e-4
    )
    assert batched.is_contiguous()


def test_tables_are_made_once_and_survive_inference_mode():
    _kept_tables.cache_clear()
    with torch.inference_mode():
        fbank(noise(1, 800))
    wave = noise(1, 800).requires_grad_()
    fbank_reference(wave, None, FbankSettings()).sum().backward()
    fbank(noise(1, 800))
    assert _kept_tables.cache_info().misses == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_tables_of_a_transform_are_not_kept(compiled):
    """Made inside of one, they are tensors that only it can use."""
    _kept_tables.cache_clear()
    wave, tangent = noise(1, 800), noise(1, 800)

    def derivatives(wave):
        return torch.func.jvp(fbank, (wave,), (tangent,))[1], torch.func.grad(lambda w: fbank(w).sum())(wave)

    (torch.compile(derivatives, fullgraph=True, backend="aot_eager") if compiled else derivatives)(wave)
    assert _kept_tables.cache_info().misses == 0
    torch.testing.assert_close(fbank(wave, backend="torch"), fbank_reference(wave, None, FbankSettings()))


@pytest.mark.parametrize(
    ("waveform", "error", "words"),
    [
        (torch.zeros(399), ValueError, ["399", "400", "pad"]),
        (torch.zeros(2, 10), ValueError, ["10", "400"]),
        (torch.zeros(16000, 1), ValueError, ["16000", "(samples, channels)", "waveform.T"]),
        (torch.zeros(16000, 2), ValueError, ["(samples, channels)"]),
        (torch.zeros(1, 1, 400), ValueError, ["(1, 1, 400)", "(B, n)"]),
        (torch.zeros(()), ValueError, ["()"]),
        (torch.zeros(400, dtype=torch.int32), TypeError, ["int32", "int16"]),
        (torch.zeros(400, dtype=torch.complex64), TypeError, ["complex64"]),
        ([0.0] * 400, TypeError, ["list"]),
    ],
)
def test_bad_waveforms(waveform, error, words):
    with pytest.raises(error) as caught:
        fbank(waveform)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([400, -1], ValueError, ["lengths[1] = -1", "400"]),
        ([399, 800], ValueError, ["lengths[0] = 399", "400"]),
        ([400, 801], ValueError, ["lengths[1] = 801", "800"]),
        ([400], ValueError, ["(1,)", "(2,)"]),
        ([400.0, 400.0], TypeError, ["int64", "float32"]),
    ],
)
def test_bad_lengths(lengths, error, words):
    with pytest.raises(error) as caught:
        fbank(noise(2, 800), torch.tensor(lengths))
    assert all(word in str(caught.value) for word in words), caught.value


def test_lengths_on_another_device():
    with pytest.raises(ValueError, match=r"lengths is on meta and waveform on cpu.*to\(waveform\.device\)"):
        fbank(noise(2, 800), torch.tensor([800, 800], device="meta"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"window": "blackman"}, "hanning"),
        ({"low_freq": 9000}, "8000"),
        ({"high_freq": 9000}, "8000"),
        ({"frame_shift_ms": 0}, "frame_shift_ms=0"),
        ({"num_mel_bins": 0}, "num_mel_bins=0"),
        ({"target_length": 0}, "target_length=0"),
        ({"mean": 1.0}, "std=None"),
        ({"mean": 1.0, "std": 0.0}, "std=0.0"),
        ({"backend": "triton"}, "torch"),
    ],
)
def test_bad_settings(options, word):
    with pytest.raises((ValueError, RuntimeError), match=word):
        fbank(noise(1, 800), **options)


def test_bad_output_dtype():
    with pytest.raises(TypeError, match="int16"):
        fbank(noise(1, 800), dtype=torch.int16)


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives():
    wave, lengths = noise(3, 20_000), torch.tensor([400, 13_333, 20_000])
    options = {"target_length": 128, "mean": -4.0, "std": 4.5}
    on_gpu = fbank(wave.cuda(), lengths.cuda(), **options)
    torch.testing.assert_close(on_gpu.cpu(), fbank(wave, lengths, **options), rtol=0, atol=1e-3)
    # Without a look at the values a clip shorter than a frame cannot be refused: it has no frames.
    assert fbank(wave.cuda(), torch.tensor([399, -1, 400]).cuda())[:2].eq(0).all()


def test_export_and_dynamic_lengths():
    class Module(torch.nn.Module):
        def forward(self, wave):
            return fbank(wave, target_length=16, mean=-4.0, std=4.5)

    wave = noise(2, 2000)
    samples = torch.export.Dim("samples", min=400, max=100_000)
    exported = torch.export.export(Module(), (wave,), dynamic_shapes=({1: samples},)).module()
    for n in (2000, 3111):
        wave = noise(2, n)
        assert exported(wave).equal(Module()(wave))


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "frames"), [("audioset", 1024), ("esc50", 512), ("spc2", 128)])
def test_presets(name, frames):
    wave, preset = noise(1, 20_000), FBANK_PRESETS[name]
    spec = LogMelFbank(name)(wave)
    assert spec.shape == (1, frames, 128)
    plain = fbank(wave)
    torch.testing.assert_close(spec[:, :123], (plain[:, :123] - preset["mean"]) / (2 * preset["std"]))
    pad = torch.tensor(-preset["mean"] / (2 * preset["std"]))
    torch.testing.assert_close(spec[0, 123, 0], plain[0, 123, 0] if frames == 123 else pad)


def test_preset_of_beats():
    """Samples as 16-bit integers, Kaldi's own window, and statistics of those."""
    wave = noise(2, 4000)
    expected = (fbank(wave * 2**15, window="povey") - 15.41663) / (2 * 6.55582)
    torch.testing.assert_close(LogMelFbank("beats")(wave), expected)
    as_int = (wave * 2**15).round().to(torch.int16)
    torch.testing.assert_close(LogMelFbank("beats")(as_int), LogMelFbank("beats")(as_int.float() / 2**15))


def test_module_is_the_function():
    wave, lengths = noise(2, 4000), torch.tensor([4000, 1000])
    module = LogMelFbank("audioset", target_length=30, num_mel_bins=64, dtype=torch.bfloat16)
    options = {**FBANK_PRESETS["audioset"], "target_length": 30, "num_mel_bins": 64, "dtype": torch.bfloat16}
    assert module(wave, lengths).equal(fbank(wave, lengths, **options))
    assert module(wave[0]).shape == (30, 64)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert repr(module) == "LogMelFbank('audioset', target_length=30, num_mel_bins=64, dtype=torch.bfloat16)"
    assert repr(LogMelFbank(window="povey")) == "LogMelFbank(window='povey')"


@pytest.mark.parametrize(
    ("preset", "options", "error", "words"),
    [
        ("audiosets", {}, ValueError, ["'audiosets'", "'audioset'", "'beats'"]),
        (None, {"mel_bins": 64}, TypeError, ["mel_bins", "help"]),
        ("audioset", {"window": "blackman"}, ValueError, ["'blackman'", "'povey'"]),
        ("audioset", {"std": None}, ValueError, ["std=None"]),
        (None, {"dtype": torch.int16}, TypeError, ["int16"]),
    ],
)
def test_bad_modules_are_refused_when_made(preset, options, error, words):
    with pytest.raises(error) as caught:
        LogMelFbank(preset, **options)
    assert all(word in str(caught.value) for word in words), caught.value
