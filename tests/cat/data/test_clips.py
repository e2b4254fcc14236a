"""A manifest's clips in a few arrays: what goes in comes out, and data workers share the memory."""

import dataclasses
import itertools
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from cat.data.clips import Clip, Clips
from cat.data.manifest import Manifest, ManifestError
from tests.memory import private_memory_of_a_child

CLIPS = (
    Clip("x/ä.wav", 100, 8000, ("dog", "bark"), 3, {"speaker": "s0", "start_s": 0.5, "nested": [{"a": None}]}),
    Clip(os.fsdecode(b"caf\xe9.wav")),
    Clip("/abs/c.wav", 0, 1, ("dog",), 0),
)


def test_what_goes_in_comes_out():
    clips = pickle.loads(pickle.dumps(Clips(CLIPS)))
    assert clips == CLIPS
    assert [clip.extra for clip in clips] == [clip.extra for clip in CLIPS]
    assert (clips[-1], clips[1:], list(clips)) == (CLIPS[-1], CLIPS[1:], list(CLIPS))
    assert (clips.labels, clips.rows.tolist()) == (("dog", "bark"), [3, -1, 0])
    assert clips != CLIPS[:2]
    with pytest.raises(IndexError):
        clips[3]


def test_labels_are_clean_wherever_they_come_from():
    decomposed = unicodedata.normalize("NFD", "café")
    manifest = Manifest((Clip("a.wav", labels=(" dog", decomposed, "dog")), Clip("b.wav", labels=("café",))), "/x")
    assert [clip.labels for clip in manifest.clips] == [("dog", "café"), ("café",)]
    assert Manifest((Clip("a.wav", labels=("\udce9", "\ud83d")),), "/x").classes == ("\\ud83d", "\\xe9")
    with pytest.raises(ManifestError, match="an empty label"):
        Manifest((Clip("a.wav", labels=(" ",)),), "/x")


@pytest.mark.parametrize(
    "clip",
    [Clip("a", labels="dog"), Clip("a", labels=(3,)), Clip("a", samples=1.5), Clip("a", embedding=2**70)],
)
def test_wrong_types_name_the_clip(clip):
    with pytest.raises(TypeError, match=r"path='a'.*expected the types that Clip names"):
        Clips([clip])


def test_some_clips_of_a_manifest(tmp_path):
    manifest = Manifest(CLIPS, tmp_path)
    fewer = dataclasses.replace(manifest, clips=manifest.clips[1:])
    assert [fewer.path(i) for i in range(len(fewer))] == [tmp_path / os.fsdecode(b"caf\xe9.wav"), Path("/abs/c.wav")]


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 1, 2], []])
def test_clips_that_are_taken_are_those(indices):
    """But for the rows of an embedding file, which is the whole data set's."""
    clips = Clips((*CLIPS, Clip("d.wav", negative=True)))
    taken = pickle.loads(pickle.dumps(clips.take(np.array([*indices, 3], dtype=np.int64))))
    expected = [dataclasses.replace(clips[index], embedding=None) for index in (*indices, 3)]
    assert taken == expected
    assert [clip.extra for clip in taken] == [clip.extra for clip in expected]
    assert set(taken.labels) == {label for clip in expected for label in clip.labels}
    ids, ends, negative = taken.label_table
    assert [tuple(taken.labels[i] for i in ids[a:b]) for a, b in itertools.pairwise(ends)] == [
        clip.labels for clip in expected
    ]
    assert negative.tolist() == [False] * len(indices) + [True]
    assert (taken.mention("speaker"), taken.mention("events")) == (0 in indices, False)


def test_a_part_of_a_manifest_has_none_of_its_embeddings(tmp_path):
    manifest = Manifest(CLIPS, tmp_path, embeddings=tmp_path / "e.npy", embeddings_fingerprint="x", notes=("a note",))
    part = manifest.take(np.array([2]))
    assert (part.embeddings, part.embeddings_fingerprint, part.rows.tolist()) == (None, None, [-1])
    assert (part.path(0), part.notes) == (Path("/abs/c.wav"), ("a note",))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads Linux's account of memory")
def test_a_worker_that_looks_at_every_clip_gets_no_copy_of_them():
    """As objects these clips made 14 MB of private memory in every worker."""
    clips = Clips(Clip(f"folder/{i:09}.wav", 160000, 16000, (f"l{i % 500}", f"l{i % 7}"), i) for i in range(50_000))
    assert private_memory_of_a_child(lambda: sum(len(clip.labels) for clip in clips)) < 4


def test_clips_of_a_file_are_those_that_were_saved(tmp_path):
    clips = Clips((*CLIPS, Clip("d.wav", negative=True)))
    clips.save(tmp_path / "clips", {"shard": np.arange(4, dtype=np.uint32)}, {"rate": 16000})
    opened = Clips.open(tmp_path / "clips")
    for found in (opened, pickle.loads(pickle.dumps(opened))):
        assert found == clips
        assert [clip.extra for clip in found] == [clip.extra for clip in clips]
        assert (found.labels, found.rows.tolist()) == (clips.labels, clips.rows.tolist())
        assert (found.mention("speaker"), found.mention("events")) == (True, False)
        assert (found.file["shard"].tolist(), found.file.info["rate"]) == ([0, 1, 2, 3], 16000)
    assert opened.take(np.array([3, 0])) == clips.take(np.array([3, 0]))
    assert opened[1:] == clips[1:]
    assert len(pickle.dumps(opened)) < 500  # the path, not the content
    Clips(()).save(tmp_path / "none")
    assert len(Clips.open(tmp_path / "none")) == 0


def test_a_file_of_clips_is_one_of_safetensors(tmp_path):
    Clips(CLIPS).save(tmp_path / "clips.safetensors")
    with safe_open(tmp_path / "clips.safetensors", framework="numpy") as file:
        assert file.get_tensor("clips.samples").tolist() == [100, -1, 0]


def test_a_worker_that_looks_at_every_clip_of_a_file_gets_no_copy_of_them(tmp_path):
    clips = Clips(Clip(f"folder/{i:09}.wav", 160000, 16000, (f"l{i % 500}", f"l{i % 7}"), i) for i in range(50_000))
    clips.save(tmp_path / "clips")
    opened = Clips.open(tmp_path / "clips")
    assert private_memory_of_a_child(lambda: sum(len(clip.labels) for clip in opened)) < 4
