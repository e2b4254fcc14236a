"""Public data sets, on look-alikes: official splits, counts that are checked, nothing of the user's touched."""

import csv
import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from cat.commands import main
from cat.data import ManifestError, load_manifest
from cat.data.labels import labels_of
from cat.data.sets import SETS, prepare
from cat.data.sets.archives import ArchiveError
from cat.data.splits import fold_split
from cat.outputs import OutputError


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_csv(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# --- ESC -------------------------------------------------------------------------------------------------------------


ESC_COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    """2,000 clips in 50 classes and 5 folds, of which 10 classes are ESC-10's."""
    root = tmp_path_factory.mktemp("esc") / "ESC-50-master"
    rows = []
    for target in range(50):
        for number in range(40):
            fold = 1 + number % 5
            name = f"{fold}-{target * 40 + number}-A-{target}.wav"
            rows.append((name, fold, target, f"sound_{49 - target}", str(target % 5 == 0), 100 + number, "A"))
            touch(root / "audio" / name)
    write_csv(root / "meta/esc50.csv", ESC_COLUMNS, *rows)
    return root


def test_esc50(esc50, tmp_path):
    before = content(esc50)
    prepared = prepare(SETS["esc50"], esc50, tmp_path / "out")
    assert list(prepared.manifests) == [tmp_path / "out/esc50.jsonl"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["esc50.jsonl"]  # of a folder nothing is copied
    manifest = load_manifest(tmp_path / "out/esc50.jsonl")
    assert manifest.path(0).samefile(esc50 / "audio/1-0-A-0.wav")
    assert manifest.clips[0].extra == {"fold": 1, "source": "100"}
    assert Counter(label for clip in manifest.clips for label in clip.labels) == {f"sound_{i}": 40 for i in range(50)}
    labels = labels_of(manifest)
    assert labels.classes[:2] == ("sound_49", "sound_48")  # by target
    assert labels.class_names[0] == "sound 49"
    assert [len(split) for split in fold_split(manifest, 5)] == [1600, 400]
    assert manifest.extra == {"dataset": "esc50", "licence": "CC BY-NC 3.0"}
    assert content(esc50) == before


def test_esc10_is_a_part_of_it(esc50, tmp_path):
    prepare(SETS["esc10"], esc50, tmp_path)
    manifest = load_manifest(tmp_path / "esc10.jsonl")
    assert len(manifest) == 400
    assert Counter(clip.extra["fold"] for clip in manifest.clips) == dict.fromkeys(range(1, 6), 80)
    assert labels_of(manifest).classes == tuple(f"sound_{49 - target}" for target in range(0, 50, 5))


def test_esc10_as_it_was_published_alone(tmp_path):
    root = tmp_path / "ESC-10-master"
    for number in range(1, 11):
        name = "Dog bark" if number == 1 else f"Sound {number}"
        for take in range(40):
            touch(root / f"{number:03d} - {name}" / f"{1 + take % 5}-{number}{take:02d}-A.ogg")
    touch(root / "README.md")
    prepare(SETS["esc10"], root, tmp_path / "out")
    manifest = load_manifest(tmp_path / "out/esc10.jsonl")
    assert len(manifest) == 400
    assert manifest.clips[0].labels == ("dog_bark",)
    assert manifest.clips[0].extra == {"fold": 1, "source": "100"}
    assert labels_of(manifest).class_names[:2] == ("dog bark", "sound 2")


def test_clips_that_are_missing_are_named(esc50, tmp_path):
    root = tmp_path / "ESC-50-master"
    shutil.copytree(esc50, root, copy_function=os.link)
    for name in ("1-0-A-0.wav", "1-5-A-0.wav"):
        (root / "audio" / name).unlink()
    words = r"esc50 lacks 2 of 2000 clips: audio/1-0-A-0\.wav, audio/1-5-A-0\.wav\. Get them .*--allow-missing 2"
    with pytest.raises(ManifestError, match=words):
        prepare(SETS["esc50"], root, tmp_path / "out", allow_missing=1)
    assert not (tmp_path / "out").exists()
    prepared = prepare(SETS["esc50"], root, tmp_path / "out", allow_missing=2)
    assert prepared.notes == ("esc50 lacks 2 of 2000 clips: audio/1-0-A-0.wav, audio/1-5-A-0.wav",)
    assert len(load_manifest(tmp_path / "out/esc50.jsonl")) == 1998


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([("filename", "fold")], r"its columns are \['filename', 'fold'\]; expected filename, fold, target"),
        (
            [ESC_COLUMNS, ("a.wav", "x", "0", "dog", "True", "1", "A")],
            "fold 'x'",
        ),
        ([ESC_COLUMNS], "esc50 lacks 2000 of 2000 clips"),
    ],
)
def test_a_table_that_is_another(tmp_path, table, words):
    write_csv(tmp_path / "in/meta/esc50.csv", *table)
    with pytest.raises(ManifestError, match=words):
        prepare(SETS["esc50"], tmp_path / "in", tmp_path / "out", allow_missing=10_000)


