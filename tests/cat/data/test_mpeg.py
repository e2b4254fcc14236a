"""MP3: every crop is what decoding the whole file gives, bit for bit, and nothing is written to stderr."""

import functools
import io

import numpy as np
import pytest

from cat.data.audio import AudioError, read_audio

soundfile = pytest.importorskip("soundfile")


@functools.cache
def mp3(rate, channels, mode="CONSTANT", seconds=2, loud_first=False):
    """Rising (or falling) noise: the frames of a variable rate become longer (or shorter)."""
    level = np.linspace(1, 0, seconds * rate) if loud_first else np.linspace(0, 1, seconds * rate)
    noise = 0.3 * np.random.default_rng(0).standard_normal((seconds * rate, channels)) * level[:, None] ** 3
    wave = noise + 0.1 * np.sin(np.arange(len(noise)) * 0.05)[:, None]
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return buffer.getvalue()


def decoded(data):
    wave, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]


def frames(data):
    """All frames; the first one is the header of Xing and LAME."""
    at, found = 0, []
    while at < len(data):
        mpeg1, third = data[at + 1] >> 3 & 3 == 3, data[at + 2]
        kbits = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[third >> 4]
        if not mpeg1:
            kbits = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[third >> 4]
        rate = (44100, 48000, 32000)[third >> 2 & 3] // {3: 1, 2: 2, 0: 4}[data[at + 1] >> 3 & 3]
        size = (144 if mpeg1 else 72) * kbits * 1000 // rate + (third >> 1 & 1)
        found.append(data[at : at + size])
        at += size
    return found


@pytest.fixture
def check(tmp_path, capfd):
    """Reads the file ``data``, whole and in crops, and compares."""

    def check(data, whole, rate, suffix=".mp3", samples=7000):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(data)
        capfd.readouterr()
        if whole is None:
            whole = read_audio(path, rate)
        else:
            np.testing.assert_array_equal(read_audio(path, rate), whole)
        for start in (0.0, 0.01, 0.33, 0.77, 1.0):
            first = min(int(start * (len(whole) - samples + 1)), len(whole) - samples)
            crop = read_audio(path, rate, max_samples=samples, start=start)
            np.testing.assert_array_equal(crop, whole[first : first + samples])
        assert capfd.readouterr().err == ""  # libmpg123's complaints
        return whole

    return check


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_crops_are_those_of_the_whole_file(check, rate, channels, mode):
    data = mp3(rate, channels, mode)
    whole = decoded(data)
    assert len(whole) == 2 * rate
    check(data, whole, rate)


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("loud_first", [False, True])
def test_length_without_a_xing_header(check, rate, loud_first):
    """libsndfile guesses it from the first frame: too short when that is a long one, and too long when short."""
    data = mp3(rate, 1, "VARIABLE", loud_first=loud_first)
    whole = decoded(data)
    bare = data[len(frames(data)[0]) :]
    assert abs(soundfile.info(io.BytesIO(bare)).frames - len(whole)) > 0.4 * len(whole)
    read = check(bare, None, rate)
    assert len(read) == len(frames(bare)) * (1152 if rate == 44100 else 576)
    lame = data.index(b"LAME")
    delay = int.from_bytes(data[lame + 21 : lame + 24], "big") >> 12
    np.testing.assert_allclose(read[delay + 529 :][: len(whole)], whole, atol=1e-6)


@pytest.mark.parametrize("where", ["front", "middle", "end"])
@pytest.mark.parametrize("suffix", [".mp3", ".wav"])
def test_what_is_no_frame_is_passed_over(check, where, suffix):
    data = mp3(16000, 1)
    tag = b"ID3\x03\x00\x00\x00\x00\x01\x48" + b"\xff\xfb\x90\x00" * 50  # 200 bytes that look like frames
    middle = sum(map(len, frames(data)[:30]))
    odd = {
        "front": tag + tag + data,
        "middle": data[:middle] + b"\xff" * 5000 + data[middle:],
        "end": data + b"TAG".ljust(128, b"\xff") + b"\xff\xfb\x90\x00 garbage" * 100,
    }
    check(odd[where], decoded(data), 16000, suffix)


def test_junk_before_the_first_frame(check):
    check(b"junk \xff\xfb\x90\x00" * 100 + mp3(16000, 1), decoded(mp3(16000, 1)), 16000)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_stream_that_begins_in_the_middle(check, rate):
    """Frames whose data began in frames that are not there are silent; the rest is as it was."""
    all_frames = frames(mp3(rate, 2, "VARIABLE"))
    size = 1152 if rate == 44100 else 576
    read = check(b"".join(all_frames[1:]), None, rate)
    part = check(all_frames[20][100:] + b"".join(all_frames[21:]), None, rate)
    np.testing.assert_allclose(part[12 * size :], read[32 * size :], atol=1e-6)
    assert np.abs(part).max() < 1.5


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_cut_off(tmp_path, start):
    data = mp3(16000, 1)
    (tmp_path / "a.mp3").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"cut off: 5\d MPEG frames announced, 2\d are there"):
        read_audio(tmp_path / "a.mp3", 16000, max_samples=1000, start=start)


def test_a_crop_of_a_long_file_decodes_only_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "a.mp3").write_bytes(mp3(8000, 1, seconds=20))
    counts = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: counts.append(n) or read(self, n, **kw))
    read_audio(tmp_path / "a.mp3", 8000, max_samples=8000, start=0.7)
    assert sum(counts) < 8000 + 25 * 576


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 100_000, b"\xff\xfb\x90\x00" * 20_000, b"ID3\x03\0\0\x7f\x7f\x7f\x7f", b"\xff\xfb\xf0\x00" * 1000],
    ids=["ones", "headers", "tag", "no rate"],
)
def test_not_mpeg(tmp_path, data):
    (tmp_path / "a.mp3").write_bytes(data)
    with pytest.raises(AudioError, match="cannot be read"):
        read_audio(tmp_path / "a.mp3", 16000)
