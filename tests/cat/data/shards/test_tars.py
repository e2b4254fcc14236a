"""An index of tar files that somebody else wrote, and of ours when theirs is lost."""

import io
import json
import tarfile

import numpy as np
import pytest

from cat.data import load_manifest
from cat.data.audio import read_audio
from cat.data.manifest import Clip, Manifest, ManifestError
from cat.data.shards.tars import index_shards
from cat.data.shards.writing import write_shards
from cat.outputs import OutputError

soundfile = pytest.importorskip("soundfile")

RATE = 16000


def sound(seed, form="FLAC", samples=3000):
    content = io.BytesIO()
    soundfile.write(
        content, np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16), RATE, format=form
    )
    return content.getvalue()


def pack(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def told(**fields):
    return json.dumps(fields).encode()


def test_what_others_wrote(tmp_path):
    members = [
        ("./set/0001.json", told(tags=["rain", "wind"], text="it rains", samples="many", path=None)),
        ("./set/0001.flac", sound(1)),
        ("./set/0001.txt", b"it rains"),
        ("./set/0002.FLAC", sound(2)),
        ("./set/0002.cls", b"7\n"),
        ("./set/0003.txt", b"no audio"),
        ("./set/0004.wav", b"broken"),
        ("./set/0005.v1.wav", sound(5, "WAV")),
        ("./set/0005.json", told(meta={"class": "dog"}, tags=[])),
    ]
    pack(tmp_path / "t" / "a-000.tar", members)
    pack(tmp_path / "t" / "a-001.tar", [("x" * 150 + ".wav", sound(6, "WAV"))], format=tarfile.PAX_FORMAT)
    count, failures, notes = index_shards(tmp_path / "t", labels="tags")
    assert (count, len(notes)) == (4, 1)
    assert notes[0].startswith("1 samples without audio")
    assert [path for path, _ in failures] == ["a-000.tar/./set/0004.wav"]
    manifest = load_manifest(tmp_path / "t")
    assert [clip.path for clip in manifest.clips] == [
        "a-000.tar/./set/0001.flac",
        "a-000.tar/./set/0002.FLAC",
        "a-000.tar/./set/0005.v1.wav",
        f"a-001.tar/{'x' * 150}.wav",
    ]
    assert [clip.labels for clip in manifest.clips] == [("rain", "wind"), ("7",), (), ()]
    assert [clip.negative for clip in manifest.clips] == [False, False, True, False]
    assert manifest.clips[0].extra == {"tags": ["rain", "wind"], "text": "it rains"}
    assert (manifest.clips[0].samples, manifest.clips[0].sample_rate) == (3000, RATE)
    for index, content in enumerate([sound(1), sound(2), sound(5, "WAV"), sound(6, "WAV")]):
        wave, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        np.testing.assert_array_equal(read_audio(manifest.audio(index), RATE), wave)
    with pytest.raises(OutputError, match=r"shards\.index exists"):
        index_shards(tmp_path / "t")
    index_shards(tmp_path / "t", labels="meta.class", overwrite=True, jobs=2)
    assert load_manifest(tmp_path / "t").clips[2].labels == ("dog",)


def test_an_index_elsewhere(tmp_path):
    pack(tmp_path / "read-only" / "0.tar", [("a.flac", sound(1))])
    index_shards(tmp_path / "read-only", tmp_path / "mine" / "index")
    manifest = load_manifest(tmp_path / "mine" / "index")
    assert len(read_audio(manifest.audio(0), RATE)) == 3000
    assert sorted(path.name for path in (tmp_path / "read-only").iterdir()) == ["0.tar"]


def test_our_own_index_made_again(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.flac").write_bytes(sound(number))
    events = [{"onset": 0.1, "offset": 0.2, "label": "car"}]
    clips = [Clip(f"{n}.flac", labels=("x", "é")[:n], extra={"events": events}, negative=n == 0) for n in range(6)]
    first = write_shards(Manifest(clips, tmp_path), tmp_path / "shards", shard_bytes=10_000).manifest
    rows = {name: column.copy() for name, column in first.members.columns.items()}
    kept = list(first.clips)
    (tmp_path / "shards" / "shards.index").unlink()
    index_shards(tmp_path / "shards")
    again = load_manifest(tmp_path / "shards")
    assert list(again.clips) == kept
    assert [clip.extra for clip in again.clips] == [clip.extra for clip in kept]
    assert [clip.negative for clip in again.clips] == [clip.negative for clip in kept]
    assert again.fingerprint == first.fingerprint
    for name, column in rows.items():
        np.testing.assert_array_equal(again.members.columns[name], column)


@pytest.mark.parametrize("cut", [700, 4000, -10_000, -9_800])
def test_a_tar_file_that_is_cut_off(tmp_path, cut):
    pack(tmp_path / "0.tar", [("a.wav", sound(1, "WAV")), ("b.wav", sound(2, "WAV"))])
    content = (tmp_path / "0.tar").read_bytes()
    ends = len(content.rstrip(b"\0"))
    cuts = {-10_000: (2 * (512 + -(-6044 // 512) * 512)), -9_800: ends - 3}
    (tmp_path / "0.tar").write_bytes(content[: cuts.get(cut, cut)])
    with pytest.raises(ManifestError, match=r"0.tar: cut off: it ends before its last file does, or without"):
        index_shards(tmp_path)
    assert not (tmp_path / "shards.index").exists()


def test_tar_files_that_cannot_be_indexed(tmp_path):
    with pytest.raises(ManifestError, match="no tar files in it"):
        index_shards(tmp_path)
    pack(tmp_path / "0.tar", [("a.flac", sound(1))], mode="w:gz")
    with pytest.raises(ManifestError, match="compressed by gzip, where no clip can be read alone; unpack it"):
        index_shards(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"something else" * 100)
    with pytest.raises(ManifestError, match=r"0\.tar: no tar file"):
        index_shards(tmp_path)
    pack(tmp_path / "0.tar", [("a.txt", b"nothing to hear")])
    with pytest.raises(ManifestError, match="no audio in its 1 tar files"):
        index_shards(tmp_path)
    pack(tmp_path / "0.tar", [("a.flac", sound(1)), ("a.json", b"[1]")])
    with pytest.raises(ManifestError, match=r"0.tar/a.json: expected an object"):
        index_shards(tmp_path)


def test_webdataset_reads_what_we_write(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(sound(number))
    clips = [Clip(f"{number}.flac", labels=("x",)) for number in range(3)]
    write_shards(Manifest(clips, tmp_path), tmp_path / "shards")
    samples = [*webdataset.WebDataset(str(tmp_path / "shards" / "000000.tar"), shardshuffle=False)]
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    for number, sample in enumerate(samples):
        assert sample["flac"] == sound(number)
        assert json.loads(sample["json"])["labels"] == ["x"]
