"""Features on disk: the same bits as computed, never those of something else, never half of them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.data import Clip, FeatureConfig, Manifest
from cat.encoders import CatEncoder, LogMelStatistics, RandomProjection
from cat.encoders.identity import identity
from cat.evaluation import cache as module
from cat.evaluation.cache import FeatureCache
from cat.evaluation.features import Features, Wanted
from cat.model import Encoder, ModelConfig

soundfile = pytest.importorskip("soundfile")

TINY = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
EVERYTHING = Wanted((0, 1, 2), tokens=True)
WANTED = [Wanted(), Wanted((1, 2)), EVERYTHING]


def cat_encoder(seed: int = 0, **options) -> CatEncoder:
    torch.manual_seed(seed)
    return CatEncoder(Encoder(TINY), FeatureConfig(frames=48), **options)


@pytest.fixture
def sounds(tmp_path) -> Manifest:
    """Five clips of different lengths."""
    root = tmp_path / "audio"
    root.mkdir()
    for i in range(5):
        wave = 0.1 * np.random.default_rng(i).normal(size=2000 + 1500 * i)
        soundfile.write(root / f"{i}.wav", wave, 16000)
    return Manifest(tuple(Clip(f"{i}.wav", labels=("a",)) for i in range(5)), root)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def features(folder: Path | None, manifest: Manifest, encoder=None, wanted=EVERYTHING, **options):
    """Of a new process's cache, and the cache."""
    with FeatureCache(folder) as cache:
        return cache.features(manifest, encoder or cat_encoder(), wanted, batch_size=2, **options), cache


def assert_same(one: Features, other: Features) -> None:
    assert np.array_equal(one.indices, other.indices)
    assert np.array_equal(one.clip, other.clip)
    assert one.skipped == other.skipped
    if one.pooled is not None:
        assert np.array_equal(one.pooled, other.pooled)
    if one.tokens is not None:
        for name in ("rows_NYD", "cls_BYD", "ends"):
            assert np.array_equal(getattr(one.tokens, name), getattr(other.tokens, name)), name


@pytest.mark.parametrize("wanted", WANTED)
def test_what_is_kept_is_what_was_computed(wanted, sounds, folder):
    plain, none = features(None, sounds, wanted=wanted)
    first, missed = features(folder, sounds, wanted=wanted)
    second, hit = features(folder, sounds, wanted=wanted)
    assert [(c.computed, c.found) for c in (none, missed, hit)] == [(1, 0), (1, 0), (0, 1)]
    assert_same(plain, first)
    assert_same(plain, second)
    assert hit.size == missed.size == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert f"1 from the cache ({module.format_bytes(hit.size)} of it in {folder})" in hit.summary()
    assert not hit.notes


def test_a_hit_hears_nothing(sounds, folder, monkeypatch):
    features(folder, sounds)
    monkeypatch.setattr(module, "compute", lambda *_, **__: pytest.fail("computed again"))
    features(folder, sounds)


def test_the_last_layer_is_the_embedding(sounds):
    """Whatever is asked for, and whatever lies beside a clip in its batch."""
    for pooling in ("mean", "cls", "both"):
        encoder = cat_encoder(pooling=pooling)
        alone, _ = features(None, sounds, encoder, Wanted())
        every, _ = features(None, sounds, encoder)
        torch.testing.assert_close(torch.tensor(every.clip), torch.tensor(alone.clip), rtol=1e-5, atol=1e-6)
        assert np.array_equal(every.clip, every.pooled[:, -1])
    rows, own, _ = every.tokens.batch(np.arange(5))
    mean = (rows * own[:, :, None, None]).sum(1) / own.sum(1)[:, None, None]
    torch.testing.assert_close(mean, torch.tensor(every.pooled[..., 16:]), rtol=2e-3, atol=2e-3)


def test_a_recording_that_is_heard_as_a_stream(sounds, monkeypatch):
    """Its layers are those of the whole. Tokens of hours are more than a probe can read: it is left out, by name."""
    from cat.encoders import reading
    from cat.evaluation import features as feature_module

    layers = Wanted((0, 2))
    for index, seconds in ((3, 1.2), (4, 2.5)):
        wave = 0.1 * np.random.default_rng(index).normal(size=int(16000 * seconds))
        soundfile.write(sounds.path(index), wave, 16000)
    whole, _ = features(None, sounds, wanted=layers)
    for place in (reading, feature_module):
        monkeypatch.setattr(place, "WINDOW_SECONDS", 1)
    streamed, _ = features(None, sounds, wanted=layers)
    torch.testing.assert_close(torch.tensor(streamed.pooled), torch.tensor(whole.pooled), rtol=1e-4, atol=1e-5)
    found, _ = features(None, sounds)
    assert list(found.indices) == [0, 1, 2]
    reason = "longer than 1 s; too many tokens for a probe to read"
    assert [(clip.path, clip.reason) for clip in found.skipped] == [
        (str(sounds.path(index)), reason) for index in (3, 4)
    ]


