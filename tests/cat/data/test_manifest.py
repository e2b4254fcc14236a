"""Folders, released lists, our JSON Lines: what is read, and what every mistake in them says."""

import hashlib
import json
import os
import re
from pathlib import Path, PurePath

import pytest

from cat.data.manifest import Clip, Manifest, ManifestError, is_written, load_manifest, write_manifest

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
        ('{"path": "b.wav", "labels": ["dog", " "]}', "an empty label"),
        ('{"path": "b.wav", "labels": ""}', "an empty label"),
        ('{"path": "b.wav", "labels": 0}', '"labels" must be a list of strings, got 0; put numbers in quotes'),
        ('{"path": "b.wav", "path": "c.wav"}', "the key 'path' occurs twice in the object {'path': 'b.wav', "),
        ('{"path": "b.wav", "mine": {"a": 1, "a": 2}}', "the key 'a' occurs twice"),
        ('{"path": "b.wav", "gain": NaN}', "NaN is not JSON; write null"),
        ('{"path": "b.wav", "gain": 1e999}', "the number '1e999' is too large"),
        ('{"path": "b.wav", "samples": 1' + 5000 * "0" + "}", "digits"),
        ('{"path": "b.wav", "samples": 1' + 30 * "0" + "}", '"samples" must be a whole number'),
        ('{"path": "b.wav", "mine": ' + 100_000 * "[" + 100_000 * "]" + "}", "nested too deeply"),
        ('{"path": {"x": ' + 400_000 * "7" + "}}", "digits"),
        ('{"path": ["' + 400_000 * "7" + '"]}', '"path" must be a file name'),
        ('{"path": "a\\u0000.wav"}', "NUL character, which no file name can have"),
        ('{"path": "a\\ud83d.wav"}', "half a surrogate pair"),
        ('{"path": "file:///data/b.wav"}', "is a URL, 'file:///data/b.wav'; give the path of a local file"),
        ('{"path": "~/b.wav"}', "write the home folder out"),
        ('{"path": "dog\\\\b.wav"}', "a path of Windows"),
        ('{"path": "C:/b.wav"}', "a path of Windows"),
        (HEADER, "second header"),
    ],
)
def test_broken_jsonl_line_is_named(tmp_path, line, words):
    path = put(tmp_path / "m.jsonl", lines(HEADER, {"path": "a.wav"}, line))
    with pytest.raises(ManifestError, match=rf"m\.jsonl:3: .*{re.escape(words)}") as error:
        load_manifest(path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": "cat-audio manifest", "version": True}, "version True"),
        ({"format": "cat-audio manifest", "version": 1, "label_names": {"a": 3}}, "label_names['a'] must be a string"),
        ({"format": "cat-audio manifest", "version": 1, "embeddings": "~/e.npy"}, "write the home folder out"),
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


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.json", '{"path": "a.wav"}\n{"path": "b.wav"}\n', r"m\.json:2: not JSON .*Name it \.jsonl"),
        ("m.jsonl", '[\n{"wav": "a.wav"}\n]\n', r"m\.jsonl:1: not JSON .*Name it \.json$"),
    ],
)
def test_one_kind_of_list_under_the_other_s_name(tmp_path, name, text, words):
    with pytest.raises(ManifestError, match=words):
        load_manifest(put(tmp_path / name, text))


