"""Embeddings of a manifest: rows stay with their clips, failures are recorded, files appear whole."""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.commands import embed as command
from cat.commands import main
from cat.data import Clip, Manifest, load_manifest, open_embeddings, read_audio, write_manifest
from cat.data.features import FeatureConfig
from cat.encoders import CatEncoder, LogMelStatistics, RandomProjection, embed, reading
from cat.model import Encoder, ModelConfig

soundfile = pytest.importorskip("soundfile")


def write_tone(path: Path, hertz: float, seconds: float = 0.4, rate: int = 16000) -> None:
    t = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * t), rate)


@pytest.fixture
def folder(tmp_path):
    """Seven clips of several lengths and rates; clip 2 is no audio, clip 5 is missing, clip 6 is too short."""
    for i, (seconds, rate) in enumerate([(0.4, 16000), (0.7, 8000), (0.4, 16000), (0.5, 44100), (1.0, 16000)]):
        write_tone(tmp_path / f"{i}.wav", 200 * (i + 1), seconds, rate)
    (tmp_path / "2.wav").write_bytes(b"this is not audio")
    write_tone(tmp_path / "6.wav", 100, seconds=0.01)
    clips = tuple(Clip(f"{i}.wav", labels=(f"label{i}",)) for i in range(7))
    write_manifest(Manifest(clips, tmp_path), tmp_path / "clips.jsonl")
    return tmp_path


