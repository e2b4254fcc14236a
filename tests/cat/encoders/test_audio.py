"""`CATEncoder`: a clip's embedding is its own, long audio has no seams, bad input is named."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import cat
from cat.checkpoints.hub import EncoderConfig
from cat.data.features import FeatureConfig
from cat.encoders import CATEncoder, audio
from cat.encoders.windows import Blend, Windows
from cat.model import ModelConfig

SMALL = {"channels": (8, 16), "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_dim": 32, "decoder_layers": 1}
FEATURES = FeatureConfig(frames=64)  # 4 rows: 10,480 samples
WINDOW = 400 + 63 * 160
# A frame, less than a patch, a patch, rows in part and whole, a window, and long ones.
LENGTHS = (400, 2000, 2800, 5000, WINDOW - 160, WINDOW, WINDOW + 2559, WINDOW + 2560, 40000)
PER_ROW = 8


def build(pooling: str = "mean", frames: int = 64, **settings) -> CATEncoder:
    torch.manual_seed(0)
    return CATEncoder(EncoderConfig(ModelConfig(**{**SMALL, **settings}), FeatureConfig(frames=frames), pooling))


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def clips(lengths=LENGTHS) -> list[torch.Tensor]:
    return [noise(n, seed) for seed, n in enumerate(lengths)]


def parts(output, b: int) -> dict[str, torch.Tensor]:
    """All that an output says of clip ``b``."""
    said = {}
    for name, layer in {"out": output, **{f"layer {n}": layer for n, layer in output.layers.items()}}.items():
        said |= {f"{name} clip": layer.clip[b], f"{name} cls": layer.cls[b]}
        said[f"{name} frames"] = layer.frames[b, : output.rows[b]]
        said[f"{name} patches"] = layer.patches[b, : output.rows[b] * PER_ROW]
    return {name: tensor.double() for name, tensor in said.items()}


def assert_each_is_alone(together, clips, encoder, oracle, eps: float) -> None:
    """The rule for tolerances: the oracle is the clip alone in float64."""
    for b, clip in enumerate(clips):
        exact, alone = parts(oracle(clip, 16000, layers="all"), 0), parts(encoder(clip, 16000, layers="all"), 0)
        for name, found in parts(together, b).items():
            allowed = 2 * (alone[name] - exact[name]).abs().max() + 4 * eps * exact[name].abs().max()
            assert (found - exact[name]).abs().max() <= allowed, f"clip {b}, {name}"


@pytest.mark.parametrize("settings", [
    {},
    {"kernels": "reference"},
    {"stem": "patch", "resolutions": (16,), "channels": ()},
], ids=["dense", "visible", "patch"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_does_not_hear_its_neighbours_nor_padding(settings, dtype):
    encoder, oracle = build("both", **settings).to(dtype), build("both", **settings).to(dtype).double()
    together = encoder(clips(), 16000, layers="all")
    assert together.rows == (1, 1, 1, 2, 4, 4, 5, 5, 16)
    assert_each_is_alone(together, clips(), encoder, oracle, torch.finfo(dtype).eps)
    for b, count in enumerate(together.rows):
        assert not together.frames[b, count:].any()
        assert not together.patches[b, count * PER_ROW :].any()
    assert together.mask.sum(1).tolist() == list(together.rows)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_nor_how_many_they_are(batch_size):
    encoder = build()
    for count in (1, 2, 4):
        some = clips()[-count:]
        assert_each_is_alone(
            encoder(some, 16000, layers="all", batch_size=batch_size), some, encoder, build().double(), 2**-23
        )


def test_what_the_parts_are():
    """By the network itself: a clip of one window, pooled by hand."""
    encoder, clip = build("both"), noise(WINDOW - 300)
    out = encoder(clip, 16000, layers=[0, -1])
    spec = cat.data.features.log_mel(clip, FEATURES)
    layers = encoder.encoder.layers(spec)
    tokens = layers[-1][0]
    torch.testing.assert_close(out.cls[0], tokens[0])
    assert torch.equal(out.patches[0], tokens[1:])
    rows = tokens[1:].reshape(4, PER_ROW, 32).mean(1)
    torch.testing.assert_close(out.frames[0], rows)
    torch.testing.assert_close(out.clip[0], torch.cat([tokens[0], tokens[1:].mean(0)]))
    assert list(out.layers) == [0, 2]
    torch.testing.assert_close(out.layers[0].cls[0], layers[0][0, 0])
    assert torch.equal(out.layers[2].frames, out.frames)
    assert encoder.dim == out.clip.shape[1] == 64
    fewer = encoder(clip, 16000, patches=False)
    assert fewer.patches is None
    assert not fewer.layers
    torch.testing.assert_close(fewer.clip, out.clip)
    for pooling, part in (("mean", slice(32, 64)), ("cls", slice(0, 32))):
        assert torch.equal(build(pooling)(clip, 16000).clip[0], out.clip[0, part])


def test_times_are_centres_and_do_not_drift():
    assert audio.frame_times(FEATURES, 16, 3).tolist() == [0.0875, 0.2475, 0.4075]
    odd = FeatureConfig(sample_rate=22050)  # a shift of 220.5 samples, that is 220
    for row in (0, 1, 225_000):
        first = Fraction(row * 16 * odd.frame_shift, 22050)
        last = Fraction((row * 16 + 15) * odd.frame_shift + odd.frame_length, 22050)
        assert audio.frame_times(odd, 16, 1, first=row).item() == float((first + last) / 2)
    out = build()(clips(), 16000)
    assert out.times.tolist() == pytest.approx([0.0875 + 0.16 * row for row in range(16)])


@pytest.mark.parametrize("settings", [{}, {"window": 0.48, "overlap": 0.32}, {"window": 0.32, "overlap": 0}])
def test_windows_cover_all_and_their_weights_add_up(settings):
    encoder, wave = build().double(), noise(40000)
    out = encoder(wave, 16000, **settings)
    windows = encoder.windows(settings.get("window"), settings.get("overlap"))
    starts = windows.starts(16)
    assert starts[0] == 0
    assert starts[-1] + windows.rows == 16
    assert all(0 < b - a <= windows.hop for a, b in itertools.pairwise(starts))
    total, weights = torch.zeros(16, 32, dtype=torch.float64), torch.zeros(16, 1, dtype=torch.float64)
    for start in starts:
        first = start * 2560
        alone = encoder(wave[first : first + 400 + (windows.rows * 16 - 1) * 160], 16000).frames[0]
        total[start : start + windows.rows] += alone * windows.weights()[:, None]
        weights[start : start + windows.rows] += windows.weights()[:, None]
    torch.testing.assert_close(out.frames[0], total / weights)
    torch.testing.assert_close(out.clip[0], out.frames[0].mean(0))


def test_the_weights_of_neighbours_are_a_straight_line():
    blend = Blend(Windows(6, 3))
    blend.add(0, torch.zeros(6, 1))
    blend.add(3, torch.ones(6, 1))
    assert blend.take(4).flatten().tolist() == [0, 0, 0, 0.25]
    torch.testing.assert_close(blend.take().flatten(), torch.tensor([0.5, 0.75, 1, 1, 1]))


def test_a_seam_is_not_to_be_heard_in_a_steady_sound():
    """Frames differ by their position too; where windows meet they differ no more from one to the next than inside."""
    encoder = build(frames=640)
    wave = 0.2 * torch.sin(2 * torch.pi * 440 / 16000 * torch.arange(16000 * 20))
    inside = encoder(wave[: FeatureConfig(frames=640).samples], 16000).frames[0]
    whole = encoder(wave, 16000).frames[0]
    step = inside.diff(dim=0).norm(dim=1)
    steps = whole.diff(dim=0).norm(dim=1)
    assert len(steps) > 3 * 30
    assert steps[1:-1].max() <= 1.05 * step[1:-1].max()
    hard = encoder(wave, 16000, overlap=0).frames[0].diff(dim=0).norm(dim=1)
    assert hard[1:-1].max() > 2 * step[1:-1].max()  # without an overlap there is one


def test_a_clip_as_long_as_a_window_is_one(monkeypatch):
    encoder, wave = build(), noise(WINDOW + 100)  # the last samples fill no frame
    assert torch.equal(encoder(wave, 16000).patches, encoder(wave[:WINDOW], 16000).patches)
    monkeypatch.setattr(audio, "Blend", None)
    encoder(wave, 16000)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [400, 7001, 10**6])
def test_a_stream_gives_what_the_whole_does(length, chunk):
    encoder, wave = build().double(), noise(length)
    whole = encoder(wave, 16000, layers=[1])
    pieces = list(encoder.stream(wave.split(chunk), 16000, layers=[1], patches=True, batch_size=3))
    for name in ("frames", "patches"):
        joined = torch.cat([getattr(piece, name)[0] for piece in pieces])
        torch.testing.assert_close(joined, getattr(whole, name)[0])
    torch.testing.assert_close(torch.cat([p.layers[1].frames[0] for p in pieces]), whole.layers[1].frames[0])
    assert torch.equal(torch.cat([piece.times for piece in pieces]), whole.times)
    torch.testing.assert_close(audio.mean_of((piece.clip[0], piece.rows[0]) for piece in pieces), whole.clip[0])


@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_stream_at_another_rate(rate):
    pytest.importorskip("soxr")
    encoder, wave = build(), noise(rate * 2)
    whole = encoder(wave, rate)
    pieces = list(encoder.stream(wave.split(999), rate))
    assert sum(piece.rows[0] for piece in pieces) == whole.rows[0]
    torch.testing.assert_close(torch.cat([p.frames[0] for p in pieces]), whole.frames[0], atol=1e-4, rtol=1e-4)


def test_ten_hours_as_a_stream_take_no_more_memory():
    code = """