@pytest.mark.parametrize("name", ["m.jsonl", "m.tsv", "m.json"])
def test_not_text(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"path": "a.wav"}\n\xff\xfe')
    with pytest.raises(ManifestError, match=rf"{re.escape(name)}:2: not UTF-8 text; save it as UTF-8"):
        load_manifest(tmp_path / name)
    for encoding in ("utf-16", "utf-16-le"):
        (tmp_path / name).write_bytes(lines({"path": "a.wav"}).encode(encoding))
        with pytest.raises(ManifestError, match=rf"{re.escape(name)}:1: .*save it as UTF-8"):
            load_manifest(tmp_path / name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks(tmp_path, start, end):
    texts = {
        "m.jsonl": lines(HEADER, {"path": "a.wav", "labels": ["dog"]}),
        "m.tsv": ".\na.wav\t7\n",
        "m.lbl": "a dog\n",
        "label_descriptors.csv": "0,dog,Dog\n",
        "n.json": '[\n{"wav": "a.wav", "labels": "dog"}\n]\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes((start + text.replace("\n", end)).encode())
    for name in ("m.jsonl", "m.tsv", "n.json"):
        assert [(clip.path, clip.labels) for clip in load_manifest(tmp_path / name).clips] == [("a.wav", ("dog",))]
    assert load_manifest(tmp_path / "m.tsv").label_names == {"dog": "Dog"}


def test_labels_are_stripped_composed_and_once_a_clip(tmp_path):
    header = {"format": "cat-audio manifest", "version": 1, "label_names": {" dog ": "Dog"}}
    entries = [{"path": "a", "labels": [" dog", "dog ", "cafe\u0301"]}, {"path": "b", "labels": "dog, cat "}]
    manifest = load_manifest(put(tmp_path / "m.jsonl", lines(header, *entries)))
    assert [clip.labels for clip in manifest.clips] == [("dog", "caf\u00e9"), ("dog, cat",)]
    assert manifest.classes == ("dog", "caf\u00e9", "dog, cat")


def test_own_fields_named_as_the_header_s_are_own_fields(tmp_path):
    manifest = load_manifest(put(tmp_path / "m.jsonl", lines({"path": "a.wav", "format": "wav", "version": 3})))
    assert manifest.clips[0].extra == {"format": "wav", "version": 3}


def test_odd_paths_that_are_there_are_taken(tmp_path):
    for name in ("~/a.wav", "x\\y.wav", "s3:/b.wav"):
        put(tmp_path / name, "")
    manifest = load_manifest(
        put(tmp_path / "m.jsonl", lines(*({"path": p} for p in ("~/a.wav", "x\\y.wav", "s3://b.wav"))))
    )
    assert all(manifest.path(i).exists() for i in range(3))


def test_no_path_is_not_the_current_folder():
    with pytest.raises(ManifestError, match="no data set given"):
        load_manifest("")


@pytest.mark.parametrize(("name", "words"), [("none.jsonl", "no such file"), ("m.csv", r"\.jsonl, \.tsv, \.json")])
def test_wrong_path(tmp_path, name, words):
    put(tmp_path / "m.csv", "a,b")
    with pytest.raises(ManifestError, match=words):
        load_manifest(tmp_path / name)


def test_a_path_that_the_system_refuses_or_that_would_block(tmp_path, monkeypatch):
    with pytest.raises(ManifestError, match=r"xxx\.\.\.': File name too long"):
        load_manifest(300 * "x" + ".jsonl")
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(ManifestError, match="not a regular file"):
        load_manifest(tmp_path / "m.jsonl")
    monkeypatch.setenv("HOME", str(put(tmp_path / "data" / "m.jsonl", lines({"path": "a.wav"})).parent))
    assert len(load_manifest("~/m.jsonl")) == 1


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
    ("row", "name"),
    [
        ('1,x,"Dog, bark"', "Dog, bark"),
        ("1,x,Dog, bark", "Dog, bark"),
        ('1, x, "a ""dog"""', 'a "dog"'),
        ("1,x", "x"),
        ('index,mid,name\n1,x,"Dog"', "Dog"),
    ],
)
def test_label_descriptors(tmp_path, row, name):
    put(tmp_path / "m.tsv", ".\na 1.wav\t1\n")
    put(tmp_path / "m.lbl", "a 1\tx, y\n")
    put(tmp_path / "label_descriptors.csv", row)
    manifest = load_manifest(tmp_path / "m.tsv")
    assert manifest.label_names == {"x": name}
    assert manifest.clips[0].labels == ("x", "y")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0,x,X\n0,y,Y", "index 0 or label 'y' occurs a second time"),
        ("0,x,X\n1,x,Y", "index 1 or label 'x' occurs a second time"),
        ("0,x,X\n1, ,Y", "an empty label"),
        ("0,x,X\nmid", "expected 'index,label,name'"),
        ('0,x,X\n1,y,"Y', "expected 'index,label"),
    ],
)
def test_broken_label_descriptors(tmp_path, rows, words):
    put(tmp_path / "m.tsv", ".\na.wav\t1\n")
    put(tmp_path / "m.lbl", "a x\n")
    put(tmp_path / "label_descriptors.csv", rows)
    with pytest.raises(ManifestError, match=rf"label_descriptors\.csv:2: .*{words}"):
        load_manifest(tmp_path / "m.tsv")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("a x,\nb y", r"m\.lbl:1: an empty label"),
        ("a x\n", r"m\.lbl: 1 lines for the 2 clips"),
        ("a x\nb\n", r"m\.lbl:2: expected 'name label,label'"),
    ],
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


