"""Classes and targets, and every way in which labels can be wrong."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from cat.data import Clip, Manifest, ManifestError, load_manifest, write_manifest
from cat.data.labels import Labels, balancing_weights, clip_labels, intervals_of, labels_of, moved

PAIRS = Labels("multi-label", ("b", "a"), ("bee", "ay"))


def manifest_of(*labels, root="/data", **changes):
    """A clip for every item: its labels, or None for a clip that has no such field."""
    clips = [
        Clip(f"{i}.wav", labels=tuple(entry or ()), negative=entry is not None and not entry)
        for i, entry in enumerate(labels)
    ]
    return Manifest(clips, root, **changes)


def event(onset, offset, label):
    return {"onset": onset, "offset": offset, "label": label}


def test_a_single_label_a_clip():
    labels = labels_of(manifest_of("a", "b", "a"))
    assert labels == Labels("single-label", ("a", "b"), ("a", "b"))
    assert labels.targets(manifest_of("a", "b", "a"), [2, 1]).tolist() == [[1, 0], [0, 1]]


def test_several_labels_a_clip():
    manifest = manifest_of("a", "ba", "b")
    labels = labels_of(manifest)
    assert labels.kind == "multi-label"
    assert labels.targets(manifest, range(3)).tolist() == [[1, 0], [1, 1], [0, 1]]
    assert labels_of(manifest_of("a", "b"), "multi-label").kind == "multi-label"


def test_names_and_order_are_the_manifest_s():
    labels = labels_of(manifest_of("a", "b", label_names={"b": "bee", "a": "ay"}))
    assert (labels.classes, labels.class_names) == (("b", "a"), ("bee", "ay"))
    given = labels_of(manifest_of("a", "b", label_names={"b": "bee", "a": "ay"}), classes=["a", "b"])
    assert (given.classes, given.class_names) == (("a", "b"), ("ay", "bee"))


def test_clips_without_a_label_are_left_out_with_a_note():
    manifest = manifest_of("a", None, "b", None)
    labels = labels_of(manifest)
    selected = labels.select(manifest)
    assert [clip.path for clip in selected.clips] == ["0.wav", "2.wav"]
    assert selected.notes == ("the manifest: 2 clips left out, without a label; the first: 1.wav",)
    assert selected.classes == ("a", "b")
    whole = manifest_of("a", "b")
    assert labels.select(whole) is whole


def test_clips_that_are_said_to_have_none_of_the_labels():
    """In a task with several labels a clip they are clips like others; in one with a single label they have none."""
    manifest = manifest_of("a", "", None, "b")
    labels = labels_of(manifest)
    assert labels.kind == "multi-label"
    selected = labels.select(manifest)
    assert [clip.path for clip in selected.clips] == ["0.wav", "1.wav", "3.wav"]
    assert labels.targets(selected, range(3)).tolist() == [[1, 0], [0, 0], [0, 1]]
    single = labels_of(manifest, "single-label")
    assert [clip.path for clip in single.select(manifest).clips] == ["0.wav", "3.wav"]


def test_an_empty_list_in_a_file_is_kept_apart_from_no_list(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"path": "1.wav", "labels": []}\n{"path": "2.wav"}\n{"path": "3.wav", "labels": null}\n')
    for _ in range(2):
        manifest = load_manifest(path)
        assert [clip.negative for clip in manifest.clips] == [True, False, False]
        assert [clip_labels(clip) for clip in manifest.clips] == [(), None, None]
        write_manifest(manifest, path)


@pytest.mark.parametrize(
    ("manifest", "options", "words"),
    [
        (manifest_of(None, None), {}, "none of its 2 clips has a label"),
        (manifest_of("", ""), {}, "none of its 2 clips has a label"),
        (manifest_of("a", "a"), {}, "a single class, 'a'"),
        (manifest_of("a", "a", None), {"task": "multi-label"}, "a single class, 'a'"),
        (manifest_of("a", "ab"), {"task": "single-label"}, "1 clip with several labels .* 1.wav: 'a', 'b'; leave one"),
        (manifest_of("a", "b"), {"classes": ["a", "b", "c"]}, "1 of 3 classes have no clip: 'c'; .* list of classes"),
        (manifest_of("a", "b", label_names={"c": "see"}), {}, "1 of 3 classes have no clip: 'c'; .* label_names"),
        (manifest_of("a", "b", "b"), {"classes": ["a", "c"]}, r"2 clips with labels that are .* 2 classes: 'b' \(2 c"),
        (manifest_of("a", "b"), {"classes": ["a", "b", "a"]}, "the class 'a' is listed twice"),
        (manifest_of("a", "b"), {"classes": ["a", " "]}, "an empty label"),
        (
            manifest_of("a", "b"),
            {"task": "tagging"},
            "task is 'tagging'; choose one of auto, single-label, multi-label",
        ),
    ],
)
def test_labels_that_make_no_task(manifest, options, words):
    with pytest.raises(ValueError, match=words):
        labels_of(manifest, **options)


def test_one_class_and_clips_without_it_are_a_task():
    assert labels_of(manifest_of("a", "")).classes == ("a",)


def test_labels_that_training_does_not_know():
    with pytest.raises(
        ManifestError, match=r"3 clips with labels .* 2 classes: 'c' \(2 clips\), 'd' \(2 clips\); the c"
    ):
        PAIRS.select(manifest_of("a", "c", "cd", "d"))
    with pytest.raises(ManifestError, match="none of its 2 clips has a label"):
        PAIRS.select(manifest_of(None, None))
    with pytest.raises(ManifestError, match="1 clip with several labels"):
        dataclasses.replace(PAIRS, kind="single-label").select(manifest_of("a", "ab"))


def test_a_class_folder_without_clips(tmp_path):
    for name in ("dog/1.wav", "cow/1.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / ".hidden").mkdir()
    assert labels_of(load_manifest(tmp_path)).classes == ("cow", "dog")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    with pytest.raises(
        ManifestError, match="1 of its folders have no clips, and a folder is a class: 'cat'; put audio"
    ):
        labels_of(load_manifest(tmp_path))


def test_weights_are_the_released_recipe_s():
    manifest = manifest_of("a", "ab", "a", None)
    labels = labels_of(manifest)
    a, b = 1000 / 3.01, 1000 / 1.01
    np.testing.assert_allclose(balancing_weights(manifest), [a, a + b, a, 0])
    assert labels.counts(manifest).tolist() == [3, 1]


@pytest.mark.parametrize("strong", [False, True])
def test_the_fingerprint_is_of_every_clip_s_labels_in_order(strong, monkeypatch):
    """As checkpoints of every version have it, however fast it is found."""
    monkeypatch.setattr("cat.data.labels._PIECE", 7)
    clips = [Clip(f"{i}.wav", labels=tuple("ab"[: i % 3]), negative=i % 2 == 0) for i in range(50)]
    if strong:
        clips[3] = dataclasses.replace(clips[3], extra={"events": [event(0, 1, "a")]})
    manifest = Manifest(clips, "/data")
    digest = hashlib.sha256(b"a\0b")
    for clip in manifest.clips:
        digest.update(repr((clip_labels(clip), intervals_of(clip))).encode())
    assert labels_of(manifest).fingerprint(manifest) == digest.hexdigest()


# --- events ----------------------------------------------------------------------------------------------------------


def strong(*clips, labels=()):
    return Manifest(
        [Clip(f"{i}.wav", labels=labels, extra={"events": list(events)}) for i, events in enumerate(clips)], "/"
    )


def test_events_are_a_task_of_their_own():
    manifest = strong([event(0, 1, "dog"), event(2, 3, "dog")], [event(0.5, 1, "cow")], [])
    labels = labels_of(manifest)
    assert (labels.kind, labels.classes) == ("events", ("cow", "dog"))
    assert labels.targets(manifest, range(3)).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert labels.select(manifest) is manifest
    assert labels.counts(manifest).tolist() == [1, 1]
    assert labels_of(manifest, "multi-label").kind == "multi-label"
    assert intervals_of(manifest.clips[2]) == []
    assert intervals_of(Clip("a.wav", labels=("dog",))) is None
    assert clip_labels(strong([event(0, 1, "dog")], labels=("cow",)).clips[0]) == ("cow", "dog")


def test_events_of_a_manifest(tmp_path):
    path = tmp_path / "a.jsonl"
    entry = {"path": "1.wav", "events": [event(2, 3.5, " dog "), {**event(0, 1, "cow"), "confidence": 0.5}]}
    path.write_text(json.dumps(entry) + '\n{"path": "2.wav", "events": null}\n')
    manifest = load_manifest(path)
    assert intervals_of(manifest.clips[0]) == [(0, 1, "cow"), (2, 3.5, "dog")]
    assert manifest.clips[0].extra["events"][0]["confidence"] == 0.5
    assert intervals_of(manifest.clips[1]) is None


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ("dog", '"events" must be a list of objects'),
        (["dog"], '"events" must be a list of objects'),
        ([{"onset": 0, "label": "dog"}], '"events" must be a list of objects'),
        ([{"onset": 0, "offset": "1", "label": "dog"}], '"events" must be a list of objects'),
        ([{"onset": True, "offset": 2, "label": "dog"}], '"events" must be a list of objects'),
        ([{"onset": 0, "ofset": 1, "label": "dog"}], "unknown field 'ofset'; did you mean 'offset'"),
        ([event(1, 1, "dog")], r"an event from 1 to 1 s \('dog'\); expected 0 <= onset < offset"),
        ([event(-1, 1, "dog")], "an event from -1 to 1 s"),
        ([event(0, 1, " ")], "an empty label"),
    ],
)
def test_events_that_are_none(tmp_path, events, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"path": "0.wav"}\n' + json.dumps({"path": "1.wav", "events": events}) + "\n")
    with pytest.raises(ManifestError, match=rf"a\.jsonl:2: {words}"):
        load_manifest(path)


def test_a_misspelt_field_of_events(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"path": "1.wav", "event": []}\n')
    with pytest.raises(ManifestError, match="did you mean 'events'"):
        load_manifest(path)


def test_targets_of_rows():
    """A row counts when half of it is covered; an event that covers no half is where its middle is."""
    targets = PAIRS.frame_targets([(0.07, 0.26, "a"), (0.31, 0.33, "b"), (0.46, 9.0, "a")], rows=6, row_seconds=0.1)
    assert targets[:, 1].tolist() == [0, 1, 1, 0, 0, 1]
    assert targets[:, 0].tolist() == [0, 0, 0, 1, 0, 0]
    assert targets.dtype == torch.float32
    assert PAIRS.frame_targets([(0.599, 0.62, "a")], rows=6, row_seconds=0.1)[:, 1].tolist() == [0, 0, 0, 0, 0, 1]
    assert PAIRS.frame_targets([], rows=2, row_seconds=0.1).sum() == 0


def test_events_move_with_their_clip():
    events = [(0.5, 1.5, "a"), (3.0, 4.0, "b"), (6.0, 7.0, "c")]
    assert moved(events, start=1.0, length=4.0) == [(0.0, 0.5, "a"), (2.0, 3.0, "b")]
    assert moved(events[1:2], start=1.0, length=4.0, roll=0.5) == [(2.5, 3.5, "b")]
    assert moved(events[1:2], start=1.0, length=4.0, roll=1.5) == [(3.5, 4.0, "b"), (0.0, 0.5, "b")]
    assert moved(events[1:2], start=1.0, length=4.0, roll=-2.5) == [(3.5, 4.0, "b"), (0.0, 0.5, "b")]
    assert moved([(0.0, 4.0, "a")], start=0.0, length=4.0, roll=1.0) == [(1.0, 4.0, "a"), (0.0, 1.0, "a")]


def test_events_move_as_samples_do():
    """Whatever is cut and rolled: where the events are is where the samples are."""
    random = np.random.default_rng(0)
    for _ in range(200):
        onset, size = random.integers(0, 60), random.integers(1, 30)
        start, length, roll = random.integers(0, 40), random.integers(1, 60), random.integers(-70, 70)
        active = np.zeros(100)
        active[onset : onset + size] = 1
        expected = np.roll(active[start : start + length], roll)
        found = np.zeros(length)
        for first, end, _ in moved([(onset, onset + size, "a")], start=start, length=length, roll=roll):
            found[int(first) : int(end)] = 1
        assert found.tolist() == expected.tolist()


def test_what_a_task_needs():
    for bad in (("tagging", ("a",), ("a",)), ("events", (), ()), ("events", ("a",), ("a", "b"))):
        with pytest.raises(ValueError, match=r"expected|choose"):
            Labels(*bad)