def arguments(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_rows_belong_to_their_clips_and_failures_are_recorded(folder, capsys):
    out = folder / "out" / "random.npy"
    assert command.run(arguments(folder / "clips.jsonl", "--encoder", "random:5", "-o", out, "--batch-size", 3)) == 0
    said, progress = capsys.readouterr()
    assert "4 embeddings of width 512" in said
    assert "3 of 7 clips left out" in said
    assert "random:5: 7/7 clips" in progress  # without a terminal, too

    written = load_manifest(out.with_suffix(".jsonl"))
    assert [clip.labels for clip in written.clips] == [("label0",), ("label1",), ("label3",), ("label4",)]
    store, encoder = open_embeddings(written), RandomProjection(seed=5)
    assert store.encoder == "random:5"
    for index, clip in enumerate(written.clips):
        alone = encoder(torch.from_numpy(read_audio(written.path(index), 16000))[None])
        np.testing.assert_allclose(store.rows([clip.embedding]), alone.numpy(), atol=1e-5)

    failures = [json.loads(line) for line in (out.parent / "random.failures.jsonl").read_text().splitlines()]
    assert [Path(f["path"]).name for f in failures] == ["2.wav", "5.wav", "6.wav"]
    assert "cannot be read" in failures[0]["reason"]
    assert "no such file" in failures[1]["reason"]
    assert "too short" in failures[2]["reason"]


def test_workers_give_the_same_file(folder):
    manifest = load_manifest(folder / "clips.jsonl")
    for name, workers in (("a.npy", 0), ("b.npy", 2)):
        embed.write_embeddings(manifest, LogMelStatistics(), folder / name, num_workers=workers, batch_size=2)
    assert (folder / "a.npy").read_bytes() == (folder / "b.npy").read_bytes()


def test_when_too_many_clips_fail_what_is_done_is_kept(folder, monkeypatch):
    words = (folder / "clips.jsonl", "--encoder", "logmel", "-o", folder / "x.npy", "--max-failed-share")
    with pytest.raises(
        embed.TooManySkipped, match=r"3 of 7 clips got no embedding, more than the allowed share of 0.1 \(--max-failed"
    ):
        command.run(arguments(*words, 0.1))
    assert sorted(path.name for path in folder.glob("*x.*")) == ["x.failures.jsonl", "x.npy.partial"]
    assert len((folder / "x.failures.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(embed, "encode_clips", None)
    assert command.run(arguments(*words, 0.5)) == 0
    assert not (folder / "x.npy.partial").exists()


def test_embedding_that_is_not_finite_leaves_its_clip_out(folder):
    class Broken(LogMelStatistics):
        def __call__(self, waveform, lengths=None):
            rows = super().__call__(waveform, lengths)
            return torch.where((lengths > 12000)[:, None], torch.nan, rows)

    manifest = load_manifest(folder / "clips.jsonl")
    written, skipped = embed.write_embeddings(manifest, Broken(), folder / "x.npy")
    assert [clip.path for clip in written.clips] == ["0.wav", "1.wav", "3.wav"]
    assert [s.reason for s in skipped if s.index == 4] == ["logmel gave an embedding that is not finite"]


def test_no_clip_at_all(folder):
    manifest = Manifest((Clip("2.wav"), Clip("5.wav")), folder)
    with pytest.raises(ValueError, match=r"no clip of the manifest could be embedded \(2 clips\).*2.wav"):
        embed.collect_embeddings(manifest, LogMelStatistics())


# --- whose files are replaced ----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def embed_logmel(*words: object) -> int:
    return main(["embed", *map(str, words), "--encoder", "logmel", "--quiet"])


def test_the_natural_name_beside_the_manifest(folder, capsys):
    """OUT.jsonl would be the manifest that is read: it stays, with its own fields and with the clips that failed."""
    lines = [json.dumps({"path": f"{i}.wav", "labels": ["a"], "speaker": f"s{i}"}) for i in range(3)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    before = contents(folder)
    for _ in range(2):  # its own files of the first time are replaced
        assert embed_logmel(folder / "train.jsonl", "-o", folder / "train.npy") == 0
        assert f"manifest with their rows: {folder / 'train.embedded.jsonl'}" in capsys.readouterr().out
        after = contents(folder)
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == {
            "train.npy", "train.npy.json", "train.embedded.jsonl", "train.failures.jsonl"
        }  # fmt: skip
        written = load_manifest(folder / "train.embedded.jsonl")
        assert [clip.path for clip in written.clips] == ["0.wav", "1.wav"]
        assert [clip.extra for clip in written.clips] == [{"speaker": "s0"}, {"speaker": "s1"}]
    assert open_embeddings(load_manifest(folder / "train.embedded.jsonl")) is not None
    # The new manifest may be embedded in turn, but not over the embeddings that it names.
    assert embed_logmel(folder / "train.embedded.jsonl", "-o", folder / "train.npy") == 1
    assert "train.npy would be written over" in capsys.readouterr().err
    assert contents(folder) == after


@pytest.mark.parametrize("name", ["x.npy", "x.npy.json", "x.jsonl", "x.failures.jsonl"])
@pytest.mark.parametrize("content", [b'{"path": "0.wav"}\n', b"years of work"])
def test_a_file_that_embed_did_not_write_is_left_alone(folder, capsys, name, content):
    (folder / name).write_bytes(content)
    before = contents(folder)
    command = (folder / "clips.jsonl", "-o", folder / "x.npy")
    assert embed_logmel(*command) == 1
    assert f"{folder / name} exists" in (said := capsys.readouterr().err)
    assert "another -o" in said
    assert "--overwrite" in said
    assert contents(folder) == before
    assert embed_logmel(*command, "--overwrite") == 0
    assert open_embeddings(load_manifest(folder / "x.jsonl")).dim == 256
    assert embed_logmel(*command) == 0  # all of it is now its own


@pytest.mark.parametrize("name", ["x.jsonl", "x.npy"])
def test_what_was_changed_by_hand_is_the_users(folder, capsys, name):
    command = (folder / "clips.jsonl", "-o", folder / "x.npy")
    assert embed_logmel(*command) == 0
    if name == "x.npy":
        np.save(folder / name, np.load(folder / name) / 2)
    else:
        with open(folder / name, "a") as file:
            file.write("\n")
    before = contents(folder)
    assert embed_logmel(*command) == 1
    assert f"{name} exists, and is not, or no longer," in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["clips.jsonl", "link.jsonl", "sub/../clips.jsonl"])
def test_manifest_out_is_never_the_input(folder, capsys, name):
    (folder / "sub").mkdir()
    (folder / "link.jsonl").symlink_to("clips.jsonl")
    before = contents(folder)
    words = ("-o", folder / "x.npy", "--manifest-out", folder / name, "--overwrite")
    assert embed_logmel(folder / "clips.jsonl", *words) == 1
    assert "which this command reads; that is never done" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_released_list_of_one_embedding_a_clip(folder, capsys):
    np.save(folder / "0.npy", np.zeros(4, dtype=np.float32))
    (folder / "list.json").write_text('[{"wav_path": "0.wav", "num_frame": 1, "clap_path": "0.npy"}]')
    before = contents(folder)
    assert embed_logmel(folder / "list.json", "-o", folder / "0.npy", "--overwrite") == 1
    assert "0.npy, which this command reads; that is never done" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "x.bin"), "embeddings are written as .npy"),
        (("-o", "x.npy", "--manifest-out", "0.wav"), "a manifest is written as .jsonl"),
        (("-o", "x.npy", "--manifest-out", "x.failures.jsonl"), "written twice"),
        (("-o", "x.npy", "--batch-size", "0"), "batch_size is 0; expected at least 1"),
        (("-o", "x.npy", "--max-failed-share", "1.5"), "expected a share from 0 to 1"),
    ],
)
def test_bad_requests_leave_nothing(folder, capsys, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert embed_logmel("clips.jsonl", *words) == 1
    assert message in capsys.readouterr().err
    assert contents(folder) == before


# --- long clips, encoders that fail, signals -------------------------------------------------------------------------


def sparse_wav(path: Path, hours: float, rate: int = 8000) -> None:
    """Silence that takes no room on the disk."""
    size = int(hours * 3600 * rate) * 2
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", size
    )
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def test_a_long_file_takes_no_more_memory_than_a_batch_may(tmp_path):
    """And the clips beside it get the embeddings that they have without it."""
    for i in range(5):
        write_tone(tmp_path / f"{i}.wav", 300 * (i + 1))
    alone = collect(tmp_path)
    sparse_wav(tmp_path / "2-long.wav", hours=0.4)
    sizes = []

    class Watched(RandomProjection):
        def __call__(self, waveform, lengths=None):
            sizes.append(waveform.numel())
            return super().__call__(waveform, lengths)

    beside = collect(tmp_path, Watched())
    assert max(sizes) <= reading.WINDOW_SECONDS * 16000
    assert sum(sizes) > 0.4 * 3600 * 16000  # all of it
    np.testing.assert_allclose(np.delete(beside, 2, axis=0), alone, atol=1e-6)  # rounding: sums over other widths


