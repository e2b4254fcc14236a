"""Data sets written as shards: what is in them, and what becomes of a writer that is stopped."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from cat.data import load_manifest
from cat.data.audio import read_audio
from cat.data.manifest import Clip, Manifest, write_manifest
from cat.data.shards.writing import write_shards
from cat.outputs import OutputError

soundfile = pytest.importorskip("soundfile")

RATE = 16000


def write(path, samples=4000, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)
    soundfile.write(path, wave, RATE, **options)


@pytest.fixture
def files(tmp_path):
    """A manifest of seven clips of three formats, one of them damaged, with labels and fields of the user's."""
    clips = []
    for number in range(7):
        suffix = ("wav", "flac", "mp3")[number % 3]
        write(tmp_path / "audio" / f"{'ab'[number % 2]}.{number}.{suffix}", 4000 + 100 * number, number)
        labels = ("bell", "dog")[: number % 3]
        path = f"audio/{'ab'[number % 2]}.{number}.{suffix}"
        clips.append(Clip(path, labels=labels, extra={"fold": number % 2}, negative=number == 3))
    (tmp_path / "audio" / "a.4.flac").unlink()
    (tmp_path / "audio" / "a.4.flac").write_bytes(b"no audio")
    write_manifest(
        Manifest(clips, tmp_path, label_names={"dog": "Dog"}, extra={"licence": "CC0"}), tmp_path / "m.jsonl"
    )
    return load_manifest(tmp_path / "m.jsonl")


def test_shards_hold_what_the_manifest_says(files, tmp_path):
    written = write_shards(files, tmp_path / "shards", shard_bytes=20_000)
    assert written.shards > 2
    [failure] = written.failures
    assert failure[0].endswith("a.4.flac")
    assert "Format not recognised" in failure[1]
    found = load_manifest(tmp_path / "shards")
    kept = files.take(np.array([0, 1, 2, 3, 5, 6]))
    assert [clip.path for clip in found.clips] == [clip.path for clip in kept.clips]
    assert [clip.labels for clip in found.clips] == [clip.labels for clip in kept.clips]
    assert [clip.extra for clip in found.clips] == [clip.extra for clip in kept.clips]
    assert [clip.negative for clip in found.clips] == [clip.negative for clip in kept.clips]
    assert found.fingerprint == kept.fingerprint
    assert (found.label_names, found.extra) == ({"dog": "Dog"}, {"licence": "CC0"})
    assert found.clips[0].samples == 4000
    assert found.clips[0].sample_rate == RATE
    for index in range(len(found)):
        for crop in ({}, {"max_samples": 1000, "start": 0.7, "allow_int16": True}):
            there, here = read_audio(found.audio(index), RATE, **crop), read_audio(kept.audio(index), RATE, **crop)
            assert there.dtype == here.dtype
            np.testing.assert_array_equal(there, here)


