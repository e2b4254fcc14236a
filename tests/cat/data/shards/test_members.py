"""Clips read from shards, as they are used everywhere; and shards that are not what they were."""

import pickle

import numpy as np
import pytest
import torch

from cat.data import DataConfig, FeatureConfig, Manifest, eval_batches, load_manifest, pretrain_batches
from cat.data.audio import AudioError, read_audio, read_windows
from cat.data.listing import listed
from cat.data.manifest import Clip, ManifestError
from cat.data.shards.checking import check_shards
from cat.data.shards.writing import write_shards

soundfile = pytest.importorskip("soundfile")

RATE = 16000
FEATURES = FeatureConfig(frames=32, mel_bins=32)  # 5,360 samples


@pytest.fixture
def files(tmp_path):
    """Twelve clips of noise."""
    (tmp_path / "audio").mkdir()
    for number in range(12):
        wave = np.random.default_rng(number).integers(-9000, 9000, 6000 + 50 * number).astype(np.int16)
        soundfile.write(tmp_path / "audio" / f"{number:02}.wav", wave, RATE)
    return Manifest([Clip(f"{number:02}.wav", labels=("ab"[number % 2],)) for number in range(12)], tmp_path / "audio")


@pytest.fixture
def shards(files, tmp_path):
    """Three shards of four clips."""
    written = write_shards(files, tmp_path / "shards", shard_bytes=4 * 14_000)
    assert written.shards == 3
    return tmp_path / "shards"


def batches(manifest, **options):
    data = DataConfig(batch_size=5, num_workers=options.pop("num_workers", 0), roll=True, gain=True)
    return pretrain_batches(data, FEATURES, None, patch_size=16, seed=3, manifest=manifest, **options)


def assert_same(batch, other):
    assert batch.clips.tolist() == other.clips.tolist()
    assert batch.labels == other.labels
    torch.testing.assert_close(batch.spec, other.spec, rtol=0, atol=0)


def test_batches_are_those_of_the_files_bit_for_bit(files, shards):
    sharded = load_manifest(shards)
    of_files = [*batches(files, num_steps=6)]
    for batch, other in zip(batches(sharded, num_steps=6), of_files, strict=True):
        assert_same(batch, other)
    # From the middle of an epoch, by two workers: a batch is a function of its step.
    for batch, other in zip(batches(sharded, start_step=3, num_steps=3, num_workers=2), of_files[3:], strict=True):
        assert_same(batch, other)
    for batch, other in zip(eval_batches(sharded, FEATURES, 5), eval_batches(files, FEATURES, 5), strict=True):
        assert_same(batch, other)


def test_a_manifest_of_shards_travels_to_another_process(shards):
    sharded = load_manifest(shards)
    read_audio(sharded.audio(0), RATE)  # with a descriptor open
    there = pickle.loads(pickle.dumps(sharded))
    np.testing.assert_array_equal(read_audio(there.audio(7), RATE), read_audio(sharded.audio(7), RATE))
    with pytest.raises(ValueError, match=r"12 clips, but 3 members of shards; use Manifest\.take"):
        Manifest(sharded.clips, sharded.root, members=sharded.members.take(np.arange(3)))


def test_files_and_shards_listed_together(files, shards, tmp_path):
    named = [tmp_path / "audio" / "03.wav", shards, tmp_path / "audio", shards]
    manifest = listed(named)
    assert len(manifest) == 24
    paths = [str(manifest.path(index)) for index in range(24)]
    assert paths[0] == str(tmp_path / "audio" / "03.wav")
    assert paths[1:4] == [str(shards / f"{number:02}.wav") for number in range(3)]
    for index in (0, 1, 12, 13, 23):
        here = read_audio(tmp_path / "audio" / manifest.path(index).name, RATE)
        np.testing.assert_array_equal(read_audio(manifest.audio(index), RATE), here)


def reasons(manifest):
    found = {}
    for index in range(len(manifest)):
        try:
            read_audio(manifest.audio(index), RATE)
        except AudioError as error:
            found[index] = str(error)
    assert len([*check_shards(manifest)]) == len(found)
    return found


