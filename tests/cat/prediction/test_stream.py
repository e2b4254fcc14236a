"""Streams: what is told is told once and is what the whole file has, whatever pieces it comes in."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat.commands import main
from cat.prediction import CATClassifier, EventSettings
from cat.prediction.events import ended
from cat.prediction.files import predict_files
from cat.prediction.stream import PCM, EventStream, Samples

soundfile = pytest.importorskip("soundfile")

RATE = 16000
EVENTS = dict.fromkeys(("low", "high", "none"), EventSettings(low=0.2))
SCENE = (("low", 0.3, 1.1), ("high", 0.8, 4.0), ("low", 2.0, 2.3), ("low", 7.5, 9.9))


@pytest.mark.parametrize("options", [{}, {"hop": 0.48, "lookahead": 0.32}, {"step": 0.08}])
@pytest.mark.parametrize("chunk", [1601, 50000, 10**6])
def test_a_stream_has_the_events_of_the_file(tones, sound, tmp_path, options, chunk):
    wave = sound(9.7, *SCENE)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    plan = tones.plan(**options, live=True)
    (offline,) = predict_files(tones, [tmp_path / "a.wav"], plan=plan, events=EVENTS, batch_size=1)

    stream, said, heard = EventStream(tones, EVENTS, plan), [], 0
    for piece in np.split(wave, range(chunk, len(wave), chunk)):
        heard += len(piece)
        new = stream.feed(piece)
        assert all(event.onset < heard / RATE for event in new)
        said += new
    said += stream.finish()

    assert ended(said) == offline.events
    assert len(offline.events) == 4
    assert sorted(event.number for event in said) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert stream.heard.seconds == pytest.approx(9.7)
    assert stream.heard.events == 4
    assert "real-time factor" in stream.heard.summary()


def test_a_real_model_says_of_a_stream_what_it_says_of_the_file(save_run, sound, tmp_path):
    classifier = CATClassifier.from_pretrained(save_run("frames"))
    wave = np.random.default_rng(0).normal(size=5 * RATE).astype(np.float32) * np.repeat(
        [0.001, 0.5, 0.1, 0.3, 0], RATE
    )
    wave = wave.astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    plan = classifier.plan(live=True)
    chosen = dict.fromkeys(classifier.classes, EventSettings(0.6))
    (offline,) = predict_files(classifier, [tmp_path / "a.wav"], plan=plan, events=chosen, batch_size=1)
    stream = EventStream(classifier, chosen, plan)
    said = [event for piece in np.array_split(wave, 77) for event in stream.feed(piece)] + stream.finish()
    assert ended(said) == offline.events
    assert offline.events


def test_an_onset_is_told_soon(tones, sound):
    """After the lookahead and no more than a hop; at 0.16 s each that is within half a second of audio."""
    stream = EventStream(tones, EVENTS, tones.plan(live=True))
    wave = sound(6.0, ("low", 3.2, 5.0))
    told = {}
    for number, piece in enumerate(np.array_split(wave, 600)):
        for event in stream.feed(piece):
            told[(number + 1) / 100] = event.offset
    assert list(told.values()) == [None, pytest.approx(4.96, abs=0.05)]
    onset, end = told
    assert 3.2 < onset < 3.2 + 0.16 + 3 * 0.16 + 0.05
    assert 5.0 < end < 5.0 + 0.16 + 3 * 0.16 + 0.05
    assert stream.heard.latest < onset - 3.2 + 0.2 + stream.heard.busy


def test_a_clip_head_tells_tags_once(save_run, sound):
    classifier = CATClassifier.from_pretrained(save_run(loss="bce"))
    scores = classifier(sound(10.0), RATE).scores[0]
    chosen = {label: EventSettings(0.5) for label in classifier.classes}
    stream = EventStream(classifier, chosen, classifier.plan(hop=0.32))
    said = stream.feed(sound(10.0)) + stream.finish()
    expected = [label for label, score in zip(classifier.classes, scores.tolist(), strict=True) if score >= 0.5]
    assert [(event.label, event.onset, event.offset) for event in ended(said)] == [(one, 0, 10) for one in expected]
    assert len(said) == 2 * len(expected) > 0


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 5000])
def test_short_and_silent_streams(tones, samples):
    stream = EventStream(tones, EVENTS, tones.plan(live=True))
    assert stream.feed(np.zeros(samples, np.float32)) == stream.finish() == []
    assert stream.heard.summary().startswith(f"heard {samples / RATE:.2f} s")


def test_ten_hours_take_no_more_memory_than_one(tones):
    """What a stream keeps, as bytes; the model is left out, which knows one window."""
    tones.features = dataclasses.replace(tones.features, sample_rate=1000, frames=1024)
    plan = tones.plan(hop=9.6, lookahead=0.64)
    loud = itertools.cycle([0.9] * 40 + [0.1] * 30)
    tones.hear = lambda windows, size: [
        (item, (None, np.array([[next(loud)] * 3 for _ in range(item[1].end - item[1].begin)]))) for item in windows
    ]
    stream = EventStream(tones, dict.fromkeys(EVENTS, EventSettings(median=5, gap=0.3)), plan)
    kept = []
    for _ in range(10):
        for _ in range(60):
            stream.feed(np.zeros(60 * 1000, np.float32))
        kept.append(len(pickle.dumps((stream._windower, stream._finder, stream.heard))))
    assert stream.heard.seconds == 36000
    assert stream.heard.events > 3 * 3000
    assert max(kept) < min(kept) + 2000


# ---------------------------------------------------------------- samples out of bytes


def pieces(data: bytes, cuts: list[int]):
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    return iter([data[a:b] for a, b in itertools.pairwise(edges) if b > a])


def encoded(wave: np.ndarray, container: str, pcm: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(
        file, wave, RATE, format=container, subtype=PCM[pcm][0], endian="LITTLE" if container == "RAW" else None
    )
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PCM)), st.integers(1, 3), st.lists(st.integers(1, 900), max_size=12), st.booleans())
def test_samples_do_not_depend_on_the_pieces(pcm, channels, cuts, wav):
    wave = np.random.default_rng(0).uniform(-0.9, 0.9, (97, channels))
    data = encoded(wave, "WAV" if wav else "RAW", pcm)
    samples = Samples(pieces(data, cuts), None if wav else RATE, pcm=pcm, channels=channels)
    found = np.concatenate(list(samples))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wave.mean(axis=1), atol=2 / 2**8 if pcm == "u8" else 1e-4)
    assert samples.sample_rate == RATE


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF, None])
def test_wav_headers_that_do_not_know_their_size(size):
    wave = np.linspace(-0.5, 0.5, 50)
    data = bytearray(encoded(wave, "WAV", "s16"))
    place = data.index(b"data") + 4
    if size is not None:
        data[place : place + 4] = size.to_bytes(4, "little")
    else:
        data += b"LIST\x04\0\0\0abcd"  # behind the samples is something else
    np.testing.assert_allclose(np.concatenate(list(Samples(iter([bytes(data)])))), wave, atol=1e-4)


def test_a_wav_file_that_is_called_raw():
    """`arecord -f S16_LE -r 16000 | ...` sends a WAV file unless it is told not to; its header is no sound."""
    wave = np.linspace(-0.5, 0.5, 50)
    samples = Samples(iter([encoded(wave, "WAV", "s24")]), RATE, pcm="s16")
    np.testing.assert_allclose(np.concatenate(list(samples)), wave, atol=1e-4)


def test_not_finite_samples_are_silence_and_counted():
    wave = np.array([0.5, np.nan, 0.25, np.inf, -np.inf, 0.125], np.float32)
    samples = Samples(iter([wave.tobytes() + b"\1"]), RATE, pcm="f32")
    assert np.concatenate(list(samples)).tolist() == [0.5, 0, 0.25, 0, 0, 0.125]
    assert samples.bad == 3


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"", {}, "does not begin as a WAV file does"),
        (b"fLaC and more of it", {}, "--sample-rate"),
        (b"RIFF\0\0\0\0WAVEfmt ", {}, "ends before its samples"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", {}, "cannot be read"),
        (
            encoded(np.zeros(5), "WAV", "s16"),
            {"sample_rate": 8000},
            "a WAV file of 16000 Hz, and --sample-rate says 8000",
        ),
        (b"", {"sample_rate": 0}, "raw samples of 0 Hz"),
        (b"", {"sample_rate": RATE, "channels": 0}, "0 channels"),
    ],
)
def test_streams_that_cannot_be(data, options, message):
    with pytest.raises(ValueError, match=message):
        Samples(iter([data] if data else []), **options)


# ---------------------------------------------------------------- the command


@pytest.fixture
def pipe():
    """The end that feeds stdin."""
    kept = os.dup(0)
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    yield writing
    os.dup2(kept, 0)
    os.close(kept)
    with contextlib.suppress(OSError):  # the test has closed it
        os.close(writing)


def fed(descriptor: int, data: bytes, *, then=os.close, chunk: int = 3001):
    def feed():
        for begin in range(0, len(data), chunk):
            os.write(descriptor, data[begin : begin + chunk])
        then(descriptor)

    thread = threading.Thread(target=feed)
    thread.start()
    return thread


@pytest.fixture
def run_with_tones(monkeypatch, tones):
    """The command, whose checkpoint hears tones."""
    monkeypatch.setattr(CATClassifier, "from_pretrained", lambda path, device=None: tones)
    return lambda *arguments: main(["predict", "run", "--stream", "-", *arguments])


def test_a_pipe_of_raw_samples(run_with_tones, sound, pipe, capsys):
    """At 8 kHz, so that it is resampled."""
    wave = soundfile_int16(sound(4.0, ("low", 0.5, 1.5), ("low", 2.5, 4.0), rate=8000))
    thread = fed(pipe, wave)
    assert run_with_tones("--sample-rate", "8000", "--json", "-") == 0
    thread.join()
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert [(row["type"], row["number"]) for row in rows] == [("onset", 1), ("event", 1), ("onset", 2), ("event", 2)]
    assert [row["onset"] for row in rows] == pytest.approx([0.48, 0.48, 2.56, 2.56], abs=0.17)
    assert rows[3]["offset"] == 4.0
    assert "heard 4.00 s" in output.err
    assert "told" in output.err


def soundfile_int16(wave: np.ndarray) -> bytes:
    return (wave * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_is_open(run_with_tones, sound, pipe, capsys, number):
    """The pipe stays open: nothing more comes, and nobody hangs."""

    def interrupt(descriptor):
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    thread = fed(pipe, soundfile_int16(sound(3.0, ("low", 1.0, 9.0))), then=interrupt)
    assert run_with_tones("--sample-rate", "16000") == 128 + number
    thread.join()
    output = capsys.readouterr()
    assert [line.split("  ")[-1] for line in output.out.splitlines()] == ["Low tone begins", "Low tone"]
    assert "3.00 s  0." in output.out
    assert "heard 3.00 s" in output.err


def test_a_reader_that_goes_ends_the_stream(run_with_tones, sound, pipe, monkeypatch):
    """`predict --stream - | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w"))
    data, done = soundfile_int16(sound(60.0, ("low", 1.0, 2.0))), threading.Event()

    def feed():  # without end
        with contextlib.suppress(OSError):
            while not done.is_set():
                os.write(pipe, data)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    assert run_with_tones("--sample-rate", "16000") == 141
    done.set()


def test_a_slow_reader_is_waited_for(run_with_tones, sound, pipe, monkeypatch):
    """And loses nothing: eighty lines, of which the pipe holds the first few dozen."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w"))
    lines = []

    def read():
        time.sleep(0.5)
        with os.fdopen(reading) as file:
            lines.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    scene = [("low", 1 + i * 0.64, 1.32 + i * 0.64) for i in range(40)]
    feeder = fed(pipe, soundfile_int16(sound(28.0, *scene)))
    assert run_with_tones("--sample-rate", "16000", "--json", "-") == 0
    os.close(writing)
    feeder.join()
    reader.join()
    assert [json.loads(line)["type"] for line in lines] == ["onset", "event"] * 40


def test_samples_that_are_not_finite_are_told(run_with_tones, sound, pipe, capsys):
    wave = sound(2.0, ("low", 0.5, 1.5))
    wave[1000:1010] = np.nan
    thread = fed(pipe, wave.astype("<f4").tobytes())
    assert run_with_tones("--sample-rate", "16000", "--pcm", "f32") == 0
    thread.join()
    output = capsys.readouterr()
    assert "10 samples of the stream were NaN or infinite" in output.err
    assert len(output.out.splitlines()) == 2


def test_a_file_as_a_stream(run_with_tones, tones, sound, tmp_path, capsys):
    soundfile.write(tmp_path / "a.flac", sound(5.0, ("high", 1.0, 2.0)), RATE)
    assert main(["predict", "run", "--stream", str(tmp_path / "a.flac")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["predict", "run", "--stream", str(tmp_path / "gone.flac")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["predict", "run", "--stream", "-", "--csv", "x.csv"]) == 1
    assert "leave out the rest" in capsys.readouterr().err
