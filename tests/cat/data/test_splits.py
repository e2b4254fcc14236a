"""Clips held out of training: every class on both sides, and nothing that belongs together on two."""

import os
import time

import numpy as np
import pytest

from cat.data import Clip, Manifest, ManifestError, splits
from cat.data.labels import labels_of
from cat.data.splits import fold_split, folds, hold_out


def manifest_of(labels, **fields):
    """A clip a label, with fields of the manifest's own; a field's value may be a list or a function of the number."""
    clips = [
        Clip(f"{i}.wav", labels=tuple(entry.split()), negative=not entry, extra={k: v[i] for k, v in fields.items()})
        for i, entry in enumerate(labels)
    ]
    return Manifest(clips, "/nowhere")


def held_out(manifest, share=0.2, seed=0, **options):
    labels = labels_of(manifest)
    train, valid = hold_out(manifest, labels, share, seed, **options)
    paths = [clip.path for split in (train, valid) for clip in split.clips]
    assert sorted(paths) == sorted(clip.path for clip in manifest.clips)
    return labels.counts(train), labels.counts(valid), train, valid


def test_a_share_of_every_class():
    labels = ["a"] * 100 + ["b"] * 20 + ["c"] * 7 + ["d"] * 2
    train, valid, *_ = held_out(manifest_of(labels))
    assert valid.tolist() == [20, 4, 1, 1]
    assert train.tolist() == [80, 16, 6, 1]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_every_class_of_two_clips_is_on_both_sides(share):
    train, valid, *_ = held_out(manifest_of(["a", "a", "b", "b", "b", "c"]), share)
    assert (valid[:2] > 0).all()
    assert (train > 0).all()
    assert valid[2] == 0


def test_several_labels_a_clip():
    random = np.random.default_rng(0)
    names = [f"c{i}" for i in range(12)]
    labels = [
        " ".join(random.choice(names, random.integers(0, 4), replace=False, p=np.arange(1, 13) / 78))
        for _ in range(600)
    ]
    manifest = manifest_of(labels)
    train, valid, _, held = held_out(manifest)
    assert (train > 0).all()
    share = valid / (train + valid)
    assert (share > 0.15).all()
    assert (share < 0.3).all()
    none = sum(not clip.labels for clip in held.clips) / labels.count("")
    assert 0.15 < none < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_inside_a_common_one(seed):
    labels = ["common rare"] * 10 + ["common"] * 90 + ["other"] * 50
    _, valid, *_ = held_out(manifest_of(labels), seed=seed)
    assert valid.tolist() == [20, 10, 2]


def test_it_is_a_function_of_the_seed():
    manifest = manifest_of(["a", "b"] * 20)
    paths = [[clip.path for clip in held_out(manifest, seed=seed)[3].clips] for seed in (0, 0, 1)]
    assert paths[0] == paths[1] != paths[2]
    assert paths[0] == sorted(paths[0], key=lambda path: int(path.split(".")[0]))