def collect(folder: Path, encoder: RandomProjection | None = None) -> np.ndarray:
    return embed.collect_embeddings(load_manifest(folder), encoder or RandomProjection()).rows


def noise_wav(path: Path, seconds: float = 9.3) -> np.ndarray:
    """Noise that becomes louder."""
    wave = np.linspace(0.01, 0.3, int(seconds * 16000)) * np.random.default_rng(0).standard_normal(int(seconds * 16000))
    soundfile.write(path, wave.clip(-1, 1), 16000, "FLOAT")
    return wave


class Level:
    """An encoder without `combine`: the mean square of what it is given."""

    name, sample_rate, dim = "level", 16000, 1

    def __call__(self, waveform, lengths=None):
        return torch.stack([row[:n].square().mean() for row, n in zip(waveform, lengths, strict=True)])[:, None]


def test_a_long_clip_in_windows_has_the_embedding_of_the_whole(tmp_path, monkeypatch):
    noise_wav(tmp_path / "a.wav")
    manifest = load_manifest(tmp_path)
    encoders = (LogMelStatistics(), RandomProjection(), Level())
    whole = [embed.collect_embeddings(manifest, encoder).rows for encoder in encoders]
    monkeypatch.setattr(reading, "WINDOW_SECONDS", 2)
    windows = [embed.collect_embeddings(manifest, encoder).rows for encoder in encoders]
    # But for the frames across the windows' edges; a projection of unit length has another mean than its windows'.
    np.testing.assert_allclose(windows[0], whole[0], atol=0.02)
    assert np.linalg.norm(windows[1]) == pytest.approx(1)
    assert windows[1][0] @ whole[1][0] > 0.99
    np.testing.assert_allclose(windows[2], whole[2], rtol=1e-5)


def test_a_long_clip_that_is_bad_behind_its_first_window_is_skipped(tmp_path, monkeypatch):
    wave = noise_wav(tmp_path / "0.wav")
    wave[-1] = np.nan
    soundfile.write(tmp_path / "1.wav", wave, 16000, "FLOAT")
    noise_wav(tmp_path / "2.wav", seconds=1)
    monkeypatch.setattr(reading, "WINDOW_SECONDS", 2)
    found = embed.collect_embeddings(load_manifest(tmp_path), RandomProjection())
    assert found.indices.tolist() == [0, 2]
    assert [(s.index, s.reason) for s in found.skipped] == [(1, "1 of 29760 samples are NaN or infinite")]


