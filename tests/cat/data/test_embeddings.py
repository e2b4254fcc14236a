"""External embeddings: written whole or not at all, and never parted from their clips."""

import dataclasses
import hashlib
import io
import json
import os
import pickle

import numpy as np
import pytest

from cat.data import verification
from cat.data.audio import AudioError
from cat.data.embeddings import (
    EmbeddingError,
    EmbeddingStore,
    EmbeddingWriter,
    gather_embeddings,
    open_embeddings,
)
from cat.data.manifest import Clip, Manifest, load_manifest, write_manifest

DIM = 6


@pytest.fixture
def manifest(tmp_path):
    return Manifest(tuple(Clip(f"{i}.wav", labels=(str(i),)) for i in range(5)), tmp_path, source=tmp_path)


def npy_header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def row(index):
    return np.arange(DIM, dtype=np.float32) + 100 * index


def write(path, manifest, order=((0, 1), (3,), (4,))):
    with EmbeddingWriter(path, manifest, dim=DIM, encoder="clap") as writer:
        for indices in order:
            writer.append(indices, np.stack([row(i) for i in indices]))
    return writer.manifest


def test_every_clip_keeps_its_row(tmp_path, manifest):
    """Clip 2 has none; the order of writing is another than the manifest's."""
    linked = write(tmp_path / "e.npy", manifest, order=((3,), (4, 0), (1,)))
    write_manifest(linked, tmp_path / "lists" / "linked.jsonl")
    read = load_manifest(tmp_path / "lists" / "linked.jsonl")
    store = open_embeddings(read)
    assert (len(store), store.dim, store.encoder) == (4, DIM, "clap")
    assert [clip.labels for clip in read.clips] == [("3",), ("4",), ("0",), ("1",)]
    for clip in read.clips:
        np.testing.assert_array_equal(store.rows([clip.embedding])[0], row(int(clip.labels[0])))


def test_any_numpy_reads_the_file(tmp_path, manifest):
    write(tmp_path / "e.npy", manifest)
    rows = np.load(tmp_path / "e.npy", allow_pickle=False)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.stack([row(i) for i in (0, 1, 3, 4)]))


def test_a_subset_of_the_linked_manifest_still_fits(tmp_path, manifest):
    linked = write(tmp_path / "e.npy", manifest)
    subset = dataclasses.replace(linked, clips=linked.clips[2:])
    write_manifest(subset, tmp_path / "subset.jsonl")
    read = load_manifest(tmp_path / "subset.jsonl")
    np.testing.assert_array_equal(open_embeddings(read).rows([read.clips[0].embedding])[0], row(3))


def test_no_embeddings(manifest):
    assert open_embeddings(manifest) is None


def test_embeddings_of_another_list_are_refused(tmp_path, manifest):
    linked = write(tmp_path / "e.npy", manifest)
    write(tmp_path / "e.npy", manifest, order=((1, 0), (3,), (4,)))  # the same clips in another order
    with pytest.raises(EmbeddingError, match=r"another list of clips.*run it again"):
        open_embeddings(linked)


@pytest.mark.parametrize(("index", "words"), [(None, "no embedding row"), (4, "embedding row 4")])
def test_a_clip_without_a_row_is_refused(tmp_path, manifest, index, words):
    linked = write(tmp_path / "e.npy", manifest)
    clips = (*linked.clips[:2], dataclasses.replace(linked.clips[2], embedding=index))
    with pytest.raises(EmbeddingError, match=rf"3\.wav has {words}.*rows 0 to 3"):
        open_embeddings(dataclasses.replace(linked, clips=clips))


@pytest.mark.parametrize("name", ["e.npy", "e.npy.json"])
def test_missing_file(tmp_path, manifest, name):
    linked = write(tmp_path / "e.npy", manifest)
    (tmp_path / name).unlink()
    with pytest.raises(EmbeddingError, match=f"{name}: no such file; run `cat-audio embed`"):
        open_embeddings(linked)


def test_array_and_sidecar_of_different_runs(tmp_path, manifest):
    write(tmp_path / "e.npy", manifest)
    np.save(tmp_path / "e.npy", np.zeros((3, DIM), dtype=np.float32))
    with pytest.raises(EmbeddingError, match="not from the same run"):
        EmbeddingStore(tmp_path / "e.npy")


@pytest.mark.parametrize("content", [b"", b"junk" * 100, npy_header((4, DIM)).replace(b")", b"("), b"PK\x03\x04 a zip"])
def test_damaged_array(tmp_path, manifest, content):
    write(tmp_path / "e.npy", manifest)
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(EmbeddingError, match="not a readable"):
        EmbeddingStore(tmp_path / "e.npy")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("\xff", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "no 'encoder' of type str"),
        ({"encoder": 3}, "no 'encoder' of type str"),
        ({"manifest": None}, "no 'manifest' of type str"),
        ({"fingerprint": None}, "no 'fingerprint' of type str"),
        ({"count": "4"}, "no 'count' of type int"),
        ({"dim": True}, "no 'dim' of type int"),
        ({"sha256": 3}, "'sha256' is not of type str"),
        ({"identity": 3}, "'identity' is not of type str"),
        ({"made_with": []}, "'made_with' is not of type dict"),
        ({"pieces": "a"}, "'pieces' is not of type list"),
        ({"pieces": [3]}, "'pieces' or 'clips' hold no text"),
        ({"clips": {"a": "b"}}, "'pieces' or 'clips' hold no text"),
    ],
)
def test_damaged_sidecar(tmp_path, manifest, content, words):
    linked = write(tmp_path / "e.npy", manifest)
    sidecar = tmp_path / "e.npy.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(sidecar.read_text()), **content})
    sidecar.write_bytes(content.encode("latin-1"))
    with pytest.raises(EmbeddingError, match=rf"e\.npy\.json: damaged.*{words}|{words}.*run `cat-audio embed` again"):
        open_embeddings(linked)


