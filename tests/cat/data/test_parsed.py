"""Manifests that were read before: what is kept is what was read, and never out of date."""

import dataclasses
import fcntl
import functools
import json
import multiprocessing
import os
import pickle
import time

import pytest

from cat.data import manifest, parsed
from cat.data.manifest import ManifestError, load_manifest

JSONL = (
    '{"format": "cat-audio manifest", "version": 1, "embeddings": "e.npy", "label_names": {"a": "A"}, "owner": [1]}\n'
    '{"path": "caf\\udce9.wav", "samples": 3, "sample_rate": 8000, "labels": ["a", "b"], "embedding": 1, "fold": 2}\n'
    '{"path": "/abs/b.wav", "labels": [], "events": [{"onset": 0.5, "offset": 1.5, "label": "b"}]}\n'
)


READ = manifest._read_jsonl


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists"
    (folder / "audio").mkdir(parents=True)
    (folder / "l.jsonl").write_text(JSONL)
    (folder / "l.tsv").write_text("audio\na.wav\t3\nb.wav\t4\n")
    (folder / "l.lbl").write_text("a x,y\nb y\n")
    (folder / "label_descriptors.csv").write_text('index,label,name\n0,x,"X, the first"\n1,y,Y\n')
    clips = [{"wav_path": f"audio/{n}.wav", "num_frame": 7, "clap_path": f"{n}.npy", "path": 1} for n in "ab"]
    (folder / "released.json").write_text(json.dumps(clips))
    return folder


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The cache folder, which all manifests go through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parsed, "LARGE", 0)
    return tmp_path / "cache" / "cat-audio" / "manifests"


def content(of):
    found = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return {
        **found,
        "clips": [(clip, clip.extra, clip.negative) for clip in of.clips],
        "embedding_files": of.embedding_files and list(of.embedding_files),
        "fingerprint": of.fingerprint,
    }


@pytest.mark.parametrize("name", ["l.jsonl", "l.tsv", "released.json"])
@pytest.mark.parametrize("relative", [False, True])
def test_what_is_kept_is_what_was_read(lists, kept, name, relative, monkeypatch):
    monkeypatch.chdir(lists)
    path = name if relative else lists / name
    with monkeypatch.context() as small:
        small.setattr(parsed, "LARGE", 10**6)
        expected = load_manifest(path)
        assert expected.columns.file is None
        assert not kept.exists()
    for _ in range(2):
        found = load_manifest(path)
        assert found.columns.file is not None
        for same in (found, pickle.loads(pickle.dumps(found))):
            assert content(same) == content(expected)
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("changed", ["l.tsv", "l.lbl", "label_descriptors.csv"])
def test_a_file_that_changed_is_read_again(lists, changed):
    """Though its size and its time of change are those of before."""
    load_manifest(lists / "l.tsv")
    path = lists / changed
    times = path.stat()
    text = path.read_text()
    path.write_text(text.replace("3", "9").replace("a x,y", "a x,x").replace("Y", "Z"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    found = load_manifest(lists / "l.tsv")
    assert found.clips[0].samples == (9 if changed == "l.tsv" else 3)
    assert found.clips[0].labels == (("x",) if changed == "l.lbl" else ("x", "y"))
    assert found.label_names["y"] == ("Z" if changed == "label_descriptors.csv" else "Y")


def test_what_was_read_is_not_read_again(lists, monkeypatch):
    load_manifest(lists / "l.jsonl")
    monkeypatch.setattr("cat.data.manifest.lines", None)
    load_manifest(lists / "l.jsonl")


def test_a_damaged_file_is_made_again(lists, kept):
    expected = content(load_manifest(lists / "l.jsonl"))
    (file,) = kept.iterdir()
    good = file.read_bytes()
    for damaged in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b"", b"x" * 100):
        file.write_bytes(damaged)
        assert content(load_manifest(lists / "l.jsonl")) == expected
        assert file.read_bytes() == good


def test_nothing_is_kept_of_a_list_that_cannot_be_used(lists, kept):
    (lists / "l.jsonl").write_text(JSONL + "x\n")
    for _ in range(2):
        with pytest.raises(ManifestError, match=r"l\.jsonl:4: not JSON"):
            load_manifest(lists / "l.jsonl")
    load_manifest(lists / "l.tsv")
    (lists / "audio").rmdir()
    with pytest.raises(ManifestError, match="audio does not exist; edit it"):
        load_manifest(lists / "l.tsv")
    assert len(list(kept.iterdir())) == 1


def test_a_list_that_changes_while_it_is_read_is_not_kept(lists, kept, monkeypatch):
    keys = iter(["0" * 64, "1" * 64])
    monkeypatch.setattr(parsed, "_key", lambda path: next(keys))
    assert len(load_manifest(lists / "l.jsonl")) == 2
    assert not list(kept.iterdir())


@pytest.mark.parametrize("home", ["read-only", "none", "a file"])
def test_without_a_place_to_keep_it(lists, tmp_path, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", {"read-only": "/proc", "none": "", "a file": str(lists / "l.tsv")}[home])
    if home == "none":
        monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError))
    for _ in range(2):
        assert len(load_manifest(lists / "l.jsonl")) == 2


def test_what_nobody_opens_goes(lists, kept):
    load_manifest(lists / "l.jsonl")
    (old,) = kept.iterdir()
    ago = time.time() - 31 * 24 * 3600
    os.utime(old, (ago, ago))
    load_manifest(lists / "l.jsonl")  # opened
    load_manifest(lists / "l.tsv")
    assert len(list(kept.iterdir())) == 2
    os.utime(old, (ago, ago))
    load_manifest(lists / "released.json")
    assert old not in kept.iterdir()
    assert len(list(kept.iterdir())) == 2


def test_several_processes_at_once_read_it_once(lists, kept, monkeypatch):
    (lists / "many.jsonl").write_text("".join(f'{{"path": "{i}.wav"}}\n' for i in range(2000)))
    expected = load_manifest(lists / "many.jsonl").fingerprint
    for path in kept.iterdir():
        path.unlink()
    here, there = os.pipe()
    monkeypatch.setattr("cat.data.manifest._read_jsonl", functools.partial(_slowly, there))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_fingerprint, [str(lists / "many.jsonl")] * 3, chunksize=1) == [expected] * 3
    assert [path.suffix for path in kept.iterdir()] == [".columns"]
    os.close(there)
    with open(here, "rb") as read:
        assert read.read() == b"x"


def test_a_process_that_reads_for_too_long_is_not_waited_for(lists, kept, monkeypatch):
    expected = load_manifest(lists / "l.jsonl").fingerprint
    (file,) = kept.iterdir()
    file.unlink()
    monkeypatch.setattr(parsed, "_PATIENCE", 0.3)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load_manifest(lists / "l.jsonl").fingerprint == expected


def _slowly(log, path):
    os.write(log, b"x")
    time.sleep(0.3)
    return READ(path)


def _fingerprint(path):
    found = load_manifest(path)
    assert found.columns.file is not None
    assert found.rows.tolist() == [-1] * 2000
    return found.fingerprint
