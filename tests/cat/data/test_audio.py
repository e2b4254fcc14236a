"""Audio files in, waveforms out; and every way in which a file can be unusable."""

import os
import pickle
import struct
import sys

import numpy as np
import pytest

from cat.data.audio import AudioError, read_audio, read_windows

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


@pytest.mark.parametrize(("rate", "seconds"), [(100, 60), (1000, 9), (4000, 3), (384_000, 1)])
def test_crops_at_rates_far_from_the_models(tmp_path, rate, seconds):
    noise = 0.1 * np.random.default_rng(0).standard_normal(seconds * rate)
    path = write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    assert_crops_are_those_of(read_audio(path, RATE), path)


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


@pytest.mark.parametrize(
    ("suffix", "rate"), [("wav", RATE), ("wav", 44100), ("flac", 8000), ("ogg", RATE), ("mp3", 44100)]
)
def test_windows_are_the_clip(tmp_path, suffix, rate):
    path = write(tmp_path / f"a.{suffix}", chirp(3 * rate, rate), rate)
    whole = read_audio(path, RATE)
    windows = list(read_windows(path, RATE, 10000))
    assert max(map(len, windows)) <= 10000
    assert max(map(len, windows)) - min(map(len, windows)) <= 1
    np.testing.assert_allclose(np.concatenate(windows), whole, atol=1e-6)
    np.testing.assert_array_equal(next(read_windows(path, RATE, 10**9)), whole)


def assert_crops_are_those_of(whole, path, samples=5000, **options):
    for start in (0.0, 0.37, 0.8, 1.0):
        first = min(int(start * (len(whole) - samples + 1)), len(whole) - samples)
        crop = read_audio(path, RATE, max_samples=samples, start=start, **options)
        np.testing.assert_allclose(crop, whole[first : first + samples], atol=1e-6)


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        ("wav", "GSM610"),
        ("wav", "G721_32"),
        ("wav", "NMS_ADPCM_32"),
        ("wav", "IMA_ADPCM"),
        ("wav", "MS_ADPCM"),
        ("wav", "ULAW"),
        ("au", "G723_40"),
        ("aiff", "GSM610"),
        ("aiff", "DWVW_16"),
        ("caf", "ALAC_16"),
        ("ogg", "OPUS"),
    ],
)
@pytest.mark.parametrize("rate", [8000, 16000])
def test_codecs_that_cannot_seek_are_read_from_the_start(tmp_path, suffix, subtype, rate):
    path = write(tmp_path / f"a.{suffix}", chirp(3 * rate, rate), rate, subtype=subtype)
    whole = read_audio(path, RATE)
    assert abs(len(whole) - 3 * RATE) < 1000  # codecs fill their last block
    np.testing.assert_allclose(whole[1000:30000], chirp(3 * RATE)[1000:30000, 0], atol=0.15)
    np.testing.assert_allclose(np.concatenate(list(read_windows(path, RATE, 7000))), whole, atol=1e-6)
    assert_crops_are_those_of(whole, path)


def flac(path, announced, samples=2 * RATE):
    """A FLAC file whose header announces another number of samples; 0 is the format's word for unknown."""
    data = bytearray(write(path, chirp(samples)).read_bytes())
    data[21:26] = struct.pack(">BI", data[21] & 0xF0 | announced >> 32, announced & 0xFFFF_FFFF)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("announced", [0, 2**36 - 1])
def test_flac_of_unknown_length(tmp_path, announced):
    whole = read_audio(write(tmp_path / "a.flac", chirp(2 * RATE)), RATE)
    path = flac(tmp_path / "b.flac", announced)
    np.testing.assert_array_equal(read_audio(path, RATE), whole)
    assert_crops_are_those_of(whole, path)


def test_flac_that_has_less_than_it_could(tmp_path):
    path = flac(tmp_path / "a.flac", 3 * RATE)
    for options in ({}, {"max_samples": 5000}, {"max_samples": 5000, "start": 1.0}):
        with pytest.raises(AudioError, match="cut off: 48000 samples announced, 32000 could be decoded"):
            read_audio(path, RATE, **options)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_flac_that_is_cut_off_is_an_error_to_every_crop(broken, start):
    with pytest.raises(AudioError, match="damaged or cut off"):
        read_audio(broken / "cut.flac", RATE, max_samples=500, start=start)


@pytest.mark.parametrize("tail", [b"TAG".ljust(128, b"\0"), b"\xff\xf8garbage" * 20_000], ids=["tag", "garbage"])
def test_flac_with_something_behind_it(tmp_path, tail):
    path = write(tmp_path / "a.flac", chirp(2 * RATE))
    whole = read_audio(path, RATE)
    path.write_bytes(path.read_bytes() + tail)
    np.testing.assert_array_equal(read_audio(path, RATE), whole)
    assert_crops_are_those_of(whole, path)


def with_granule(data, granule):
    """The Ogg stream ``data`` whose last page ends at sample ``granule``."""
    page = data.rindex(b"OggS")
    data = bytearray(data)
    data[page + 6 : page + 14] = struct.pack("<q", granule)
    data[page + 22 : page + 26] = bytes(4)
    checksum = 0
    for byte in data[page:]:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFF_FFFF
    data[page + 22 : page + 26] = struct.pack("<I", checksum)
    return data