def louder(root: Path) -> None:
    """Another sound under the same name, of the same size and date."""
    path = root / "2.wav"
    before = path.stat()
    samples, rate = soundfile.read(path, dtype="int16")
    soundfile.write(path, samples // 2, rate)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def other_weights() -> CatEncoder:
    encoder = cat_encoder()
    with torch.no_grad():
        encoder.encoder.blocks[0].fc1.bias[3] += 1e-3
    return encoder


CHANGES = {
    "an audio file": lambda manifest: (louder(manifest.root), (manifest, cat_encoder()))[1],
    "another list": lambda manifest: (Manifest(manifest.clips[1:], manifest.root), cat_encoder()),
    "another order": lambda manifest: (Manifest(manifest.clips[::-1], manifest.root), cat_encoder()),
    "one weight": lambda manifest: (manifest, other_weights()),
    "the pooling": lambda manifest: (manifest, cat_encoder(pooling="cls")),
    "the features": lambda manifest: (
        manifest,
        CatEncoder(cat_encoder().encoder, FeatureConfig(frames=48, mean=-4.0)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_features_changes_the_key(change, sounds, folder):
    old, _ = features(folder, sounds)
    manifest, encoder = CHANGES[change](sounds)
    new, cache = features(folder, manifest, encoder)
    assert (cache.computed, cache.found) == (1, 0)
    assert old.pooled.shape != new.pooled.shape or not np.array_equal(old.pooled, new.pooled)


def test_what_does_not_change_them_does_not(sounds, folder, monkeypatch):
    features(folder, sounds)
    relabelled = Manifest(tuple(Clip(clip.path, labels=("b",)) for clip in sounds.clips), sounds.root)
    monkeypatch.chdir(sounds.root.parent)
    relative = Manifest(relabelled.clips, Path("audio"))
    renamed = cat_encoder(name="cat:elsewhere")
    for manifest, encoder in ((relabelled, None), (relative, None), (sounds, renamed)):
        assert features(folder, manifest, encoder)[1].found == 1


def test_another_batch_size_or_part_is_another_entry(sounds, folder):
    with FeatureCache(folder) as cache:
        for wanted in WANTED:
            for batch_size in (2, 3):
                cache.features(sounds, cat_encoder(), wanted, batch_size=batch_size)
    assert (cache.computed, cache.found) == (6, 0)


def test_encoders_of_all_kinds_have_an_identity(monkeypatch):
    encoders = [cat_encoder(), cat_encoder(1), LogMelStatistics(), LogMelStatistics(FeatureConfig(mean=0.0))]
    encoders += [RandomProjection(seed=0), RandomProjection(seed=1), RandomProjection(8)]
    found = [json.dumps(identity(encoder)) for encoder in encoders]
    assert len(set(found)) == len(found)
    assert found == [json.dumps(identity(encoder)) for encoder in encoders]


class Foreign:
    """An encoder of the user's, of which nobody knows what its embeddings depend on."""

    name, sample_rate, dim = "mine", 16000, 1

    def __call__(self, waveform, lengths=None):
        return waveform.square().sum(1, keepdim=True)


def test_an_encoder_that_is_not_known_is_not_cached(sounds, folder):
    for _ in range(2):
        found, cache = features(folder, sounds, Foreign(), Wanted())
        assert found.clip.shape == (5, 1)
        assert cache.notes == ["features of mine were not kept: Foreign is nothing whose settings can be compared"]
    assert not folder.exists()


def the_entry(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "one bit": lambda entry: flip(entry / "rows.npy"),
    "cut short": lambda entry: (entry / "pooled.npy").write_bytes((entry / "pooled.npy").read_bytes()[:-100]),
    "empty": lambda entry: (entry / "cls.npy").write_bytes(b""),
    "an array is gone": lambda entry: (entry / "counts.npy").unlink(),
    "no JSON": lambda entry: (entry / "entry.json").write_text('{"format": 1, "sha'),
    "another JSON": lambda entry: (entry / "entry.json").write_text("[]"),
    "no names": lambda entry: (entry / "entry.json").write_text('{"format": 1, "sha256": {}, "skipped": []}'),
    "of another version": lambda entry: (entry / "entry.json").write_text('{"format": 99}'),
    "all is gone": lambda entry: [path.unlink() for path in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_again_with_a_note(damage, sounds, folder):
    plain, _ = features(folder, sounds)
    pooled = np.array(plain.pooled)
    DAMAGE[damage](the_entry(folder))
    again, cache = features(folder, sounds)
    assert (cache.computed, cache.found) == (1, 0)
    (note,) = cache.notes
    assert f"{the_entry(folder)} was damaged (" in note
    assert "its features were computed again" in note
    assert np.array_equal(again.pooled, pooled)
    assert features(folder, sounds)[1].found == 1  # mended


def test_what_is_not_ours_is_left_alone(sounds, folder):
    features(folder, sounds)
    entry = the_entry(folder)
    flip(entry / "rows.npy")
    (entry / "thesis.txt").write_text("mine")
    found, cache = features(folder, sounds)
    assert len(found.indices) == 5
    assert (entry / "thesis.txt").read_text() == "mine"
    assert any("features were not kept" in note for note in cache.notes)


@pytest.fixture
def meanwhile(monkeypatch):
    """``meanwhile(action)``: done whenever an encoder is about to hear a batch."""

    def set_to(action) -> None:
        plain = CatEncoder.__call__
        monkeypatch.setattr(CatEncoder, "__call__", lambda self, *given: (action(), plain(self, *given))[1])

    return set_to


def test_two_at_once_write_the_same_entry(sounds, folder, meanwhile):
    """Both have begun before either is done."""
    together = threading.Barrier(2, timeout=60)
    met = threading.local()

    def wait() -> None:
        if not getattr(met, "already", False):
            met.already = True
            together.wait()

    results: list[tuple[Features, FeatureCache]] = []
    meanwhile(wait)
    encoder = cat_encoder()
    threads = [
        threading.Thread(target=lambda: results.append(features(folder, sounds, encoder, Wanted()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [cache.computed for _, cache in results] == [1, 1]
    assert not any(cache.notes for _, cache in results)
    assert_same(results[0][0], results[1][0])
    assert [path.name for path in the_entry(folder).iterdir() if path.name.startswith(".")] == []
    assert features(folder, sounds, encoder, Wanted())[1].found == 1


def test_what_ends_in_the_middle_leaves_nothing(sounds, folder, meanwhile):
    class Stopped(BaseException):
        pass

    def stop() -> None:
        raise Stopped

    meanwhile(stop)
    with pytest.raises(Stopped):
        features(folder, sounds, wanted=Wanted())
    assert list(folder.iterdir()) == []


def test_a_clip_that_changes_while_it_is_read(sounds, folder, meanwhile):
    def change() -> None:
        with open(sounds.path(4), "ab") as file:
            file.write(b"\0")

    meanwhile(change)
    found, cache = features(folder, sounds, wanted=Wanted())
    assert len(found.clip) == 5
    assert cache.notes == [f"features were not kept in {folder}: a clip was changed while it was read"]
    assert list(folder.iterdir()) == []


def test_clips_that_cannot_be_read_are_tried_again(sounds, folder):
    hidden = sounds.path(1).rename(sounds.root / "hidden")
    found, _ = features(folder, sounds)
    assert [clip.index for clip in found.skipped] == [1]
    assert list(found.indices) == [0, 2, 3, 4]
    again, cache = features(folder, sounds)
    assert cache.found == 1
    assert_same(found, again)
    hidden.rename(sounds.path(1))
    assert len(features(folder, sounds)[0].indices) == 5


def test_a_failure_that_has_passed_is_not_kept(sounds, folder, monkeypatch):
    """As when a network was away: nothing about the file has changed."""
    from cat.data.audio import AudioError
    from cat.encoders import reading

    read = reading.read_audio

    def fail(path, *rest, **options):
        if path.name == "1.wav":
            raise AudioError(path, "no route to host")
        return read(path, *rest, **options)

    monkeypatch.setattr(reading, "read_audio", fail)
    assert [clip.reason for clip in features(folder, sounds)[0].skipped] == ["no route to host"]
    monkeypatch.setattr(reading, "read_audio", read)
    found, cache = features(folder, sounds)
    assert (len(found.indices), cache.computed) == (5, 1)


def test_no_clip_at_all(sounds, folder):
    nothing = Manifest((Clip("gone.wav", labels=("a",)),), sounds.root)
    for place in (None, folder):
        for wanted in WANTED:
            with pytest.raises(ValueError, match=r"no clip of the manifest could be embedded \(1 clips\).*gone.wav"):
                features(place, nothing, wanted=wanted)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("wanted", WANTED)
def test_a_folder_that_cannot_be_written(wanted, sounds, tmp_path):
    (tmp_path / "file").write_text("mine")
    plain, _ = features(None, sounds, wanted=wanted)
    found, cache = features(tmp_path / "file" / "cache", sounds, wanted=wanted)
    assert_same(plain, found)
    (note,) = cache.notes
    assert note.startswith(f"features were not kept in {tmp_path / 'file' / 'cache'}: ")
    assert cache.summary() == "features: 1 sets computed, none kept"


def test_without_a_cache_tokens_leave_nothing_behind(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    found, _ = features(None, sounds)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert found.tokens.batch(np.arange(5))[0].isfinite().all()  # still there for who has them