def test_a_shard_that_is_cut_off_loses_the_clips_behind_the_cut(shards):
    manifest = load_manifest(shards)
    content = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(content[: len(content) // 2])
    found = reasons(manifest)
    assert set(found) == {6, 7}
    assert "000001.tar: 07.wav: the shard is cut off, " in found[7]
    assert "bytes that are needed are there; copy it again" in found[7]
    # The run goes on with the next clips of the order, and the failures say why.
    seen = [*batches(manifest, num_steps=4)]
    assert {failure.path.split()[-1] for batch in seen for failure in batch.failures} == {"06.wav", "07.wav"}
    assert not {6, 7} & {clip for batch in seen for clip in batch.clips.tolist()}


def test_a_shard_that_is_missing(shards):
    manifest = load_manifest(shards)
    (shards / "000002.tar").unlink()
    found = reasons(manifest)
    assert set(found) == {8, 9, 10, 11}
    assert found[8].endswith("000002.tar: 08.wav: the shard is missing: no such file")


def test_a_damaged_byte_costs_its_clip(shards):
    manifest = load_manifest(shards)
    content = bytearray((shards / "000000.tar").read_bytes())
    content[manifest.members.get(2, "").offset + 3000] ^= 1  # a sample, of which no decoder knows
    (shards / "000000.tar").write_bytes(content)
    found = reasons(manifest)
    assert set(found) == {2}
    assert "the shard is damaged, or not the one that was indexed: the CRC-32 is" in found[2]


def test_the_index_of_other_shards(files, shards, tmp_path):
    manifest = load_manifest(shards)
    write_shards(files.take(np.arange(12)[::-1]), tmp_path / "other", shard_bytes=4 * 14_000)
    (shards / "000000.tar").write_bytes((tmp_path / "other" / "000000.tar").read_bytes())
    assert set(reasons(manifest)) == {0, 1, 2, 3}


def test_an_index_that_is_damaged_or_none(shards):
    content = bytearray((shards / "shards.index").read_bytes())
    content[-5] ^= 1
    (shards / "shards.index").write_bytes(content)
    with pytest.raises(ManifestError, match=r"shards.index: damaged, or changed since .*cat-audio shards index"):
        load_manifest(shards)
    (shards / "shards.index").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"shards.index: .*cat-audio shards index"):
        load_manifest(shards)


def test_long_clips_in_windows(tmp_path):
    wave = np.random.default_rng(0).integers(-9000, 9000, 50_000).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", wave, RATE)
    manifest = write_shards(Manifest([Clip("a.flac")], tmp_path), tmp_path / "shards").manifest
    windows = [*read_windows(manifest.audio(0), RATE, 20_000)]
    np.testing.assert_array_equal(np.concatenate(windows), wave / np.float32(32768))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64"])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_every_format_as_from_its_file(tmp_path, suffix, rate):
    wave = 0.1 * np.random.default_rng(0).standard_normal((9000, 2))
    soundfile.write(tmp_path / f"a.{suffix}", wave, rate)
    manifest = write_shards(Manifest([Clip(f"a.{suffix}")], tmp_path), tmp_path / "shards").manifest
    for crop in ({}, {"max_samples": 3000, "start": 0.6}):
        here = read_audio(tmp_path / f"a.{suffix}", RATE, **crop)
        np.testing.assert_array_equal(read_audio(manifest.audio(0), RATE, **crop), here)


def test_a_header_without_a_size(tmp_path):
    """Written into a pipe: libsndfile gets it mended, from a shard too."""
    soundfile.write(tmp_path / "a.wav", np.arange(-4000, 4000, dtype=np.int16), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    manifest = write_shards(Manifest([Clip("a.wav")], tmp_path), tmp_path / "shards").manifest
    assert manifest.clips[0].samples == 8000
    np.testing.assert_array_equal(read_audio(manifest.audio(0), RATE), read_audio(tmp_path / "a.wav", RATE))