def test_comma_separated_labels_and_own_fields_of_a_released_list(tmp_path):
    entries = [{"wav": "a.wav", "labels": "dog, cat", "mine": [1, None]}, {"wav": "b.wav", "labels": "", "path": "x"}]
    manifest = load_manifest(put(tmp_path / "m.json", json.dumps({"data": entries})))
    assert [(clip.labels, clip.extra) for clip in manifest.clips] == [(("dog", "cat"), {"mine": [1, None]}), ((), {})]
    assert manifest.notes[0].startswith(f"{tmp_path / 'm.json'}: the field 'path' of 1 entries goes into no manifest")
    write_manifest(manifest, tmp_path / "m.jsonl")
    assert load_manifest(tmp_path / "m.jsonl").clips[0].extra == {"mine": [1, None]}


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
        ('[{"wav": "a.wav", "labels": 3}]', 'entry 1: "labels"'),
        ('[{"wav": "a.wav", "labels": "dog,,cat"}]', "entry 1: an empty label"),
        ('[{"wav": "a.wav", "num_frame": true}]', 'entry 1: "num_frame"'),
        ('[{"wav": "a.wav"}, {"wav": "a.wav", "clap_path": 3}]', 'entry 2: "clap_path" must be a file name, got 3'),
        ('[{"wav": 3}]', "entry 1: expected an object"),
        ('[{"wav": "http://x/a.wav"}]', "entry 1: .* is a URL"),
        ('[{"wav": "a.wav", "label": "dog"}]', "entry 1: unknown field 'label'; did you mean 'labels'"),
        ('[{"wav": "a.wav", "wav": "b.wav"}]', "m.json: the key 'wav' occurs twice in the object {'wav': 'a.wav'"),
        ('[{"wav": "a.wav", "gain": -Infinity}]', "m.json: -Infinity is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "m.json: nested too deeply"),
        ("", "not JSON"),
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


def test_fields_of_the_user_survive_reading_and_writing(tmp_path):
    own = {"speaker": "s\u00e4", "start_s": 0.1, "odd": "\ud83d", "deep": [{"a": None, "b": [True, 10**30]}]}
    header = {"format": "cat-audio manifest", "version": 1, "licence": {"name": "CC0"}}
    entries = [{"path": "a.wav", "labels": ["dog"], **own}, {"path": "b.wav", "x": None}]
    write_manifest(load_manifest(put(tmp_path / "m.jsonl", lines(header, *entries))), tmp_path / "n.jsonl")
    assert [json.loads(line) for line in (tmp_path / "n.jsonl").read_text().splitlines()] == [header, *entries]


def test_links_among_folders_are_resolved_in_written_paths(tmp_path):
    put(tmp_path / "real" / "deep" / "dog" / "0.wav", "")
    (tmp_path / "real" / "deep" / "dog" / "1.wav").symlink_to("0.wav")
    (tmp_path / "link").symlink_to("real/deep")
    (tmp_path / "out").symlink_to("real")
    clips = (Clip("dog/0.wav"), Clip("dog/1.wav"), Clip("../deep/dog/0.wav"))
    write_manifest(Manifest(clips, tmp_path / "link"), tmp_path / "out" / "m.jsonl")
    read = load_manifest(tmp_path / "out" / "m.jsonl")
    assert [clip.path for clip in read.clips] == ["deep/dog/0.wav", "deep/dog/1.wav", "deep/dog/0.wav"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = put(tmp_path / "m.jsonl", "old")
    with pytest.raises(TypeError):
        write_manifest(Manifest((Clip("a.wav"),), tmp_path, extra={"mine": object()}), path)
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


def test_fingerprint_is_what_it_always_was():
    """It is in checkpoints and beside embeddings."""
    paths = ["a.wav", "./b.wav", "x//y.wav", "x/./y.wav", "x/", "\u00e4/../b.wav", "/abs.wav", ".hidden/c.wav", "."]
    text = "".join(f"{Path(path).as_posix()}\n" for path in paths)
    assert Manifest([Clip(path) for path in paths], "/x").fingerprint == hashlib.sha256(text.encode()).hexdigest()
    other = [Clip(os.fsdecode(bytes([byte]))) for byte in (0xE8, 0xE9)]
    assert Manifest(other[:1], "/x").fingerprint != Manifest(other[1:], "/x").fingerprint


def test_identity_knows_the_clips_and_their_rows():
    first = Manifest((Clip("a.wav", embedding=0), Clip("b.wav", embedding=1)), "/x", embeddings="/e.npy")
    swapped = Manifest((Clip("a.wav", embedding=1), Clip("b.wav", embedding=0)), "/x", embeddings="/e.npy")
    assert first.identity == Manifest(tuple(first.clips), "/y", embeddings="/f.npy").identity
    assert first.identity != swapped.identity
    assert first.fingerprint == swapped.fingerprint
    assert json.loads(json.dumps(first.identity)) == first.identity


def test_a_manifest_that_is_written_already(tmp_path):
    manifest = Manifest([Clip("a.wav", labels=("dog",)), Clip("b.wav", negative=True)], tmp_path)
    path = tmp_path / "a.jsonl"
    write_manifest(manifest, path)
    assert is_written(manifest, path)
    lines = path.read_bytes().splitlines(keepends=True)
    for other in (lines[:-1], [*lines, b"\n"], [*lines[:-1], lines[-1][:-1]], []):
        path.write_bytes(b"".join(other))
        assert not is_written(manifest, path)


@pytest.mark.parametrize("odd", [None, "./a.wav", "a//b.wav", "a/./b.wav", "b/", "../c.wav", "a\nb.wav", ".hidden.wav"])
def test_the_fingerprint_is_that_of_the_paths_line_by_line(odd, monkeypatch):
    """As checkpoints and embeddings of every version have it, however fast it is found."""
    paths = [f"folder/{i}.wav" for i in range(70_000)] if odd is None else ["x/a.wav", odd, "/abs/é.wav"]
    expected = hashlib.sha256("".join(f"{PurePath(path).as_posix()}\n" for path in paths).encode()).hexdigest()
    assert Manifest(tuple(map(Clip, paths)), Path("/x")).fingerprint == expected