# --- Speech Commands -------------------------------------------------------------------------------------------------


def test_speech_commands(tmp_path):
    root = tmp_path / "in"
    for word in ("yes", "no", "_background_noise_"):
        for speaker in range(10):
            touch(root / word / f"{speaker:08x}_nohash_0.wav")
    (root / "validation_list.txt").write_text("yes/00000001_nohash_0.wav\nno/00000001_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("".join(f"no/0000000{i}_nohash_0.wav\n" for i in (2, 3, 4)))
    small = dataclasses.replace(SETS["speechcommands"], counts={"train": 15, "valid": 2, "test": 3, "trainvalid": 17})
    prepare(small, root, tmp_path / "out")
    found = {name: load_manifest(tmp_path / f"out/{name}.jsonl") for name in ("train", "valid", "test", "trainvalid")}
    assert {name: len(manifest) for name, manifest in found.items()} == dict(small.counts)
    paths = {
        name: {manifest.path(i).name + clip.labels[0] for i, clip in enumerate(manifest.clips)}
        for name, manifest in found.items()
    }
    assert paths["trainvalid"] == paths["train"] | paths["valid"]
    assert not paths["test"] & paths["trainvalid"]
    assert labels_of(found["train"]).classes == ("no", "yes")
    assert found["train"].clips[0].extra == {"speaker": "00000000"}
    (root / "no/00000002_nohash_0.wav").unlink()
    with pytest.raises(ManifestError, match=r"test lacks 1 of 3 clips: no/00000002_nohash_0\.wav"):
        prepare(small, root, tmp_path / "out")
    touch(root / "no/ffffffff_nohash_1.wav")
    with pytest.raises(ManifestError, match="train has 16 clips; Speech Commands v2 has 15"):
        prepare(small, root, tmp_path / "out", allow_missing=1)
    (root / "testing_list.txt").unlink()
    with pytest.raises(ManifestError, match=r"testing_list\.txt: cannot be read"):
        prepare(small, root, tmp_path / "out")


def test_counts_of_speech_commands_are_the_published_ones():
    counts = SETS["speechcommands"].counts
    assert counts["train"] + counts["valid"] == counts["trainvalid"] == 94_824
    assert counts["trainvalid"] + counts["test"] == 105_829


# --- spoken digits ---------------------------------------------------------------------------------------------------


DIGITS = dataclasses.replace(SETS["fsdd"], counts={"train": 900, "test": 100, "speakers": 1000})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "free-spoken-digit-dataset-master"
    for speaker in ("george", "theo"):
        for digit in range(10):
            for take in range(50):
                touch(root / "recordings" / f"{digit}_{speaker}_{take}.wav")
    touch(root / "recordings/readme.txt")
    return root


def test_spoken_digits(digits, tmp_path):
    prepare(DIGITS, digits, tmp_path)
    train, test, speakers = (load_manifest(tmp_path / f"{name}.jsonl") for name in ("train", "test", "speakers"))
    assert {int(clip.path.rpartition("_")[2][:-4]) for clip in test.clips} == set(range(5))
    assert {int(clip.path.rpartition("_")[2][:-4]) for clip in train.clips} == set(range(5, 50))
    assert (len(train), len(test), len(speakers)) == (900, 100, 1000)
    assert labels_of(train).classes[:3] == ("zero", "one", "two")
    prepare(DIGITS, digits / "recordings", tmp_path / "again")
    assert len(load_manifest(tmp_path / "again/train.jsonl")) == 900
    rest, george = fold_split(speakers, 1)
    assert {clip.extra["speaker"] for clip in george.clips} == {"george"}
    assert len(rest) == 500


def test_a_digit_that_is_missing(digits, tmp_path):
    root = tmp_path / "in"
    shutil.copytree(digits, root, copy_function=os.link)
    (root / "recordings/3_theo_7.wav").unlink()
    with pytest.raises(ManifestError, match=r"train lacks 1 of 900 clips: recordings/3_theo_7\.wav"):
        prepare(DIGITS, root, tmp_path / "out")
    shutil.rmtree(root)
    for i in range(5):
        touch(root / f"recordings/0_theo_{i}.wav")
    with pytest.raises(ManifestError, match="train lacks 900 of 900 clips"):
        prepare(DIGITS, root, tmp_path / "out", allow_missing=3000)


# --- AudioSet --------------------------------------------------------------------------------------------------------

NAMES = {"/m/dog": "Dog", "/m/cow": "Cow, moo", "/m/cat": "Cat", "/m/owl": "Owl"}
SEGMENTS = {
    "balanced_train": ["--4gqARaEJE", "-0RWZT-miFs", "YabcdefghiJ"],
    "unbalanced_train": ["aaaaaaaaaaa", "bbbbbbbbbbb"],
    "eval": ["ccccccccccc", "ddddddddddd"],
}
AUDIO = (
    "a/--4gqARaEJE.wav",
    "b/Y-0RWZT-miFs.flac",
    "YabcdefghiJ_30.000_40.000.wav",
    "aaaaaaaaaaa_30.wav",
    "bbbbbbbbbbb_30000.wav",
    "ccccccccccc_30000_40000.ogg",
    "ddddddddddd.wav",
    "eeeeeeeeeee.wav",
    "other.wav",
)


def audioset(root: Path, lists=tuple(SEGMENTS)) -> Path:
    write_csv(
        root / "csv/class_labels_indices.csv",
        ("index", "mid", "display_name"),
        *((i, *pair) for i, pair in enumerate(NAMES.items())),
    )
    for name in lists:
        text = "# Segments csv created\n# num_ytids=3\n# YTID, start_seconds, end_seconds, positive_labels\n"
        text += "".join(f'{video}, 30.000, 40.000, "/m/cow,/m/dog"\n' for video in SEGMENTS[name])
        (root / f"csv/{name}_segments.csv").write_text(text)
    for name in AUDIO:
        touch(root / "audio" / name)
    return root


SMALL = dataclasses.replace(SETS["audioset"], counts={"train": 3, "test": 2, "train2m": 5})


def test_audioset(tmp_path):
    prepare(SMALL, audioset(tmp_path / "in"), tmp_path / "out")
    found = {name: load_manifest(tmp_path / f"out/{name}.jsonl") for name in ("train", "test", "train2m")}
    names = {name: [manifest.path(i).name for i in range(len(manifest))] for name, manifest in found.items()}
    audio = [Path(name).name for name in AUDIO]
    assert names == {"train": audio[:3], "test": audio[5:7], "train2m": audio[:5]}
    assert found["train"].clips[0].labels == ("/m/cow", "/m/dog")
    labels = labels_of(found["train"])
    assert (labels.kind, labels.classes, labels.class_names) == (
        "multi-label",
        ("/m/dog", "/m/cow"),
        ("Dog", "Cow, moo"),
    )


def test_audioset_without_the_large_list(tmp_path):
    prepare(SMALL, audioset(tmp_path / "in", ("balanced_train", "eval")), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]
    with pytest.raises(ManifestError, match=r"eval_segments\.csv: no such file; it belongs beside class_labels_indi"):
        prepare(SMALL, audioset(tmp_path / "other", ("balanced_train",)), tmp_path / "out")


def test_clips_that_have_gone_from_youtube(tmp_path):
    root = audioset(tmp_path / "in")
    (root / "audio/a/--4gqARaEJE.wav").unlink()
    with pytest.raises(ManifestError, match=r"train lacks 1 of 3 clips: --4gqARaEJE from 30\.000 s\. .*-missing 1"):
        prepare(SMALL, root, tmp_path / "out")
    prepared = prepare(SMALL, root, tmp_path / "out", allow_missing=1)
    assert [note.split(":")[0] for note in prepared.notes] == ["train lacks 1 of 3 clips", "train2m lacks 1 of 5 clips"]
    assert len(load_manifest(tmp_path / "out/train.jsonl")) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--4gqARaEJE, 0, 10", r"eval_segments\.csv:4: expected YTID, start_seconds, end_seconds, positive_labels"),
        ('--4gqARaEJE, 0, 10, "/m/fox"', r"eval_segments\.csv:4: the label '/m/fox' is not in class_labels_indices"),
    ],
)
def test_a_line_that_is_no_segment(tmp_path, line, words):
    root = audioset(tmp_path / "in")
    table = root / "csv/eval_segments.csv"
    table.write_text("\n".join([*lines_of(table)[:3], line]))
    with pytest.raises(ManifestError, match=words):
        prepare(SMALL, root, tmp_path / "out")


