"""Folders, released lists, our JSON Lines: what is read, and what every mistake in them says."""

import json
import re

import pytest

from cat.data.manifest import Clip, Manifest, ManifestError, load_manifest, write_manifest

HEADER = '{"format": "cat-audio manifest", "version": 1}'


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(*entries):
    return "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries) + "\n"


def test_folder(tmp_path):
    for name in ("b.wav", "a.FLAC", "dog/2.ogg", "dog/deep/1.mp3", "notes.txt", ".hidden.wav", ".cache/x.wav"):
        put(tmp_path / name, "")
    manifest = load_manifest(tmp_path)
    assert [clip.path for clip in manifest.clips] == ["a.FLAC", "b.wav", "dog/2.ogg", "dog/deep/1.mp3"]
    assert [clip.labels for clip in manifest.clips] == [(), (), ("dog",), ("dog",)]
    assert manifest.path(2) == tmp_path / "dog/2.ogg"


def test_folder_without_audio(tmp_path):
    with pytest.raises(ManifestError, match=r"no clips.*\.flac"):
        load_manifest(tmp_path)


def test_jsonl(tmp_path):
    entries = [
        {"path": "x/a.wav", "samples": 100, "sample_rate": 8000, "labels": ["dog", "bark"], "embedding": 3, "fold": 2},
        {"path": "b.wav", "labels": "cat", "embedding": 0},
    ]
    header = {"format": "cat-audio manifest", "version": 1, "embeddings": "e.npy", "embeddings_fingerprint": "f"}
    manifest = load_manifest(put(tmp_path / "m.jsonl", lines(header, *entries)))
    assert manifest.clips == (Clip("x/a.wav", 100, 8000, ("dog", "bark"), 3), Clip("b.wav", None, None, ("cat",), 0))
    assert manifest.embeddings == tmp_path / "e.npy"
    assert manifest.embeddings_fingerprint == "f"
    assert manifest.path(0) == tmp_path / "x/a.wav"
    assert manifest.classes == ("bark", "cat", "dog")


def test_jsonl_needs_no_header_and_blank_lines_do_not_count(tmp_path):
    path = put(tmp_path / "m.jsonl", '\ufeff{"path": "a.wav"}\r\n\n{"path": "/b c.wav"}')
    manifest = load_manifest(path)
    assert [clip.path for clip in manifest.clips] == ["a.wav", "/b c.wav"]
    assert str(manifest.path(1)) == "/b c.wav"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"path": "b.wav"', "not JSON"),
        ('["b.wav"]', "expected an object"),
        ('{"samples": 3}', '"path" must be a file name'),
        ('{"path": ""}', '"path" must be a file name'),
        ('{"path": "b.wav", "samples": -1}', '"samples" must be a whole number'),
        ('{"path": "b.wav", "samples": 1.5}', '"samples" must be a whole number'),
        ('{"path": "b.wav", "sample_rate": 0}', '"sample_rate" must be a whole number'),
        ('{"path": "b.wav", "sample_rate": true}', '"sample_rate" must be a whole number'),
        ('{"path": "b.wav", "labels": [1]}', '"labels" must be a list of strings'),
        ('{"path": "b.wav", "embedding": "0"}', '"embedding" must be a whole number'),
        ('{"path": "b.wav", "lables": ["dog"]}', "did you mean 'labels'"),
        (HEADER, "second header"),
    ],
)
def test_broken_jsonl_line_is_named(tmp_path, line, words):
    path = put(tmp_path / "m.jsonl", lines(HEADER, {"path": "a.wav"}, line))
    with pytest.raises(ManifestError, match=rf"m\.jsonl:3: .*{re.escape(words)}"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": "other", "version": 1}, "'other'"),
        ({"format": "cat-audio manifest", "version": 2}, "version 2"),
        ({"format": "cat-audio manifest", "version": 1, "embedings": "e.npy"}, "did you mean 'embeddings'"),
        ({"format": "cat-audio manifest", "version": 1, "embeddings": 3}, "embeddings must be str"),
    ],
)
def test_bad_header(tmp_path, header, words):
    with pytest.raises(ManifestError, match=rf"m\.jsonl:1: .*{re.escape(words)}"):
        load_manifest(put(tmp_path / "m.jsonl", lines(header, {"path": "a.wav"})))


