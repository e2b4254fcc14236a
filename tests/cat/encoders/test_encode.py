"""`cat-audio encode` and `similar`: nothing is lost, nothing of the user's written over, bad files reported."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.checkpoints.hub import EncoderConfig
from cat.commands import main
from cat.data.features import FeatureConfig
from cat.encoders import CATEncoder, encode, parts, reading
from cat.encoders.similar import Pieces, nearest, pieces_of
from cat.encoders.tables import SUFFIXES, TableError, read_table
from cat.model import ModelConfig

soundfile = pytest.importorskip("soundfile")
MODEL = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    CATEncoder(EncoderConfig(MODEL, FeatureConfig(frames=64))).save_pretrained(path)
    return path


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Six tones of several lengths and rates; one is long, two are no audio."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, (seconds, rate) in enumerate([(0.3, 16000), (1.0, 8000), (3.0, 16000), (0.5, 44100)]):
        time = np.arange(int(seconds * rate)) / rate
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin(2 * np.pi * 300 * (number + 1) * time), rate)
    (folder / "1-bad.wav").write_bytes(b"this is not audio")
    (folder / "4-short.wav").write_bytes((folder / "0.wav").read_bytes()[:200])
    return folder


def run_encode(sounds, checkpoint, *words: object) -> int:
    return main(["encode", str(sounds), "--encoder", str(checkpoint), "--quiet", *map(str, words)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def skip_without(suffix: str) -> None:
    if suffix != ".npz":
        pytest.importorskip("pyarrow" if suffix == ".parquet" else "h5py")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("frames", [False, True])
def test_a_table_has_what_the_encoder_says(sounds, checkpoint, tmp_path, capsys, suffix, frames, monkeypatch):
    skip_without(suffix)
    monkeypatch.setattr(reading, "WINDOW_SECONDS", 2)  # so that the third file is a long one
    out = tmp_path / f"out{suffix}"
    assert run_encode(sounds, checkpoint, "-o", out, *(["--frames"] if frames else [])) == 1
    table, encoder = read_table(out), CATEncoder.from_pretrained(checkpoint)
    assert [Path(path).name for path in table.paths] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert table.seconds == pytest.approx([0.3, 1.0, 3.0, 0.5])
    for number, path in enumerate(table.paths):
        wave, rate = soundfile.read(path, dtype="float32")
        expected = encoder(wave, rate)
        np.testing.assert_allclose(table.clip[number], expected.clip[0].numpy(), atol=1e-5)
        if frames:
            mine = slice(table.offsets[number], table.offsets[number + 1])
            np.testing.assert_allclose(table.frames[mine], expected.frames[0].numpy(), atol=1e-5)
            np.testing.assert_array_equal(table.times[mine], expected.times.numpy())
    assert (table.frames is not None) == frames
    told = capsys.readouterr().out
    assert "embeddings of width 16 of 4 files" in told
    assert "2 of 6 files left out" in told
    lines = [json.loads(line) for line in (tmp_path / "out.failures.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["1-bad.wav", "4-short.wav"]


def test_nothing_else_is_left_and_all_went_well_is_zero(sounds, checkpoint, tmp_path):
    for bad in ("1-bad.wav", "4-short.wav"):
        (sounds / bad).unlink()
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "out.npz", "--num-workers", 1) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "sounds"]
    before = contents(tmp_path)
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "out.npz") == 0  # its own is replaced
    assert contents(tmp_path).keys() == before.keys()


def test_files_folders_and_lists_are_taken(sounds, checkpoint, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"path": "sounds/2.wav"}\n{"path": "sounds/0.wav"}\n')
    words = [sounds / "3.wav", tmp_path / "list.jsonl", sounds / "2.wav", tmp_path / "nowhere.wav"]
    argv = ["encode", *map(str, words), "--encoder", str(checkpoint), "-o", str(tmp_path / "out.npz"), "--quiet"]
    assert main(argv) == 1
    assert [Path(path).name for path in read_table(tmp_path / "out.npz").paths] == ["3.wav", "2.wav", "0.wav"]
    assert "no such file" in (tmp_path / "out.failures.jsonl").read_text()


def test_a_layer(sounds, checkpoint, tmp_path, capsys):
    assert run_encode(sounds / "2.wav", checkpoint, "-o", tmp_path / "out.npz", "--layer", 0, "--frames") == 0
    wave, rate = soundfile.read(sounds / "2.wav", dtype="float32")
    expected = CATEncoder.from_pretrained(checkpoint)(wave, rate, layers=[0]).layers[0]
    table = read_table(tmp_path / "out.npz")
    np.testing.assert_allclose(table.clip, expected.clip.numpy(), atol=1e-5)
    np.testing.assert_allclose(table.frames, expected.frames[0].numpy(), atol=1e-5)
    before = contents(tmp_path)
    for words, message in ((["--layer", 3], "layers is [3]; expected"), (["--window", 1000], "expected a window of")):
        assert run_encode(sounds, checkpoint, "-o", tmp_path / "b.npz", *words) == 1
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------ stopped

KILLED = """
import os, sys
from cat.commands import main
from cat.encoders import encode, parts
parts.SECONDS = 0
short, calls = encode._short, []
def third(*arguments):
    calls.append(None)
    return os.kill(os.getpid(), 9) if len(calls) == 3 else short(*arguments)