# --- what all have in common -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_folder_of_something_else(name, tmp_path):
    touch(tmp_path / "in/audio/a.wav")
    with pytest.raises(
        ManifestError, match=r"is not .*, for it has no .*; give its archive or its folder, from https:"
    ):
        prepare(SETS[name], tmp_path / "in", tmp_path / "out")
    with pytest.raises(ManifestError, match="no such file or folder; give the archive or the folder"):
        prepare(SETS[name], tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_is_unpacked_once(tmp_path):
    audioset(tmp_path / "in")
    archive = Path(shutil.make_archive(str(tmp_path / "audioset"), "zip", tmp_path, "in"))
    out = tmp_path / "out"
    manifests = prepare(SMALL, archive, out).manifests
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert load_manifest(out / "train.jsonl").path(0) == folder / "in/audio/a/--4gqARaEJE.wav"
    before = {path: path.stat().st_mtime_ns for path in [*folder.rglob("*"), *manifests]}
    prepare(SMALL, archive, out)
    assert before == {path: path.stat().st_mtime_ns for path in [*folder.rglob("*"), *manifests]}


def test_an_archive_of_something_else_leaves_nothing(tmp_path):
    touch(tmp_path / "in/digits/recordings/0_theo_0.wav")
    archive = Path(shutil.make_archive(str(tmp_path / "digits"), "gztar", tmp_path / "in", "digits"))
    with pytest.raises(ManifestError, match=r"digits\.tar\.gz: is not ESC-50"):
        prepare(SETS["esc50"], archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_manifests_of_other_content_stay(digits, tmp_path):
    out = tmp_path / "out"
    prepare(DIGITS, digits, out)
    edited = lines_of(out / "test.jsonl")[:-1]
    (out / "test.jsonl").write_text("\n".join(edited))
    (out / "mine.txt").write_text("mine")
    before = content(out)
    with pytest.raises(OutputError, match=r"test\.jsonl exists, .*another folder \(-o\), or --overwrite"):
        prepare(DIGITS, digits, out)
    assert content(out) == before
    prepare(DIGITS, digits, out, overwrite=True)
    assert len(load_manifest(out / "test.jsonl")) == 100
    assert (out / "mine.txt").read_text() == "mine"


def test_the_command(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SETS, "fsdd", DIGITS)
    assert main(["dataset", "fsdd", str(digits), "-o", str(tmp_path), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "licence: CC BY-SA 4.0" in told
    assert f"{tmp_path / 'train.jsonl'}: 900 clips, 10 classes" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["esc50"], "give either the archive or folder of ESC-50, or --download"),
        (["esc50", "x.zip", "--download"], "give either the archive or folder of ESC-50, or --download"),
        (["audioset", "--download"], "AudioSet has no archive that could be downloaded; get it from https://research"),
        (["esc50", "x.zip"], "x.zip: no such file or folder"),
    ],
)
def test_what_the_command_cannot_do(arguments, words, tmp_path, capsys):
    assert main(["dataset", *arguments, "-o", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_download_that_is_there_is_checked(tmp_path):
    (tmp_path / "speechcommands.tar.gz").write_bytes(b"half of it")
    with pytest.raises(ArchiveError, match=r"speechcommands\.tar\.gz: its SHA-256 is .*; expected af14739e.*Remove it"):
        prepare(SETS["speechcommands"], None, tmp_path)