@pytest.mark.parametrize("granule", [0, 100, 1 << 62])
def test_opus_of_absurd_length(tmp_path, granule):
    path = write(tmp_path / "a.opus", chirp(2 * RATE), format="OGG", subtype="OPUS")
    whole = read_audio(path, RATE)
    path.write_bytes(with_granule(path.read_bytes(), granule))
    read = read_audio(path, RATE)
    assert len(read) >= 15000  # libsndfile gives all pages, or all but the one that lies
    np.testing.assert_allclose(read[:15000], whole[:15000], atol=1e-6)
    assert_crops_are_those_of(read, path)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_that_is_cut_off_is_a_shorter_one(tmp_path, subtype):
    """It announces no length, and recordings of streams end like this."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * RATE)
    with soundfile.SoundFile(tmp_path / "a.ogg", "w", RATE, 1, subtype=subtype, format="OGG") as file:
        for second in noise.reshape(20, RATE):
            file.write(second)
    whole, data = read_audio(tmp_path / "a.ogg", RATE), (tmp_path / "a.ogg").read_bytes()
    (tmp_path / "b.ogg").write_bytes(data[: len(data) // 2])
    read = read_audio(tmp_path / "b.ogg", RATE)
    assert 7 * RATE < len(read) < 11 * RATE
    np.testing.assert_allclose(read[:-2000], whole[: len(read) - 2000], atol=1e-6)
    assert_crops_are_those_of(read, tmp_path / "b.ogg")


def test_many_channels_in_little_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", chirp(4000, channels=100), subtype="FLOAT")
    whole = read_audio(path, RATE)
    monkeypatch.setattr("cat.data.decoding._BLOCK", 100_000)  # 1000 samples at a time
    np.testing.assert_array_equal(read_audio(path, RATE), whole)
    np.testing.assert_array_equal(read_audio(path, RATE, max_samples=1500, start=1.0), whole[2500:])


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
    write(tmp_path / "samples.raw", noise, subtype="PCM_16")
    write(tmp_path / "slow.wav", noise, 1)
    write(tmp_path / "fast.wav", noise, 2**31 - 1)
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
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
        ("cut.flac", "cannot be read: damaged or cut off"),
        ("folder.wav", "is a folder"),
        ("missing.wav", "no such file"),
        ("nan.wav/below.wav", "no such file"),
        ("samples.raw", "A headerless file must be made a WAV file"),
        ("slow.wav", "sample rate 1 Hz: too far from 16000 Hz"),
        ("fast.wav", "sample rate 2147483647 Hz: too far from 16000 Hz"),
        ("pipe.wav", "is a pipe or a device"),
        ("device.wav", "is a pipe or a device"),
        ("dangling.wav", "a link to a file that is missing, nowhere.wav"),
        ("loop.wav", "a link that leads back to itself"),
        ("x" * 300, "its name is too long"),
        ("null\0byte.wav", "null byte"),
        ("lone\ud800.wav", "its name cannot be the name of a file"),
    ],
)
def test_unusable_files(broken, name, reason):
    with pytest.raises(AudioError) as caught:
        read_audio(broken / name, RATE, min_samples=400)
    assert reason in caught.value.reason
    assert caught.value.path == str(broken / name)
    assert str(broken / name) in str(caught.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "no permission to read it"),
        (OSError(116, "Stale file handle"), "cannot be read: Stale file handle"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (MemoryError(), "its samples do not fit into memory"),
        (ValueError("array is too big"), "cannot be read: array is too big"),
        (OverflowError("too large"), "cannot be read: too large"),
        (AssertionError("of soundfile"), "cannot be read: of soundfile"),
    ],
)
@pytest.mark.parametrize("where", ["io.FileIO", "soundfile.SoundFile.read"])
def test_whatever_one_file_raises_names_it(tmp_path, monkeypatch, where, error, reason):
    def fail(*_args, **_options):
        raise error

    path = write(tmp_path / "a.wav", chirp(1000))
    monkeypatch.setattr(where, fail)
    with pytest.raises(AudioError) as caught:
        read_audio(path, RATE)
    assert (caught.value.path, caught.value.reason) == (str(path), reason)


def test_being_stopped_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    path = write(tmp_path / "a.wav", chirp(1000))
    monkeypatch.setattr(soundfile.SoundFile, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        read_audio(path, RATE)


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_without_permission(tmp_path):
    path = write(tmp_path / "a.wav", chirp(1000))
    path.chmod(0)
    with pytest.raises(AudioError, match="no permission to read it"):
        read_audio(path, RATE)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_name_that_is_not_utf8(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", chirp(RATE))
    whole = read_audio(path, RATE)
    named = os.fsencode(tmp_path) + b"/caf\xe9." + suffix.encode()
    os.rename(path, named)
    np.testing.assert_array_equal(read_audio(os.fsdecode(named), RATE), whole)


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
