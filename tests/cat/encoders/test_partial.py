"""`cat-audio embed` that was stopped goes on, bit for bit, with what is sound of what it had done; several processes
give what one gives."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.commands import main
from cat.data import Clip, Manifest, load_manifest, write_manifest
from cat.data.features import FeatureConfig
from cat.data.partial import digest_of_job
from cat.encoders import CatEncoder, LogMelStatistics, RandomProjection, embed, partial, reading
from cat.encoders.jobs import EncoderError, pick_jobs
from cat.locks import InUseError, sole_user
from cat.model import Encoder, ModelConfig
from cat.outputs import OutputError

soundfile = pytest.importorskip("soundfile")
CLIPS = 9  # two a batch: the last one is alone


@pytest.fixture
def folder(tmp_path) -> Path:
    """Clips of several lengths; clip 3 is no audio."""
    noise = np.random.default_rng(0)
    for i in range(CLIPS):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * noise.standard_normal(3200 + 500 * i), 16000)
    (tmp_path / "3.wav").write_bytes(b"this is not audio")
    write_manifest(Manifest(tuple(Clip(f"{i}.wav") for i in range(CLIPS)), tmp_path), tmp_path / "clips.jsonl")
    return tmp_path


def run(folder: Path, *words: object, name: str = "x") -> int:
    """One block a batch of two."""
    standard = ["--encoder", "random:5", "--batch-size", "2", "--jobs", "1", "--quiet"]
    out = folder / name / "clap.npy"
    return main(["embed", str(folder / "clips.jsonl"), "-o", str(out), *standard, *map(str, words)])


def written(folder: Path, name: str = "x") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / name).iterdir()) if path.is_file()}


def undisturbed(folder: Path) -> dict[str, bytes]:
    """What the command writes when nothing happens. (In a folder of that name too: the manifest's paths.)"""
    assert run(folder, name="y") == 0
    return written(folder, "y")


@pytest.fixture
def encoded(monkeypatch) -> list[list[int]]:
    """The clips that go through an encoder in this process, batch by batch."""
    found: list[list[int]] = []
    before = embed.encode_clips

    def encode(encoder, manifest, indices, waves):
        found.append(list(indices))
        return before(encoder, manifest, indices, waves)

    monkeypatch.setattr(embed, "encode_clips", encode)
    monkeypatch.setattr(embed, "SECONDS", 0)
    return found


def stop_at(monkeypatch, batch: int, act) -> None:
    """In the place of a batch (the first is 1) something else happens."""
    before, calls = embed.encode_clips, itertools.count(1)
    monkeypatch.setattr(embed, "encode_clips", lambda *a: act() if next(calls) == batch else before(*a))


def blocks(folder: Path) -> list[Path]:
    return sorted((folder / "x" / "clap.npy.partial").glob("*.block"))


@pytest.fixture
def stopped(folder, encoded, monkeypatch) -> Path:
    """Two blocks are done; the third batch failed."""

    def fail():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_at(patch, 3, fail)
        assert run(folder) == 130
    assert [path.name for path in blocks(folder)] == ["000000000000.block", "000000000002.block"]
    encoded.clear()
    return folder


# ---------------------------------------------------------------------------------------------------------- goes on

KILLED = """
import itertools, os, sys
from cat.commands import main
from cat.encoders import embed
embed.SECONDS = 0
encode, calls = embed.encode_clips, itertools.count(1)
embed.encode_clips = lambda *a: os.kill(os.getpid(), 9) if next(calls) == 3 else encode(*a)
main(sys.argv[1:])
"""


def test_killed_it_goes_on_and_writes_the_same_files(folder, encoded, capsys):
    words = ["embed", folder / "clips.jsonl", "-o", folder / "x" / "clap.npy", "--encoder", "random:5"]
    killed = [sys.executable, "-c", KILLED, *map(str, words), "--batch-size", "2", "--jobs", "1"]
    assert subprocess.run(killed, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert written(folder) == {}  # nothing that could be taken for the embeddings
    assert run(folder) == 0
    assert encoded == [[4, 5], [6, 7], [8]]
    assert not (folder / "x" / "clap.npy.partial").exists()
    assert written(folder) == undisturbed(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_it_keeps_all_that_is_done(folder, encoded, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        patch.setattr(embed, "SECONDS", 3600)  # no block is due
        stop_at(patch, 4, lambda: os.kill(os.getpid(), number))
        assert run(folder) == 128 + number
    assert f"6 of {CLIPS} clips are done, in {folder / 'x' / 'clap.npy.partial'}; the same" in capsys.readouterr().err
    encoded.clear()
    assert run(folder) == 0
    assert encoded == [[6, 7], [8]]
    assert written(folder) == undisturbed(folder)


@pytest.mark.parametrize("of", ["a block", "the array"])
def test_a_full_disk(folder, encoded, monkeypatch, capsys, of):
    from cat.data import partial as pieces
    from cat.data.embeddings import writing
    from cat.files import replacing

    def full(path):
        if Path(path).suffix != (".block" if of == "a block" else ".npy") or len(blocks(folder)) < 2:
            return replacing(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        for module in (pieces, writing):
            patch.setattr(module, "replacing", full)
        assert run(folder) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert written(folder) == {}
    encoded.clear()
    assert run(folder) == 0
    assert encoded == ([[4, 5], [6, 7], [8]] if of == "a block" else [])
    assert written(folder) == undisturbed(folder)


def test_stopped_between_the_files_it_writes(folder, encoded, monkeypatch):
    """The array has its name, the manifest has not."""
    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_manifest", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(folder) == 130
    encoded.clear()
    assert run(folder) == 0
    assert encoded == []
    assert written(folder) == undisturbed(folder)


def test_an_encoder_that_fails_does_not_cost_what_is_done(folder, encoded, monkeypatch, capsys):
    def fail():
        raise EncoderError("out of memory")

    with monkeypatch.context() as patch:
        stop_at(patch, 2, fail)
        assert run(folder) == 1
    encoded.clear()
    assert run(folder) == 0
    assert encoded[0] == [2]


# ------------------------------------------------------------------------------------------------- what is not sound


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "job.json"])
def test_damaged_blocks_are_embedded_again(stopped, encoded, capsys, damage):
    path = blocks(stopped)[0] if damage != "job.json" else blocks(stopped)[0].with_name("job.json")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"a bit": bytes(content), "cut": bytes(content[:-4]), "empty": b"", "job.json": b"\0" * 9}[damage])
    assert run(stopped) == 0
    if damage == "job.json":
        assert "job.json is damaged, nobody knows what blocks are of" in capsys.readouterr().err
        assert encoded == [[0, 1], [2], [4, 5], [6, 7], [8]]
    else:
        told = capsys.readouterr().err
        assert "1 damaged blocks in" in told
        assert "first: 000000000000.block: its SHA-256 is not" in told
        assert encoded == [[0, 1], [4, 5], [6, 7], [8]]
    assert written(stopped) == undisturbed(stopped)


def test_a_block_that_is_damaged_while_it_is_needed(stopped, monkeypatch, capsys):
    """Nothing is written with it, and the next call mends it."""
    rest = embed._embed_rest

    def then_damage(*arguments):
        rest(*arguments)
        blocks(stopped)[1].write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(embed, "_embed_rest", then_damage)
        assert run(stopped) == 1
    assert "000000000002.block: its SHA-256 is not the one that it begins with; the same command" in (
        capsys.readouterr().err
    )
    assert written(stopped).keys() == set()
    assert run(stopped) == 0
    assert written(stopped) == undisturbed(stopped)


@pytest.mark.parametrize("change", ["louder", "missing", "mended"])
def test_clips_that_have_changed_are_embedded_again(stopped, encoded, capsys, change):
    if change == "missing":
        (stopped / "1.wav").unlink()
    else:
        soundfile.write(stopped / ("1.wav" if change == "louder" else "3.wav"), np.full(3700, 0.2), 16000)
    assert run(stopped) == 0
    assert "1 blocks in" in capsys.readouterr().err
    first = {"louder": [0, 1], "missing": [0], "mended": [2, 3]}[change]
    assert encoded == [first, [4, 5], [6, 7], [8]]
    assert written(stopped) == undisturbed(stopped)


def other_clips(folder: Path, order: list[int]) -> None:
    write_manifest(Manifest(tuple(Clip(f"{i}.wav") for i in order), folder), folder / "clips.jsonl")


OTHERS = {
    "encoder": (["--encoder", "logmel"], r"the encoder was random:5 \(\w{12}\), now logmel \(\w{12}\)"),
    "its seed": (["--encoder", "random:6"], r"the encoder was random:5 \(\w{12}\), now random:6"),
    "batch": (["--batch-size", "4"], "batch_size was 2, now 4"),
    "more clips": ([*range(CLIPS), 0], "the data set had 9 clips, now 10"),
    "order": ([1, 0, *range(2, CLIPS)], "the data set had 9 clips, now 9, other ones or in another order"),
    "version": ("__version__", r"versions.cat-kernels was \S+, now 9.9"),
    "windows": ("WINDOW_SECONDS", "seconds_at_once.of_a_clip was 300, now 2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_job_is_refused_with_the_reason(stopped, encoded, monkeypatch, capsys, other):
    change, reason = OTHERS[other]
    words = change if isinstance(change, list) and isinstance(change[0], str) else []
    if isinstance(change, str):
        module = embed if change == "__version__" else reading
        monkeypatch.setattr(module, change, "9.9" if change == "__version__" else 2)
    elif not words:
        other_clips(stopped, change)
    before = [path.read_bytes() for path in blocks(stopped)]
    assert run(stopped, *words) == 1
    told = capsys.readouterr().err
    assert re.search(reason, told)
    assert "--overwrite (or delete it) to begin afresh, or another -o" in told
    assert encoded == []
    assert [path.read_bytes() for path in blocks(stopped)] == before
    assert run(stopped, *words, "--overwrite") == 0
    assert encoded[0][0] in (0, 1)
    assert run(stopped, *words, name="y") == 0
    assert written(stopped) == written(stopped, "y")


def test_other_weights_under_the_same_name_are_refused(folder, encoded, monkeypatch, capsys):
    encoder = tiny(0)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed.write_embeddings(
                load_manifest(folder / "clips.jsonl"), encoder, folder / "x.npy", batch_size=2, jobs=1
            )
    with torch.no_grad():
        encoder.encoder.blocks[0].fc1.bias[0] += 1
    with pytest.raises(OutputError, match=r"was cat \(\w+\), now cat \(\w+\), with other weights or settings"):
        embed.write_embeddings(load_manifest(folder / "clips.jsonl"), encoder, folder / "x.npy", batch_size=2, jobs=1)


def test_blocks_of_another_job_are_not_mixed_in(stopped, encoded):
    """Somebody puts them there."""
    kept = stopped / "kept"
    shutil.copytree(blocks(stopped)[0].parent, kept)
    assert run(stopped) == 0
    expected = written(stopped)
    shutil.rmtree(stopped / "x")
    assert run(stopped, "--encoder", "random:6", name="z") == 0
    (stopped / "x").mkdir()
    shutil.copytree(kept, stopped / "x" / "clap.npy.partial")
    job = json.loads((kept / "job.json").read_text())
    _, _, content = blocks(stopped)[1].read_bytes().partition(b"\n")
    content = content.replace(digest_of_job(job, ("encoder",)).encode(), b"0" * 64)
    blocks(stopped)[1].write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    encoded.clear()
    assert run(stopped) == 0
    assert encoded == [[2], [4, 5], [6, 7], [8]]
    assert written(stopped) == expected


@pytest.mark.parametrize("name", ["notes.txt", "job.json"])
def test_a_folder_of_the_users_is_left_alone(folder, capsys, name):
    (folder / "x" / "clap.npy.partial").mkdir(parents=True)
    (folder / "x" / "clap.npy.partial" / name).write_text('{"mine": 1}')
    assert run(folder) == 1
    assert "is not what an embed left; it is left alone" in capsys.readouterr().err
    assert [path.name for path in (folder / "x" / "clap.npy.partial").iterdir()] == [name]


def test_a_second_process_is_refused(stopped, encoded, capsys):
    before = [path.read_bytes() for path in blocks(stopped)]
    busy, done = threading.Event(), threading.Event()

    def first() -> None:
        with sole_user(stopped / "x" / "clap.npy.partial", remedy=""):
            busy.set()
            done.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        busy.wait(30)
        with pytest.raises(InUseError, match="another embed writes the same file: wait for it, or give another -o"):
            embed.write_embeddings(load_manifest(stopped / "clips.jsonl"), LogMelStatistics(), stopped / "x/clap.npy")
    finally:
        done.set()
        thread.join()
    assert encoded == []
    assert [path.read_bytes() for path in blocks(stopped)] == before


# ------------------------------------------------------------------------------------------------- several processes


def tiny(seed: int = 0) -> CatEncoder:
    torch.manual_seed(seed)
    model = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
    return CatEncoder(Encoder(model), FeatureConfig(frames=64))


def test_any_number_of_processes_gives_the_same_files(folder, monkeypatch):
    monkeypatch.setattr(embed, "SECONDS", 0)
    manifest, encoder = load_manifest(folder / "clips.jsonl"), tiny()
    encode, files = embed.encode_clips, {}

    def alone(*arguments):
        assert torch.get_num_threads() == 1
        return encode(*arguments)

    monkeypatch.setattr(embed, "encode_clips", alone)
    for jobs, workers, threads in ((1, 0, 2), (1, 1, 1), (2, 1, 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # is not what it depends on
        out = folder / f"{jobs}{workers}" / "a.npy"
        try:
            embed.write_embeddings(manifest, encoder, out, batch_size=2, jobs=jobs, num_workers=workers)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        files[jobs, workers] = written(folder, f"{jobs}{workers}")
    assert len(files[1, 0]) == 4
    assert files[1, 0] == files[1, 1] == files[2, 1]


def test_stopped_in_several_processes_it_goes_on_in_one(folder, encoded, monkeypatch):
    add, calls = partial.Partial.add, itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            partial.Partial, "add", lambda *a: (add(*a), os.kill(os.getpid(), 2) if next(calls) == 2 else None)
        )
        assert run(folder, "--jobs", "2") == 130
    assert len(blocks(folder)) >= 2
    done = len(blocks(folder))
    assert run(folder) == 0
    assert len(encoded) == 5 - done
    assert written(folder) == undisturbed(folder)


def test_an_encoder_that_fails_in_another_process_names_its_clips(folder, monkeypatch, capsys):
    def fail(encoder, waveform, lengths=None):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(RandomProjection, "__call__", fail)
    assert run(folder, "--jobs", "2") == 1
    told = capsys.readouterr().err
    assert "random:5 failed on a batch of 2 clips" in told
    assert str(folder / "1.wav") in told
    assert "Traceback" not in told


class Mine(LogMelStatistics):
    """An encoder of the user's."""


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr("cat.encoders.jobs.cores", lambda: 4)
    assert pick_jobs(None, tiny()) == 4
    assert pick_jobs(None, Mine()) == 1
    assert pick_jobs(3, Mine()) == 3
    monkeypatch.setattr("cat.encoders.jobs.cores", lambda: 96)
    assert pick_jobs(None, tiny()) == 8
    on_gpu, threaded = tiny(), LogMelStatistics()
    on_gpu.device, threaded.threads = torch.device("cuda"), 4
    assert pick_jobs(None, on_gpu) == pick_jobs(None, threaded) == 1
    with pytest.raises(ValueError, match=r"2 jobs on cuda; expected 1: .*--num-workers"):
        pick_jobs(2, on_gpu)
    with pytest.raises(ValueError, match="was made with 4 threads of its own"):
        pick_jobs(2, threaded)
    with pytest.raises(ValueError, match="0 jobs; expected at least 1"):
        pick_jobs(0, tiny())


def test_progress_and_memory_are_told(folder, capsys):
    assert main(["embed", str(folder / "clips.jsonl"), "-o", str(folder / "a.npy"), "--encoder", "logmel"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"logmel: 9/9 clips, \S+ clips/s, 0:00 left", err)
    assert "peak memory: " in out
