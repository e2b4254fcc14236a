"""Files whose header announces another size than they have: cut off, or never told."""

import io
import struct

import numpy as np
import pytest

from cat.data.audio import AudioError, read_audio

soundfile = pytest.importorskip("soundfile")

RATE = 16000
WAVE = (0.3 * np.sin(np.arange(32000) ** 1.2 / 40)).astype(np.float32)
# Where the size of the samples stands: behind these bytes, so many further on, in this format.
FIELDS = {
    "WAV": (b"data", 4, "<I"),
    "RF64": (b"ds64", 16, "<Q"),
    "AIFF": (b"SSND", 4, ">I"),
    "AU": (b".snd", 8, ">I"),
    "W64": (b"data\xf3\xac", 16, "<Q"),
    "CAF": (b"data", 4, ">Q"),
    "SVX": (b"BODY", 4, ">I"),
}
ID3 = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10)


def sound(kind, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, RATE, format=kind, subtype="PCM_16", **options)
    return bytearray(buffer.getvalue())


def put(data, kind, size):
    """``data`` whose header announces ``size``; -1 is all bits."""
    name, further, form = FIELDS[kind]
    size %= 1 << 8 * struct.calcsize(form)
    struct.pack_into(form, data, data.index(name) + further, size)
    return data


def check(path, expected=WAVE):
    """All of it is read, and crops are where they are in the whole."""
    whole = read_audio(path, RATE)
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    for start in (0.0, 0.4, 1.0):
        first = min(int(start * (len(whole) - 4999)), len(whole) - 5000)
        np.testing.assert_array_equal(read_audio(path, RATE, max_samples=5000, start=start), whole[first:][:5000])


@pytest.mark.parametrize(("kind", "tag"), [*((kind, b"") for kind in FIELDS), ("WAV", ID3), ("AIFF", ID3)])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_cut_off(tmp_path, kind, tag, start):
    data = tag + sound(kind)
    (tmp_path / "a").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"cut off: 640\d\d bytes of samples announced, \d+ are there"):
        read_audio(tmp_path / "a", RATE, max_samples=1000, start=start)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("size", [0, -1, -37, "greatest"])
def test_size_that_was_never_told(tmp_path, kind, size):
    """What programs that write into a pipe, or died, leave in the header."""
    bits = 8 * struct.calcsize(FIELDS[kind][2])
    data = put(sound(kind), kind, (1 << bits - 1) - 1 if size == "greatest" else size)
    if kind == "WAV":
        data[4:8] = b"\0\0\0\0" if size == 0 else b"\xff\xff\xff\xff"
    if kind == "RF64":
        data[20:28] = bytes(8) if size == 0 else b"\xff" * 8
    (tmp_path / "a").write_bytes(data)
    check(tmp_path / "a")


def test_wav_that_was_never_closed(tmp_path):
    """Both sizes are 0, which libsndfile takes for no samples."""
    data = put(sound("WAV"), "WAV", 0)
    data[4:8] = struct.pack("<I", 36)
    (tmp_path / "a.wav").write_bytes(data)
    check(tmp_path / "a.wav")


def test_wav_without_samples_is_empty(tmp_path):
    """Its header agrees with its size: the bytes that follow are another chunk."""
    data = sound("WAV")[:44] + b"LIST" + struct.pack("<I", 4000) + bytes(4000)
    put(data, "WAV", 0)[4:8] = struct.pack("<I", len(data) - 8)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(AudioError, match="empty"):
        read_audio(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize(
    ("kind", "more"),
    # of W64 and SVX libsndfile reads all there is
    [*((kind, 44) for kind in FIELDS), *((kind, -2000) for kind in FIELDS if kind not in ("W64", "SVX"))],
)
def test_size_that_is_not_quite_true(tmp_path, kind, more):
    """Less is what the header says; a little more, such as the header counted among the samples, is what is there."""
    name, further, form = FIELDS[kind]
    data = sound(kind)
    said = struct.unpack_from(form, data, data.index(name) + further)[0]
    (tmp_path / "a").write_bytes(put(data, kind, said + more))
    check(tmp_path / "a", WAVE[: 32000 + min(0, more) // 2])


@pytest.mark.parametrize("size", [3, 600, 70001])
def test_chunks_before_the_samples(tmp_path, size):
    data = sound("WAV")
    chunk = b"junk" + struct.pack("<I", size) + bytes(size + size % 2)
    data[36:36] = chunk
    (tmp_path / "a.wav").write_bytes(data)
    check(tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(data[:-10000])
    with pytest.raises(AudioError, match="cut off: 64000 bytes of samples announced, 54000 are there"):
        read_audio(tmp_path / "a.wav", RATE, max_samples=1000)


def test_what_follows_the_samples_is_not_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(sound("WAV") + b"garbage" * 1000)
    check(tmp_path / "a.wav")


def test_chunks_that_lead_nowhere(tmp_path):
    for size in (0, 2, 0xFFFF_FFF0):
        data = sound("WAV")[:36] + (b"junk" + struct.pack("<I", size)) * 5000
        (tmp_path / "a.wav").write_bytes(data)
        with pytest.raises(AudioError):
            read_audio(tmp_path / "a.wav", RATE)