def test_rows_without_an_embeddings_file(tmp_path):
    with pytest.raises(ManifestError, match=r"a\.wav has an embedding row, but the header names no embeddings"):
        load_manifest(put(tmp_path / "m.jsonl", lines(HEADER, {"path": "a.wav", "embedding": 0})))


def test_not_text(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"path": "a.wav"}\n\xff\xfe')
    with pytest.raises(ManifestError, match=r"m\.jsonl:2: not UTF-8"):
        load_manifest(tmp_path / "m.jsonl")


def test_no_path_is_not_the_current_folder():
    with pytest.raises(ManifestError, match="no data set given"):
        load_manifest("")


@pytest.mark.parametrize(("name", "words"), [("none.jsonl", "no such file"), ("m.csv", r"\.jsonl, \.tsv, \.json")])
def test_wrong_path(tmp_path, name, words):
    put(tmp_path / "m.csv", "a,b")
    with pytest.raises(ManifestError, match=words):
        load_manifest(tmp_path / name)


@pytest.mark.parametrize("text", ["", "\n\n", HEADER])
def test_empty_jsonl(tmp_path, text):
    with pytest.raises(ManifestError, match="no clips"):
        load_manifest(put(tmp_path / "m.jsonl", text))


# --- released layouts ------------------------------------------------------------------------------------------------


def test_tsv_with_labels(tmp_path):
    (tmp_path / "audio").mkdir()
    put(tmp_path / "train.tsv", "audio\nYabc.wav\t160000\nbed/0 1.wav\t16000\n")
    put(tmp_path / "train.lbl", "Yabc /m/04rlf,/m/09x0r\n01.wav\t/m/0jbk\n".replace("01.wav", "0_1"))
    with pytest.raises(ManifestError, match=r"train\.lbl:2: labels of '0_1', but that clip .* is 'bed/0 1\.wav'"):
        load_manifest(tmp_path / "train.tsv")
    put(tmp_path / "train.tsv", "audio\nYabc.wav\t160000\nbed/01.wav\t16000\n")
    put(tmp_path / "train.lbl", "Yabc /m/04rlf,/m/09x0r\n01.wav\t/m/0jbk\n")
    put(tmp_path / "label_descriptors.csv", '1,/m/04rlf,"Music"\n2,/m/09x0r,"Speech, any"\n0,/m/0jbk,"Animal"\n')
    manifest = load_manifest(tmp_path / "train.tsv")
    assert manifest.clips[0] == Clip("Yabc.wav", 160000, None, ("/m/04rlf", "/m/09x0r"))
    assert manifest.clips[1].labels == ("/m/0jbk",)
    assert manifest.path(1) == tmp_path / "audio/bed/01.wav"
    assert manifest.classes == ("/m/0jbk", "/m/04rlf", "/m/09x0r")  # in the order of the descriptors
    assert manifest.label_names["/m/09x0r"] == "Speech, any"


@pytest.mark.parametrize("line", ["a.wav", "a.wav\tx", "a.wav\t-3", "a.wav\t3\t4", "\t3"])
def test_broken_tsv_line_is_named(tmp_path, line):
    path = put(tmp_path / "m.tsv", f"{tmp_path}\nb.wav\t100\n{line}\n")
    with pytest.raises(ManifestError, match=r"m\.tsv:3: expected 'path<TAB>samples'"):
        load_manifest(path)