encode._short = third
main(sys.argv[1:])
"""


def interrupted(argv: list[str], monkeypatch, number: int) -> None:
    """Stopped by a signal, or by Ctrl-C, at the third batch."""
    with monkeypatch.context() as patched:
        patched.setattr(parts, "SECONDS", 0)
        short, calls = encode._short, []

        def third(*arguments):
            calls.append(None)
            return os.kill(os.getpid(), number) if len(calls) == 3 else short(*arguments)

        patched.setattr(encode, "_short", third)
        assert main(argv) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "int", "term"])
def test_it_goes_on_where_it_was_stopped(sounds, checkpoint, tmp_path, monkeypatch, capsys, number):
    argv = ["encode", str(sounds), "--encoder", str(checkpoint), "--frames", "--batch-size", "1"]
    one = [*argv, "-o", str(tmp_path / "a.npz")]
    if number == signal.SIGKILL:
        assert subprocess.run([sys.executable, "-c", KILLED, *one], capture_output=True).returncode == -number
    else:
        interrupted(one, monkeypatch, number)
        told = capsys.readouterr().err
        assert "2 of 6 files are done, in" in told  # 0.wav, 1-bad.wav
        assert "goes on with them" in told
    assert not (tmp_path / "a.npz").exists()
    monkeypatch.setattr(encode, "_short", counted := Calls(encode._short))
    assert main(one) == 1
    assert counted.calls == 4
    out, err = capsys.readouterr()
    assert "2 of 6 files are done already" in err
    assert "2 of 6 files left out" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.failures.jsonl", "a.npz", "sounds"]
    assert main([*argv, "-o", str(tmp_path / "b.npz")]) == 1
    assert counted.calls == 4 + 6
    first, second = read_table(tmp_path / "a.npz"), read_table(tmp_path / "b.npz")
    assert first.paths == second.paths
    np.testing.assert_array_equal(first.frames, second.frames)
    np.testing.assert_array_equal(first.clip, second.clip)


@pytest.mark.parametrize("harm", ["clip.f32", "frames.f32", "clips.json", "missing", "other audio"])
def test_a_part_that_is_not_sound_is_made_again(sounds, checkpoint, tmp_path, monkeypatch, capsys, harm):
    """One that is, before it, is not."""
    for bad in ("1-bad.wav", "4-short.wav"):
        (sounds / bad).unlink()
    argv = ["encode", str(sounds), "--encoder", str(checkpoint), "--frames", "--batch-size", "1", "--quiet"]
    one = [*argv, "-o", str(tmp_path / "a.npz")]
    interrupted(one, monkeypatch, signal.SIGINT)
    _, part = sorted((tmp_path / "a.npz.parts").glob("part-*"))
    if harm == "other audio":
        soundfile.write(sounds / "1.wav", np.full(9000, 0.1), 16000)
    elif harm == "missing":
        (part / "clip.f32").unlink()
    else:
        content = bytearray((part / harm).read_bytes())
        content[len(content) // 2] ^= 4
        (part / harm).write_bytes(content)
    capsys.readouterr()
    monkeypatch.setattr(encode, "_short", counted := Calls(encode._short))
    assert main(one) == 0
    assert counted.calls == 3
    reason = "is of audio files that have changed since" if harm == "other audio" else "is damaged"
    assert f"{part} {reason}: from there on all is done again" in capsys.readouterr().err
    assert main([*argv, "-o", str(tmp_path / "b.npz")]) == 0
    first, second = read_table(tmp_path / "a.npz"), read_table(tmp_path / "b.npz")
    np.testing.assert_array_equal(first.frames, second.frames)
    np.testing.assert_array_equal(first.clip, second.clip)


class Calls:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_a_file_that_goes_bad_half_way_leaves_no_frames(sounds, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WINDOW_SECONDS", 1)
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.standard_normal(16000 * 5)
    wave[-5] = np.nan
    soundfile.write(sounds / "2-nan.wav", wave, 16000, "FLOAT")
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "a.npz", "--frames") == 1
    (sounds / "2-nan.wav").unlink()
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "b.npz", "--frames") == 1
    one, other = read_table(tmp_path / "a.npz"), read_table(tmp_path / "b.npz")
    assert one.paths == other.paths
    np.testing.assert_array_equal(one.frames, other.frames)
    assert "NaN" in (tmp_path / "a.failures.jsonl").read_text()


def test_parts_of_something_else_are_not_mixed_in(sounds, checkpoint, tmp_path, monkeypatch, capsys):
    argv = ["encode", str(sounds), "--encoder", str(checkpoint), "-o", str(tmp_path / "a.npz"), "--batch-size", "1"]
    interrupted(argv, monkeypatch, signal.SIGINT)
    before = contents(tmp_path)
    (sounds / "9.wav").write_bytes((sounds / "0.wav").read_bytes())
    before |= {"sounds/9.wav": (sounds / "0.wav").read_bytes()}
    for words in ([], ["--frames"], ["--pooling", "cls"]):
        assert run_encode(sounds, checkpoint, "-o", tmp_path / "a.npz", *words) == 1
        assert "of other files, or by another encoder or other settings" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "a.npz", "--overwrite") == 1
    assert len(read_table(tmp_path / "a.npz").paths) == 5
    assert not (tmp_path / "a.npz.parts").exists()


def test_a_folder_of_the_users_is_left_alone(sounds, checkpoint, tmp_path, capsys):
    (tmp_path / "a.npz.parts").mkdir()
    (tmp_path / "a.npz.parts" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    for words in ([], ["--overwrite"]):
        assert run_encode(sounds, checkpoint, "-o", tmp_path / "a.npz", *words) == 1
        assert "is not what an encode left; it is left alone" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_files_that_encode_did_not_write_are_left_alone(sounds, checkpoint, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", mine=np.zeros(3))
    before = contents(tmp_path)
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "a.npz") == 1
    assert "exists, and is not" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run_encode(sounds, checkpoint, "-o", tmp_path / "a.npz", "--overwrite") == 1
    assert len(read_table(tmp_path / "a.npz").paths) == 4


def test_no_file_that_can_be_read(tmp_path, checkpoint, capsys):
    (tmp_path / "bad.wav").write_bytes(b"no")
    assert run_encode(tmp_path / "bad.wav", checkpoint, "-o", tmp_path / "a.npz") == 1
    assert "1 of 1 files left out" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.failures.jsonl", "bad.wav"]


@pytest.mark.parametrize(("name", "words"), [
    ("a.csv", "expected a name that ends in .npz, .parquet, .h5"),
    ("folder.npz", "is a folder; expected the name of a file"),
])  # fmt: skip
def test_bad_names_leave_nothing(sounds, checkpoint, tmp_path, capsys, name, words):
    (tmp_path / "folder.npz").mkdir()
    before = contents(tmp_path)
    assert run_encode(sounds, checkpoint, "-o", tmp_path / name) == 1
    assert words in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("suffix", "package"), [(".parquet", "pyarrow"), (".h5", "h5py")])
def test_a_missing_package_is_named(sounds, checkpoint, tmp_path, capsys, monkeypatch, suffix, package):
    for name in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_encode(sounds, checkpoint, "-o", tmp_path / f"a{suffix}") == 1
    assert f"{suffix} needs the package {package}" in (told := capsys.readouterr().err)
    assert "pip install 'cat-kernels[files]', or name the file .npz" in told


def test_paths_of_any_bytes(sounds, checkpoint, tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    (sounds / "0.wav").rename(sounds / name)
    for suffix in SUFFIXES:
        try:
            skip_without(suffix)
        except pytest.skip.Exception:
            continue
        assert run_encode(sounds, checkpoint, "-o", tmp_path / f"a{suffix}") == 1
        assert any(path.endswith(r"caf\xe9.wav") for path in read_table(tmp_path / f"a{suffix}").paths)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_table_is_an_error(tmp_path, suffix):
    skip_without(suffix)
    path = tmp_path / f"a{suffix}"
    with pytest.raises(TableError, match="no such file"):
        read_table(path)
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(TableError, match="not what cat-audio encode writes"):
        read_table(path)


# ------------------------------------------------------------------------------------------------ similar


@pytest.fixture
def pool(tmp_path) -> Path:
    """A long recording of three sounds, each of them alone, and one that is no audio."""
    folder = tmp_path / "pool"
    folder.mkdir()
    rng = np.random.default_rng(0)
    time = np.arange(2 * 16000) / 16000
    parts = {
        "noise": 0.1 * rng.standard_normal(len(time)),
        "low": 0.3 * np.sin(2 * np.pi * 200 * time),
        "high": 0.3 * np.sin(2 * np.pi * 5000 * time),
    }
    soundfile.write(folder / "long.wav", np.concatenate(list(parts.values())), 16000)
    for name, wave in parts.items():
        soundfile.write(folder / f"{name}.wav", wave, 16000)
    (folder / "bad.wav").write_bytes(b"no")
    return folder


def run_similar(pool, query, checkpoint, *words: object) -> int:
    return main(["similar", str(pool), str(query), "--encoder", str(checkpoint), "--quiet", *map(str, words)])


def test_pieces_are_found_by_the_cosine(pool, checkpoint, capsys):
    """Against numpy: of the pieces of the long file, and of the two that are left of the others."""
    encoder, pieces = CATEncoder.from_pretrained(checkpoint), {}
    for name in ("high", "long", "noise"):
        wave, rate = soundfile.read(pool / f"{name}.wav", dtype="float32")
        frames = encoder(wave, rate).frames[0].numpy()
        edges = [0, 12, 25, 38] if name == "long" else [0, 13]
        for a, b in itertools.pairwise(edges):
            pieces[name, a] = frames[a:b].mean(0)
    query = encoder(soundfile.read(pool / "low.wav", dtype="float32")[0], 16000).frames[0].numpy().mean(0)
    cosines = {key: row @ query / np.linalg.norm(row) / np.linalg.norm(query) for key, row in pieces.items()}
    expected = sorted(cosines, key=cosines.get, reverse=True)
    assert run_similar(pool, pool / "low.wav", checkpoint, "--piece", 2, "--json", "-k", 5) == 0
    out, err = capsys.readouterr()
    hits = json.loads(out)
    assert [(Path(hit["path"]).stem, round(hit["begin"] / 0.16)) for hit in hits] == expected
    assert [hit["similarity"] for hit in hits] == pytest.approx([cosines[key] for key in expected], abs=1e-5)
    ends = {round(hit["begin"] / 0.16): hit["end"] for hit in hits if hit["path"] == str(pool / "long.wav")}
    assert ends == pytest.approx({0: 12 * 0.16, 12: 25 * 0.16, 25: 6.0})
    assert "left out" in err
    assert "bad.wav" in err


def test_its_forms(pool, checkpoint, capsys):
    assert run_similar(pool, pool / "low.wav", checkpoint, "-k", 99) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["similarity", "where", "file"]
    assert sorted(line.split("/")[-1] for line in table[1:]) == ["high.wav", "long.wav", "noise.wav"]  # not the query
    assert run_similar(pool, pool / "low.wav", checkpoint, "-k", 1, "--csv") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header == "similarity,begin,end,path"
    assert row.endswith(".wav")


@pytest.mark.parametrize("frames", [True, False])
def test_an_index_is_written_once_and_read_again(pool, checkpoint, tmp_path, capsys, monkeypatch, frames):
    index = tmp_path / "index.npz"
    if frames:
        assert run_similar(pool, pool / "low.wav", checkpoint, "--index", index, "--piece", 2, "--json") == 0
        first = json.loads(capsys.readouterr().out)
    else:
        assert main(["encode", str(pool), "--encoder", str(checkpoint), "-o", str(index), "--pooling", "both"]) == 1
        capsys.readouterr()
    before = index.read_bytes()
    monkeypatch.setattr(encode, "batches", counted := Counted(reading.batches))
    monkeypatch.chdir(pool.parent)
    assert run_similar("pool", pool / "low.wav", checkpoint, "--index", index, "--piece", 2, "--json") == 0
    assert counted.places == 1  # the query alone
    out, err = capsys.readouterr()
    assert index.read_bytes() == before
    assert "1 files are not in" in err  # the bad one
    if frames:
        assert json.loads(out) == first
    else:
        assert {hit["begin"] for hit in json.loads(out)} == {0}


class Counted:
    def __init__(self, function):
        self.function, self.places = function, 0

    def __call__(self, manifest, places, **options):
        self.places += len(places)
        return self.function(manifest, places, **options)


def test_what_cannot_be_compared(pool, sounds, checkpoint, tmp_path, capsys):
    torch.manual_seed(1)
    CATEncoder(EncoderConfig(MODEL, FeatureConfig(frames=64))).save_pretrained(tmp_path / "other")
    index = tmp_path / "index.npz"
    assert run_similar(pool, pool / "low.wav", checkpoint, "--index", index) == 0
    for words, message in (
        ((pool, pool / "low.wav", tmp_path / "other", "--index", index), "its embeddings are another encoder's"),
        ((sounds, pool / "low.wav", checkpoint, "--index", index), "has none of the 6 files"),
        ((pool, pool / "bad.wav", checkpoint), "the query cannot be used"),
        ((pool, pool / "nowhere.wav", checkpoint), "the query cannot be used"),
        ((pool, pool / "low.wav", checkpoint, "-k", 0), "k is 0"),
        ((pool, pool / "low.wav", checkpoint, "--piece", 0), "seconds is 0.0"),
        ((pool / "bad.wav", pool / "low.wav", checkpoint), "none of the 1 files could be read"),
        ((tmp_path / "nothing.jsonl", pool / "low.wav", checkpoint), "no such file or folder"),
    ):
        capsys.readouterr()
        assert run_similar(*words) == 1
        assert message in capsys.readouterr().err


def test_nearest_is_by_the_angle():
    from cat.encoders.tables import Table

    rows = np.array([[1, 0], [0, 5], [3, 3]], dtype=np.float32)
    table = Table({}, ["a", "b", "c"], np.array([1.0, 2.0, 3.0]), rows, None, None, None)
    hits = nearest(pieces_of(table, 10), np.array([2.0, 0.1]), 2, {"a", "b", "c"})
    assert [hit.path for hit in hits] == ["a", "c"]
    assert hits[0].similarity == pytest.approx(2 / 4.01**0.5)
    assert (hits[1].begin, hits[1].end) == (0, 3)
    assert nearest(pieces_of(table, 10), np.array([2.0, 0.1]), 2, set()) == []


def test_whitened_neighbours_differ_where_the_others_do_not():
    """All rows lie in nearly one direction; what tells the two kinds apart is small."""
    random = np.random.default_rng(0)
    kind = np.arange(60) % 2
    rows = np.zeros((60, 4))
    rows[:, 0], rows[:, 1] = 100, 20 * random.normal(size=60)
    rows[:, 2] = 0.1 * (2 * kind - 1) + 0.01 * random.normal(size=60)
    pieces = Pieces([str(number) for number in range(60)], np.zeros(60), np.ones(60), rows.astype(np.float32))
    wanted = np.array([100, 0, 0.1, 0], dtype=np.float32)

    def right(whiten: bool) -> int:
        hits = nearest(pieces, wanted, 10, set(pieces.paths), whiten=whiten)
        return sum(kind[int(hit.path)] for hit in hits)

    assert right(True) == 10
    assert right(False) < 9
    assert len(nearest(pieces, wanted, 3, {"1"}, whiten=True)) == 1