import resource, torch
from cat.checkpoints.hub import EncoderConfig
from cat.data.features import FeatureConfig
from cat.encoders import CATEncoder
from cat.model import ModelConfig
small = ModelConfig(channels=(8, 8), embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_layers=1)
encoder = CATEncoder(EncoderConfig(small, FeatureConfig()))
encoder._tokens = lambda waves, numbers, patches: [torch.zeros(encoder._rows(len(w)), 1, 2, 16) for w in waves]
minute = torch.zeros(60 * 16000)
def peak(minutes):
    rows = sum(piece.rows[0] for piece in encoder.stream((minute for _ in range(minutes)), 16000))
    return rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, before = peak(10)
rows, after = peak(600)
print(rows, after - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows == 225_000
    assert grown < 20_000  # kB; all of it would be 2.3 GB


def test_any_way_to_give_a_clip_is_the_same(tmp_path):
    encoder = build()
    whole = (noise(5000) * 32768).round()
    int16 = whole.short()
    expected = encoder(whole / 32768, 16000).clip
    backwards = np.ascontiguousarray(int16.numpy()[::-1])[::-1]
    frozen = int16.numpy().copy()
    frozen.flags.writeable = False
    for same in (
        int16, int16.numpy(), [int16], (int16.numpy(),), int16[None], backwards, frozen, int16.numpy().astype(">i2"),
        whole.double() / 32768, (whole.numpy() / 32768).astype(np.float64), [whole.numpy()[None][0] / 32768],
    ):  # fmt: skip
        torch.testing.assert_close(encoder(same, 16000).clip, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(encoder(same, np.int64(16000)).clip, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_another_rate_is_heard_as_a_file_of_that_rate_is(rate, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    encoder, wave = build(), noise(int(rate * 0.7001)).numpy()
    soundfile.write(tmp_path / "a.wav", wave, rate, "FLOAT")
    file = cat.data.read_audio(tmp_path / "a.wav", 16000)
    assert torch.equal(encoder(wave, rate).patches, encoder(file, 16000).patches)


def test_silence_and_loudness_are_finite():
    out = build()([torch.zeros(5000), torch.ones(5000), 100 * noise(5000)], 16000)
    assert out.patches.isfinite().all()
    assert torch.equal(out.clip[0], out.clip[1])  # a constant has no sound either


@pytest.mark.parametrize(("waveforms", "rate", "error", "words"), [
    (noise(399), 16000, ValueError, r"clip 0 is too short: 399 samples at 16000 Hz \(24.9 ms\), and a frame takes 400"),
    ([noise(500), noise(100)], 8000, ValueError, "clip 1 is too short: 200 samples at 16000 Hz"),
    ([], 16000, ValueError, "no clip"),
    ([noise(900), torch.empty(0)], 16000, ValueError, "clip 1 is empty"),
    (torch.cat([noise(900), torch.tensor([torch.nan, torch.inf])]), 16000, ValueError, "2 of the 902 samples of clip"),
    (torch.zeros(2, 2, 900), 16000, ValueError, r"shape \(2, 2, 900\); expected one clip .* of several channels"),
    ([torch.zeros(2, 900)], 16000, ValueError, r"clip 0 has shape \(2, 900\); expected \(samples,\)"),
    (torch.zeros(900, dtype=torch.int32), 16000, TypeError, r"clip 0 is torch.int32; expected floating point in \[-1"),
    (np.zeros(900, np.uint8), 16000, TypeError, "clip 0 is torch.uint8; expected"),
    (np.zeros(900, complex), 16000, TypeError, "clip 0 is complex128; expected"),
    (np.array(["a"] * 900), 16000, TypeError, "clip 0 is <U1; expected"),
    ("a.wav", 16000, TypeError, "waveforms is of type str; expected a tensor or array"),
    ([[0.0] * 900], 16000, TypeError, "clip 0 is of type list; expected a tensor or an array"),
    (noise(900), 0, ValueError, "sample_rate is 0; expected"),
    (noise(900), -16000, ValueError, "sample_rate is -16000"),
    (noise(900), 44100.5, ValueError, "sample_rate is 44100.5"),
    (noise(900), None, ValueError, "sample_rate is None"),
    (noise(900), float("nan"), ValueError, "sample_rate is nan"),
    (noise(900), 10**8, ValueError, "sample_rate is 100000000; expected .* that can be resampled to 16000 Hz"),
])  # fmt: skip
def test_bad_waveforms_are_named(waveforms, rate, error, words):
    with pytest.raises(error, match=words):
        build()(waveforms, rate)


@pytest.mark.parametrize(("settings", "words"), [
    ({"layers": [3]}, r"layers is \[3\]; expected 'all' or numbers from 0 to 2"),
    ({"layers": "last"}, "layers is 'last'"),
    ({"window": 0.0}, "expected a window of 1 to 768 rows"),
    ({"window": 1000.0}, "expected a window of 1 to 768 rows"),
    ({"overlap": 0.7}, "and an overlap that is shorter"),
    ({"batch_size": 0}, "batch_size is 0"),
])  # fmt: skip
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        build()(noise(5000), 16000, **settings)
    with pytest.raises(ValueError, match=words):
        list(build().stream([noise(5000)], 16000, **settings))


def test_a_stream_without_sound_is_an_error():
    for chunks in ([], [noise(100), noise(200)]):
        with pytest.raises(ValueError, match="the recording is too short"):
            list(build().stream(chunks, 16000))
    with pytest.raises(ValueError, match="1 of the 2 samples of chunk 1 are NaN"):
        list(build().stream([noise(900), torch.tensor([0.0, torch.nan])], 16000))
    with pytest.raises(ValueError, match="no embeddings"):
        audio.mean_of([])


@pytest.mark.gpu
def test_a_gpu_hears_what_the_cpu_does():
    expected = build()(clips(), 16000)
    found = build().cuda()([clip.cuda() if len(clip) % 2 else clip for clip in clips()], 16000)
    assert found.frames.is_cuda
    torch.testing.assert_close(found.frames.cpu(), expected.frames, atol=5e-3, rtol=5e-3)