def test_shards_are_plain_tar_files_of_the_webdataset_format(files, tmp_path):
    write_shards(files, tmp_path / "shards", shard_bytes=20_000)
    with tarfile.open(tmp_path / "shards" / "000000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["000000000.wav", "000000000.json"]
        assert tar.extractfile(names[0]).read() == files.path(0).read_bytes()
        assert json.loads(tar.extractfile("000000001.json").read()) == {
            "path": "audio/b.1.flac",
            "samples": 4100,
            "sample_rate": RATE,
            "labels": ["bell"],
            "fold": 1,
        }


def test_the_same_bytes_whatever_the_number_of_processes(files, tmp_path):
    write_shards(files, tmp_path / "one", shard_bytes=20_000)
    write_shards(files, tmp_path / "two", shard_bytes=20_000, jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_writer_that_was_stopped_goes_on_and_writes_nothing_twice(files, tmp_path, monkeypatch):
    write_shards(files, tmp_path / "whole", shard_bytes=20_000)
    import cat.data.shards.writing as writing

    read, calls = writing._read, []

    def failing(audio):
        calls.append(audio)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return read(audio)

    monkeypatch.setattr(writing, "_read", failing)
    with pytest.raises(OSError, match="No space left"):
        write_shards(files, tmp_path / "shards", shard_bytes=20_000)
    with pytest.raises(Exception, match="no clips in it, but tar files, which need an index"):
        load_manifest(tmp_path / "shards")
    with pytest.raises(OutputError, match="holds what another command had written when it was stopped"):
        write_shards(files, tmp_path / "shards", shard_bytes=30_000)
    first = (tmp_path / "shards" / "000000.tar").stat().st_mtime_ns
    write_shards(files, tmp_path / "shards", shard_bytes=20_000)
    assert (tmp_path / "shards" / "000000.tar").stat().st_mtime_ns == first
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")
    again = (tmp_path / "shards" / "shards.index").stat().st_mtime_ns
    assert len(write_shards(files, tmp_path / "shards", shard_bytes=20_000).failures) == 1
    assert (tmp_path / "shards" / "shards.index").stat().st_mtime_ns == again


def test_nothing_is_written_over(files, tmp_path):
    write_shards(files, tmp_path / "shards", shard_bytes=20_000)
    before = contents(tmp_path / "shards")
    with pytest.raises(OutputError, match="holds shards of other clips, of files that have changed since"):
        write_shards(files.take(np.arange(3)), tmp_path / "shards", shard_bytes=20_000)
    with pytest.raises(OutputError, match="another size"):
        write_shards(files, tmp_path / "shards", shard_bytes=30_000)
    assert contents(tmp_path / "shards") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "000000.tar").write_bytes(b"mine")
    with pytest.raises(OutputError, match="nothing says what it is of"):
        write_shards(files, tmp_path / "other")
    assert (tmp_path / "other" / "000000.tar").read_bytes() == b"mine"


def test_not_one_clip_that_can_be_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one of its 1 clips can be read; the first: .*a.wav: empty: 0 bytes"):
        write_shards(Manifest([Clip("a.wav")], tmp_path), tmp_path / "shards")


def test_a_manifest_of_some_of_the_clips(files, tmp_path):
    sharded = write_shards(files, tmp_path / "shards", shard_bytes=20_000).manifest
    some = sharded.take(np.array([4, 1]))
    (tmp_path / "lists").mkdir()
    write_manifest(some, tmp_path / "lists" / "some.jsonl")
    assert json.loads((tmp_path / "lists" / "some.jsonl").read_text().splitlines()[0])["shards"] == "../shards"
    read = load_manifest(tmp_path / "lists" / "some.jsonl")
    assert list(read.clips) == list(some.clips)
    assert read.fingerprint == some.fingerprint
    for index in range(2):
        np.testing.assert_array_equal(read_audio(read.audio(index), RATE), read_audio(some.audio(index), RATE))
    (tmp_path / "lists" / "some.jsonl").write_text(
        '{"format": "cat-audio manifest", "version": 1, "shards": "../shards"}\n{"path": "x.wav"}\n'
    )
    with pytest.raises(ValueError, match=r"x.wav is not in the shards of"):
        load_manifest(tmp_path / "lists" / "some.jsonl")


KILLED = """
import os, sys
import cat.data.shards.writing as writing
from cat.data import load_manifest

read, calls = writing._read, []

def killed(audio):
    calls.append(audio)
    if len(calls) == 5:
        os.kill(os.getpid(), 9)
    return read(audio)

writing._read = killed
writing.write_shards(load_manifest(sys.argv[1]), sys.argv[2], shard_bytes=20_000)
"""


def test_a_killed_writer_leaves_nothing_half_written(files, tmp_path):
    write_shards(files, tmp_path / "whole", shard_bytes=20_000)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "m.jsonl", tmp_path / "shards"], check=False)
    assert done.returncode == -9
    there = {path.name for path in (tmp_path / "shards").glob("*.tar")}
    assert there
    for name in there:
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    write_shards(files, tmp_path / "shards", shard_bytes=20_000)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")