def test_batches_are_made_smaller_by_what_they_hold():
    clips = [(i, torch.zeros(n), f"stamp {i}") for i, n in enumerate([10, 10, 60, 10, 10, 10, 10])]
    clips.insert(4, (99, reading.Skipped(99, "x", "missing"), "stamp 99"))
    clips.insert(7, (98, reading.Long(), "stamp 98"))
    batches = list(reading.collected(clips, batch_size=6, most_samples=100))
    assert [batch.indices for batch in batches] == [[0, 1], [2], [3, 4], [5], [98], [6]]
    assert [len(batch.waves) for batch in batches] == [2, 1, 2, 1, 0, 1]
    assert [len(batch.skipped) for batch in batches] == [0, 0, 1, 0, 0, 0]
    assert [each for batch in batches for each in batch.stamps] == [stamp for _, _, stamp in clips]


def test_a_batch_holds_no_more_than_it_may(folder, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_SECONDS", 1)
    batches = embed.embed_manifest(load_manifest(folder / "clips.jsonl"), LogMelStatistics())
    assert [len(rows) for _, rows, _ in batches] == [1, 1, 1, 1]


def test_a_checkpoint_hears_all_of_a_long_clip(tmp_path, monkeypatch):
    """In one piece or as a stream: what its `CATEncoder` says of the whole."""
    wave = noise_wav(tmp_path / "a.wav")
    torch.manual_seed(0)
    model = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
    encoder = CatEncoder(Encoder(model), FeatureConfig(frames=64))
    expected = encoder.model(soundfile.read(tmp_path / "a.wav", dtype="float32")[0], 16000).clip.numpy()
    whole = embed.collect_embeddings(load_manifest(tmp_path), encoder).rows
    monkeypatch.setattr(reading, "WINDOW_SECONDS", 2)
    assert len(wave) > 2 * 16000
    pieces = embed.collect_embeddings(load_manifest(tmp_path), encoder).rows
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    np.testing.assert_allclose(pieces, expected, atol=1e-6)


def test_an_encoder_that_fails_names_its_clips(folder):
    class Broken(LogMelStatistics):
        def __call__(self, waveform, lengths=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    manifest = load_manifest(folder / "clips.jsonl")
    with pytest.raises(
        embed.EncoderError, match=r"logmel failed on a batch of 2 clips of up to 0.7 s: CUDA out of"
    ) as e:
        embed.write_embeddings(manifest, Broken(), folder / "x.npy", batch_size=2)
    assert str(folder / "0.wav") in str(e.value)
    assert str(folder / "1.wav") in str(e.value)
    assert not list(folder.glob("*x.*"))


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_by_a_signal_it_leaves_nothing(folder, monkeypatch, capsys, number, code, words, workers):
    monkeypatch.setattr(LogMelStatistics, "__call__", lambda *arguments: os.kill(os.getpid(), number) or time.sleep(60))
    before, handler = contents(folder), signal.getsignal(number)
    assert embed_logmel(folder / "clips.jsonl", "-o", folder / "x.npy", "--num-workers", workers) == code
    assert f"cat-audio: {words}\n" in capsys.readouterr().err
    assert contents(folder) == before
    assert signal.getsignal(number) == handler


def test_what_a_killed_one_left_goes_with_the_next(folder):
    code = (
        "import os, sys, cat.encoders.embed as embed\n"
        "from cat.data import load_manifest\n"
        "from cat.encoders import LogMelStatistics\n"
        "embed.encode_clips = lambda *_: os._exit(9)\n"
        "embed.write_embeddings(load_manifest(sys.argv[1]), LogMelStatistics(), embed.Path(sys.argv[2]))\n"
    )
    words = [sys.executable, "-c", code, str(folder / "clips.jsonl"), str(folder / "out" / "x.npy")]
    assert subprocess.run(words, check=False).returncode == 9
    assert len(list((folder / "out").iterdir())) == 1
    assert embed_logmel(folder / "clips.jsonl", "-o", folder / "out" / "x.npy") == 0
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


def test_notes_of_the_manifest_are_told(folder, monkeypatch, capsys):
    manifest = load_manifest(folder / "clips.jsonl")
    object.__setattr__(manifest, "notes", ("secret: no permission to look into it",))
    monkeypatch.setattr(command, "load_manifest", lambda path: manifest)
    assert embed_logmel("anything", "-o", folder / "x.npy") == 0
    assert capsys.readouterr().err == "secret: no permission to look into it\n"
