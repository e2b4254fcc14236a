"""Embeddings of a manifest: rows stay with their clips, failures are recorded, files appear whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.commands import embed as command
from cat.data import Clip, Manifest, load_manifest, open_embeddings, read_audio, write_manifest
from cat.encoders import LogMelStatistics, RandomProjection, embed

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
    said = capsys.readouterr().out
    assert "4 embeddings of width 512" in said
    assert "3 of 7 clips left out" in said

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


def test_nothing_is_written_when_too_many_clips_fail(folder):
    with pytest.raises(
        embed.TooManySkipped, match=r"3 of 7 clips got no embedding, more than the allowed share of 0.1"
    ):
        command.run(
            arguments(folder / "clips.jsonl", "--encoder", "logmel", "-o", folder / "x.npy", "--max-failed-share", 0.1)
        )
    assert not list(folder.glob("*x.npy*"))
    assert not (folder / "x.jsonl").exists()
    assert len((folder / "x.failures.jsonl").read_text().splitlines()) == 3


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