@pytest.mark.parametrize(("dtype", "value"), [("<f4", np.nan), ("<f8", 1e300), ("<f2", np.inf)])
def test_a_row_that_is_not_finite_fails_its_clip_only(tmp_path, manifest, dtype, value):
    linked = write(tmp_path / "e.npy", manifest)
    rows = np.load(tmp_path / "e.npy").astype(dtype)
    rows[2, 3] = value
    np.save(tmp_path / "e.npy", rows)
    store = open_embeddings(linked)
    with pytest.raises(AudioError, match=r"e\.npy\[2\]: this row, the clip's external embedding, is NaN or infinite"):
        store.rows([0, 2])
    np.testing.assert_array_equal(store.rows([3, 0]), rows[[3, 0]].astype("<f4"))


def test_identity_tells_other_rows(tmp_path, manifest):
    identity = open_embeddings(write(tmp_path / "e.npy", manifest)).identity
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["encoder"], identity["count"], identity["dim"]) == ("clap", 4, DIM)
    assert open_embeddings(write(tmp_path / "f.npy", manifest)).identity == identity

    sidecar = tmp_path / "f.npy.json"
    info = json.loads(sidecar.read_text())
    del info["sha256"]  # as earlier releases wrote it
    sidecar.write_text(json.dumps(info))
    assert EmbeddingStore(tmp_path / "f.npy").identity == identity

    rows = np.load(tmp_path / "e.npy")
    rows[1] += 1
    np.save(tmp_path / "e.npy", rows)  # by another program: the sidecar does not know
    assert EmbeddingStore(tmp_path / "e.npy").identity != identity


def without(sidecar, *keys):
    info = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({key: value for key, value in info.items() if key not in keys}))


@pytest.mark.parametrize("most", [verification._MOST_BYTES, 1], ids=["all", "both ends"])
@pytest.mark.parametrize("at", [0, 3])
def test_rows_that_are_damaged_are_named(tmp_path, manifest, monkeypatch, at, most):
    monkeypatch.setattr(verification, "PIECE", 2)
    monkeypatch.setattr(verification, "_MOST_BYTES", most)
    linked = write(tmp_path / "e.npy", manifest)
    open_embeddings(linked).verify(linked)
    content = bytearray((tmp_path / "e.npy").read_bytes())
    content[128 + at * DIM * 4] ^= 1  # a bit of the number of least weight
    (tmp_path / "e.npy").write_bytes(content)
    which = f"rows {at // 2 * 2} to {at // 2 * 2 + 1}"
    with pytest.raises(EmbeddingError, match=rf"e\.npy: damaged.*SHA-256 of {which}.*embed` again.*on purpose"):
        open_embeddings(linked).verify(linked)
    without(tmp_path / "e.npy.json", "pieces", "sha256")  # as the message says; and as earlier versions wrote it
    open_embeddings(linked).verify(linked)


@pytest.mark.parametrize("size", [1, 5, 47, 48, 49, 1000])
def test_pieces_do_not_depend_on_how_they_were_written(monkeypatch, size):
    monkeypatch.setattr(verification, "PIECE", 2)
    rows = np.random.default_rng(0).standard_normal((5, DIM)).astype("<f4")
    content, sums = rows.tobytes(), verification.PieceSums(DIM)
    for start in range(0, len(content), size):
        sums.update(content[start : start + size])
    assert sums.all() == [hashlib.sha256(rows[at : at + 2].tobytes()).hexdigest() for at in (0, 2, 4)]
    assert verification.damaged_piece(rows, sums.all()) is None
    assert verification.damaged_piece(rows, sums.all()[:2]) == range(5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), True),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), True),
        (lambda path: path.write_bytes(path.read_bytes()), False),
        (lambda path: path.unlink(), False),  # skipped in training, and recorded
        (lambda path: (path.unlink(), os.mkfifo(path)), False),
    ],
    ids=["shorter", "other content", "touched", "missing", "a pipe"],
)
def test_audio_that_has_changed_since(tmp_path, manifest, change, told):
    for index in range(5):
        (tmp_path / f"{index}.wav").write_bytes(bytes([index]) * 20_000)
    linked = write(tmp_path / "e.npy", manifest)
    change(tmp_path / "3.wav")
    open_embeddings(linked).verify(dataclasses.replace(linked, clips=linked.clips[:2]))  # without that clip
    if not told:
        open_embeddings(linked).verify(linked)
        return
    with pytest.raises(EmbeddingError, match=r"3\.wav is another file than the one whose embedding is in .*e\.npy"):
        open_embeddings(linked).verify(linked)
    without(tmp_path / "e.npy.json", "clips")
    open_embeddings(linked).verify(linked)