def test_tsv_root(tmp_path):
    with pytest.raises(ManifestError, match=r"m\.tsv:1: .*/nowhere does not exist; edit it"):
        load_manifest(put(tmp_path / "m.tsv", "/nowhere\na.wav\t100\n"))
    with pytest.raises(ManifestError, match="empty; the first line"):
        load_manifest(put(tmp_path / "m.tsv", ""))
    with pytest.raises(ManifestError, match="HDF5"):
        load_manifest(put(tmp_path / "m.tsv", f"{tmp_path}\n1.h5/a.wav\t100\n"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [("a x\n", r"m\.lbl: 1 lines for the 2 clips"), ("a x\nb\n", r"m\.lbl:2: expected 'name label,label'")],
)
def test_labels_that_do_not_fit(tmp_path, labels, words):
    put(tmp_path / "m.tsv", f"{tmp_path}\na.wav\t1\nb.wav\t1\n")
    put(tmp_path / "m.lbl", labels)
    with pytest.raises(ManifestError, match=words):
        load_manifest(tmp_path / "m.tsv")


def test_released_cat_json(tmp_path):
    entries = [
        {"wav_path": "/d/a.wav", "clap_path": "/e/a.npy", "mel_path": "/m/a.npy", "num_frame": 160000},
        {"wav_path": "b.wav", "clap_path": "b.npy", "num_frame": 150000},
    ]
    manifest = load_manifest(put(tmp_path / "train.json", json.dumps(entries)))
    assert manifest.clips == (Clip("/d/a.wav", 160000, embedding=0), Clip("b.wav", 150000, embedding=1))
    assert [str(file) for file in manifest.embedding_files] == ["/e/a.npy", str(tmp_path / "b.npy")]


def test_ast_json(tmp_path):
    entries = {"data": [{"wav": "/d/a.flac", "labels": "/m/1,/m/2"}, {"wav": "b.flac", "labels": "/m/3"}]}
    manifest = load_manifest(put(tmp_path / "eval.json", json.dumps(entries)))
    assert [clip.labels for clip in manifest.clips] == [("/m/1", "/m/2"), ("/m/3",)]
    assert manifest.embedding_files is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n{"wav": "a.wav"},\n]', r"m\.json:3: not JSON"),
        ("{}", "expected a list"),
        ('[{"wav": "a.wav"}, {"file": "b.wav"}]', "entry 2: expected an object"),
        ('[{"wav": "a.wav"}, 7]', "entry 2: expected an object"),
        ('[{"wav": "a.wav", "num_frame": "7"}]', 'entry 1: "num_frame"'),
        ('[{"wav": "a.wav", "labels": ["x"]}]', 'entry 1: "labels"'),
        ('[{"wav": "a.wav", "clap_path": "a.npy"}, {"wav": "b.wav"}]', "1 of 2 entries"),
        ("[]", "no clips"),
    ],
)
def test_broken_json(tmp_path, text, words):
    with pytest.raises(ManifestError, match=words):
        load_manifest(put(tmp_path / "m.json", text))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_written_manifest_reads_back_from_another_folder(tmp_path):
    clips = (Clip("x/a.wav", 100, 8000, ("ä", "b"), 1), Clip(str(tmp_path / "b.wav"), embedding=0))
    manifest = Manifest(clips, tmp_path / "audio", tmp_path / "e.npy", "f", label_names={"ä": "A"})
    write_manifest(manifest, tmp_path / "lists" / "m.jsonl")
    read = load_manifest(tmp_path / "lists" / "m.jsonl")
    assert [read.path(i).resolve() for i in range(2)] == [tmp_path / "audio/x/a.wav", tmp_path / "b.wav"]
    assert read.clips[0].path == "../audio/x/a.wav"
    assert [(c.samples, c.sample_rate, c.labels, c.embedding) for c in read.clips] == [
        (100, 8000, ("ä", "b"), 1),
        (None, None, (), 0),
    ]
    assert read.embeddings.resolve() == tmp_path / "e.npy"
    assert (read.embeddings_fingerprint, read.label_names) == ("f", {"ä": "A"})


def test_failed_write_leaves_the_old_file(tmp_path):
    path = put(tmp_path / "m.jsonl", "old")
    with pytest.raises(TypeError):
        write_manifest(Manifest((Clip("a.wav", labels=(object(),)),), tmp_path), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_per_clip_embeddings_must_be_gathered_first(tmp_path):
    manifest = Manifest((Clip("a.wav", embedding=0),), tmp_path, embedding_files=(tmp_path / "a.npy",))
    with pytest.raises(ManifestError, match="gather_embeddings"):
        write_manifest(manifest, tmp_path / "m.jsonl")


def test_fingerprint_is_that_of_the_list_of_paths():
    first = Manifest((Clip("a.wav"), Clip("b.wav")), "/x")
    assert (
        first.fingerprint == Manifest((Clip("a.wav", labels=("l",), embedding=3), Clip("b.wav", 7)), "/y").fingerprint
    )
    assert first.fingerprint != Manifest((Clip("b.wav"), Clip("a.wav")), "/x").fingerprint
    assert first.fingerprint != Manifest((Clip("a.wav"),), "/x").fingerprint