def test_groups_stay_together():
    speakers = [f"s{i % 5}" for i in range(60)]
    manifest = manifest_of(["a", "b", "c"] * 20, speaker=speakers)
    _, valid, train, held = held_out(manifest, group_by="speaker")
    sides = [{clip.extra["speaker"] for clip in split.clips} for split in (train, held)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 1
    assert valid.tolist() == [4, 4, 4]


def test_the_same_file_is_never_on_both_sides(tmp_path):
    """By the same name, a link, a hard link, or another way to write the path."""
    names = []
    for i in range(10):
        (tmp_path / f"{i}.wav").write_bytes(b"x")
        (tmp_path / f"link{i}.wav").symlink_to(f"{i}.wav")
        os.link(tmp_path / f"{i}.wav", tmp_path / f"hard{i}.wav")
        names += [f"{i}.wav", f"link{i}.wav", f"hard{i}.wav", f"./{i}.wav"]
    clips = [Clip(name, labels=("ab"[place // 4 % 2],)) for place, name in enumerate(names)]
    manifest = Manifest(clips, tmp_path)
    for seed in range(3):
        *_, train, valid = held_out(manifest, seed=seed)
        sides = [{os.stat(split.path(i)).st_ino for i in range(len(split))} for split in (train, valid)]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == 2


def test_files_of_a_slow_disk_are_asked_for_together(tmp_path, monkeypatch):
    """One after the other these take 1.5 seconds."""
    names = [f"{i % 500}.wav" for i in range(1500)]
    for name in set(names):
        (tmp_path / name).write_bytes(b"x")
    manifest = Manifest([Clip(name) for name in [*names, "none.wav"]], tmp_path)
    quick = splits._identities(manifest)
    stat = os.stat

    def slow(path):
        time.sleep(0.001)
        return stat(path)

    monkeypatch.setattr("cat.data.splits.os.stat", slow)
    begun = time.monotonic()
    assert splits._identities(manifest) == quick
    assert time.monotonic() - begun < 1.2
    assert len(set(quick)) == 501


def test_groups_that_have_a_file_in_common_are_one(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.wav").write_bytes(b"x")
    entries = [(0, "x"), (1, "x"), (1, "y"), (2, "y"), (2, "z"), (3, "v"), (4, "w"), (5, "u")]
    clips = [
        Clip(f"{file}.wav", labels=("ab"[i % 2],), extra={"speaker": who}) for i, (file, who) in enumerate(entries)
    ]
    manifest = Manifest(clips, tmp_path)
    for seed in range(6):
        *_, valid = held_out(manifest, seed=seed, group_by="speaker")
        speakers = {clip.extra["speaker"] for clip in valid.clips}
        assert {"x", "y", "z"}.issubset(speakers) or not {"x", "y", "z"} & speakers


def test_what_is_missing_is_said():
    *_, valid = held_out(manifest_of(["a", "a", "b"]), 0.5)
    assert valid.notes == (
        "1 of 3 clips of the manifest are held out to choose the model by",
        "none of them is of the classes b, which have too few clips to part",
    )


@pytest.mark.parametrize(
    ("manifest", "options", "words"),
    [
        (manifest_of(["a", "b"]), {}, r"no class has a second clip that could stay; .* \(data\.valid\)"),
        (manifest_of(["a", "b"] * 5, speaker=["x"] * 10), {"group_by": "speaker"}, "no class has a second 'speaker'"),
        (
            manifest_of(["a", "b"] * 5),
            {"group_by": "speaker"},
            '10 of 10 clips have no field "speaker", the first 0.wav',
        ),
    ],
)
def test_nothing_can_be_held_out(manifest, options, words):
    with pytest.raises(ManifestError, match=words):
        held_out(manifest, **options)


# --- folds -----------------------------------------------------------------------------------------------------------


def test_folds():
    manifest = manifest_of(["a", "b"] * 6, fold=[1, 1, 2, 2, 3, 3] * 2)
    assert folds(manifest).tolist() == [1, 1, 2, 2, 3, 3] * 2
    train, test = fold_split(manifest, 2)
    assert [clip.path for clip in test.clips] == ["2.wav", "3.wav", "8.wav", "9.wav"]
    assert [clip.extra["fold"] for clip in train.clips] == [1, 1, 3, 3] * 2
    with pytest.raises(ManifestError, match="there is no fold 4; its folds are 1, 2, 3"):
        fold_split(manifest, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, '2 of 2 clips have no field "fold", the first 0.wav'),
        ({"fold": [1, "2"]}, "the \"fold\" of 1.wav is '2'; expected a whole number"),
        ({"fold": [1, True]}, 'the "fold" of 1.wav is True'),
        ({"fold": [1, 1]}, "all clips are in fold 1; expected two folds or more"),
    ],
)
def test_folds_that_are_none(fields, words):
    with pytest.raises(ManifestError, match=words):
        folds(manifest_of(["a", "b"], **fields))


def test_a_file_in_two_folds(tmp_path):
    clips = [Clip("a.wav", labels=("a",), extra={"fold": 1}), Clip("./a.wav", labels=("b",), extra={"fold": 2})]
    with pytest.raises(ManifestError, match=r"a\.wav is the same file as a clip of another fold"):
        folds(Manifest(clips, tmp_path))