def test_pickled_arrays_are_not_opened(tmp_path, manifest):
    write(tmp_path / "e.npy", manifest)
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(EmbeddingError, match="not a readable"):
        EmbeddingStore(tmp_path / "e.npy")


def test_an_exception_leaves_the_old_files(tmp_path, manifest):
    write(tmp_path / "e.npy", manifest)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    writer = EmbeddingWriter(tmp_path / "e.npy", manifest, dim=DIM, encoder="new")

    def interrupted():
        with writer:
            writer.append([0], row(7)[None])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(EmbeddingError, match="not complete"):
        _ = writer.manifest


@pytest.mark.parametrize(
    ("indices", "rows", "words"),
    [
        ([0], np.zeros((1, DIM + 1)), r"expected \(1, 6\)"),
        ([0, 1], np.zeros((1, DIM)), r"expected \(2, 6\)"),
        ([0], np.full((1, DIM), np.nan), "NaN or infinite"),
        ([2, 2], np.zeros((2, DIM)), r"clip 2 \(2\.wav\) was given an embedding twice"),
    ],
)
def test_bad_rows(tmp_path, manifest, indices, rows, words):
    with (
        pytest.raises(EmbeddingError, match=words),
        EmbeddingWriter(tmp_path / "e.npy", manifest, dim=DIM, encoder="x") as writer,
    ):
        writer.append(indices, rows)
    assert not list(tmp_path.iterdir())


def test_nothing_embedded(tmp_path, manifest):
    with pytest.raises(EmbeddingError, match="not one clip"):
        write(tmp_path / "e.npy", manifest, order=())
    with pytest.raises(EmbeddingError, match=r"written as \.npy"):
        EmbeddingWriter(tmp_path / "e.bin", manifest, dim=DIM, encoder="x")


def test_store_travels_to_workers_by_its_path(tmp_path, manifest):
    linked = write(tmp_path / "e.npy", manifest)
    store = open_embeddings(linked)
    data = pickle.dumps(store)
    assert row(3).tobytes() not in data
    np.testing.assert_array_equal(pickle.loads(data).rows([2, 0]), np.stack([row(3), row(0)]))


# --- the released layout, one .npy a clip ----------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", row(i) if i else row(i)[None])  # (dim,) and (1, dim) both occur
    entries = [{"wav_path": f"{i}.wav", "clap_path": f"{i}.npy", "num_frame": 1} for i in range(3)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    return tmp_path


def test_released_files(released):
    store = open_embeddings(load_manifest(released / "train.json"))
    assert (len(store), store.dim) == (3, DIM)
    np.testing.assert_array_equal(store.rows([2, 0]), np.stack([row(2), row(0)]))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(DIM + 1), "width 7, the others have 6"),
        (np.zeros((2, DIM)), r"got shape \(2, 6\)"),
        (np.full(DIM, np.inf), "finite"),
        (np.full(DIM, 1e300), "finite"),
        (np.float32(1), r"got shape \(\)"),
        (np.array(["a"] * DIM), "finite numbers"),
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 a zip", "cannot be read"),
        (npy_header((10**9, 10**9)), "cannot be read"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_an_unusable_released_file_fails_its_clip_only(released, array, words, place):
    file = released / f"{place}.npy"
    file.unlink()
    if isinstance(array, bytes):
        file.write_bytes(array)
    elif array is not None:
        np.save(file, array)
    store = open_embeddings(load_manifest(released / "train.json"))
    with pytest.raises(AudioError, match=words):
        store.rows([place])
    np.testing.assert_array_equal(store.rows([2])[0], row(2))


def test_identity_of_released_files(released):
    manifest = load_manifest(released / "train.json")
    identity = open_embeddings(manifest).identity
    assert (identity["count"], identity["dim"]) == (3, DIM)
    (released / "2.npy").unlink()
    assert open_embeddings(manifest).identity != identity


def test_wrong_folder_of_released_files(released):
    for i in range(3):
        (released / f"{i}.npy").unlink()
    with pytest.raises(EmbeddingError, match="correct the clap_path"):
        open_embeddings(load_manifest(released / "train.json"))


def test_gathering_released_files(released):
    (released / "1.npy").unlink()
    manifest = gather_embeddings(load_manifest(released / "train.json"), released / "all.npy", encoder="clap")
    assert [(clip.path, clip.embedding) for clip in manifest.clips] == [("0.wav", 0), ("2.wav", 1)]
    np.testing.assert_array_equal(open_embeddings(manifest).rows([1])[0], row(2))
    assert "1 of 3 clips left out, without an embedding; first: " in manifest.notes[0]
    with pytest.raises(EmbeddingError, match="is one of the files to gather"):
        gather_embeddings(load_manifest(released / "train.json"), released / "0.npy", encoder="clap")
