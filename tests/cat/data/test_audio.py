"""Audio files in, waveforms out; and every way in which a file can be unusable."""

import pickle
import sys

import numpy as np
import pytest

from cat.data.audio import AudioError, read_audio

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

RATE = 16000


def chirp(samples, rate=RATE, channels=1):
    """A band-limited signal, another one in every channel."""
    t = np.arange(samples) / rate
    wave = np.stack([0.3 * np.sin(2 * np.pi * (200 * (c + 1) * t + 150 * t * t)) for c in range(channels)], axis=1)
    return wave.astype(np.float32)


def write(path, wave, rate=RATE, **options):
    soundfile.write(path, wave, rate, **options)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats(tmp_path, suffix):
    wave = chirp(RATE)
    read = read_audio(write(tmp_path / f"a.{suffix}", wave), RATE)
    assert read.dtype == np.float32
    assert read.shape == (RATE,)
    lossless = suffix in ("wav", "flac")
    middle = slice(2000, -2000)
    np.testing.assert_allclose(read[middle], wave[middle, 0], atol=1e-4 if lossless else 3e-2)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_sixteen_bits_as_they_are_stored(tmp_path, suffix, start):
    path = write(tmp_path / f"a.{suffix}", chirp(RATE), subtype="PCM_16")
    options = {"max_samples": 5000, "start": start}
    stored = read_audio(path, RATE, allow_int16=True, **options)
    assert stored.dtype == np.int16
    np.testing.assert_array_equal(stored / np.float32(32768), read_audio(path, RATE, **options))


@pytest.mark.parametrize(
    ("suffix", "rate", "channels", "subtype"),
    [("wav", 16000, 2, "PCM_16"), ("wav", 44100, 1, "PCM_16"), ("wav", 16000, 1, "PCM_24"), ("ogg", 16000, 1, None)],
)
def test_what_is_not_sixteen_bits_comes_as_float(tmp_path, suffix, rate, channels, subtype):
    path = write(tmp_path / f"a.{suffix}", chirp(rate, rate, channels), rate, subtype=subtype)
    read = read_audio(path, RATE, allow_int16=True)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, read_audio(path, RATE))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 22051, 32000, 44100, 48000])
def test_resampling_gives_the_same_tone(tmp_path, rate):
    read = read_audio(write(tmp_path / "a.wav", chirp(rate, rate), rate), RATE)
    assert abs(len(read) - RATE) <= 1
    expected = chirp(len(read))[:, 0]
    np.testing.assert_allclose(read[500:-500], expected[500:-500], atol=2e-3)


def test_channels_are_averaged_before_resampling(tmp_path):
    wave = chirp(44100, 44100, channels=3)
    read = read_audio(write(tmp_path / "a.wav", wave, 44100, subtype="FLOAT"), RATE)
    expected = soxr.resample(wave.mean(axis=1), 44100, RATE)
    np.testing.assert_array_equal(read, expected[: len(read)])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("start", [0.0, 0.37, 0.5, 1.0])
def test_a_crop_is_what_cropping_the_whole_file_gives(tmp_path, suffix, rate, start):
    path = write(tmp_path / f"a.{suffix}", chirp(3 * rate, rate, channels=2), rate)
    whole = read_audio(path, RATE)
    crop = read_audio(path, RATE, max_samples=8000, start=start)
    first = min(int(start * (len(whole) - 8000 + 1)), len(whole) - 8000)
    np.testing.assert_allclose(crop, whole[first : first + 8000], atol=1e-6)


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
@pytest.mark.parametrize("start", [0.7, 1.0])
def test_seeking_in_a_lossy_file_is_exact(tmp_path, suffix, start):
    """libsndfile alone gives silence, or misses the place, after such a seek."""
    with soundfile.SoundFile(tmp_path / f"a.{suffix}", "w", RATE, 1) as file:
        for second in chirp(30 * RATE).reshape(30, RATE):  # written in one piece, a long .ogg overflows the stack
            file.write(second)
    whole = read_audio(tmp_path / f"a.{suffix}", RATE)
    crop = read_audio(tmp_path / f"a.{suffix}", RATE, max_samples=8000, start=start)
    first = min(int(start * (len(whole) - 8000 + 1)), len(whole) - 8000)
    np.testing.assert_allclose(crop, whole[first : first + 8000], atol=1e-6)


def test_a_crop_reads_only_what_it_needs(tmp_path, monkeypatch):
    path = write(tmp_path / "long.wav", chirp(60 * 22050, 22050), 22050)
    counts = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: counts.append(n) or read(self, n, **kw))
    assert len(read_audio(path, RATE, max_samples=RATE, start=0.9)) == RATE
    assert counts[0] < 1.3 * 22050


def test_short_clips_are_neither_cropped_nor_padded(tmp_path):
    path = write(tmp_path / "a.wav", chirp(1000))
    assert len(read_audio(path, RATE, max_samples=5000, start=0.5)) == 1000


@pytest.fixture
def broken(tmp_path):
    """Unusable files by name."""
    noise = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
    nan = noise.copy()
    nan[[5, 7]] = np.nan, np.inf
    write(tmp_path / "nan.wav", nan, subtype="FLOAT")
    write(tmp_path / "empty.wav", noise[:0])
    write(tmp_path / "short.wav", noise[:399])
    write(tmp_path / "short_at_16k.wav", noise[:1000], 44100)
    (tmp_path / "zero.flac").touch()
    (tmp_path / "text.wav").write_text("not audio " * 100)
    (tmp_path / "text.mp3").write_text("not audio " * 100)
    (tmp_path / "folder.wav").mkdir()
    write(tmp_path / "cut.flac", noise)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:10_000])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan.wav", "2 of 32000 samples are NaN or infinite"),
        ("empty.wav", "empty"),
        ("zero.flac", "0 bytes"),
        ("short.wav", "too short: 399 samples at 16000 Hz, at least 400"),
        ("short_at_16k.wav", "too short: 362 samples"),
        ("text.wav", "Format not recognised"),
        ("text.mp3", "Format not recognised"),
        ("cut.flac", "cannot be read"),
        ("folder.wav", "is a folder"),
        ("missing.wav", "no such file"),
    ],
)
def test_unusable_files(broken, name, reason):
    with pytest.raises(AudioError) as caught:
        read_audio(broken / name, RATE, min_samples=400)
    assert reason in caught.value.reason
    assert caught.value.path == str(broken / name)
    assert str(broken / name) in str(caught.value)


def test_nan_outside_the_crop_does_not_matter(broken):
    assert np.isfinite(read_audio(broken / "nan.wav", RATE, max_samples=RATE, start=1.0)).all()


def test_a_file_that_stops_early_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", chirp(2000))
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: read(self, n // 2, **kw))
    with pytest.raises(AudioError, match="cut off: 2000 samples announced, 1000"):
        read_audio(path, RATE)


def test_errors_survive_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "empty")))
    assert (error.path, error.reason) == ("a.wav", "empty")


def test_start_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"start is 1\.5"):
        read_audio(write(tmp_path / "a.wav", chirp(1000)), RATE, start=1.5)


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_missing_library_names_the_extra(tmp_path, monkeypatch, name):
    path = write(tmp_path / "a.wav", chirp(1000), 8000)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'cat-kernels\[train\]'"):
        read_audio(path, RATE)
