"""Folders of audio: links, what cannot be listed, and what is left out."""

import os

import pytest

from cat.data.folder import AUDIO_SUFFIXES
from cat.data.manifest import ManifestError, load_manifest, write_manifest


@pytest.fixture
def root(tmp_path):
    """dog/0.wav and dog/1.wav in a folder of their own."""
    for name in ("0.wav", "1.wav"):
        put(tmp_path / "root" / "dog" / name)
    return tmp_path / "root"


def put(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(root):
    return [(clip.path, *clip.labels) for clip in load_manifest(root).clips]


DOGS = [("dog/0.wav", "dog"), ("dog/1.wav", "dog")]


def test_links_that_go_in_circles(root):
    (root / "self").symlink_to(".")
    (root / "dog" / "up").symlink_to("../..")
    (root / "latest").symlink_to(".")
    (root / "loop.wav").symlink_to("loop.wav")
    (root / "dog" / "again").symlink_to("../self/latest/dog")
    assert listed(root) == [*DOGS, ("loop.wav",)]  # which is then recorded as a file that cannot be read
    assert any("left out: 4 links to what is in it already, e.g. dog/again" in n for n in load_manifest(root).notes)


def test_a_folder_with_two_names_counts_once_and_by_its_own(root):
    (root / "alias").symlink_to("dog")  # sorts before it
    assert listed(root) == DOGS
    assert load_manifest(root).notes == (f"{root}: left out: 1 link to what is in it already, e.g. alias",)


def test_links_to_folders_elsewhere_are_followed_once(root, tmp_path):
    put(tmp_path / "elsewhere" / "2.wav", tmp_path / "elsewhere" / "sub" / "3.wav")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    for name in ("cat", "kitten"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    (root / "zoo").symlink_to(tmp_path / "elsewhere" / "sub")
    assert listed(root) == [("cat/2.wav", "cat"), ("cat/sub/3.wav", "cat"), *DOGS]
    assert "3 links" in load_manifest(root).notes[0]


def test_links_to_files(root, tmp_path):
    put(tmp_path / "pool" / "2.wav")
    for name, target in (
        ("cat/a.wav", "../dog/0.wav"),
        ("cat/b.wav", "../../pool/2.wav"),
        ("eel/b.wav", "../cat/b.wav"),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    (root / "cat" / "missing.wav").symlink_to("nowhere")
    assert listed(root) == [("cat/b.wav", "cat"), ("cat/missing.wav", "cat"), *DOGS]


def test_a_root_that_is_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert listed(tmp_path / "link") == DOGS


def test_a_folder_that_cannot_be_listed_is_an_error(root, monkeypatch):
    """By a system call that fails, as root may read everything."""
    put(root / "cat" / "secret" / "2.wav", root / "lost+found" / "3.wav")
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) in ("secret", "lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ManifestError, match=r"cat/secret: this folder cannot be listed \(Permission denied\)"):
        load_manifest(root)


def test_what_is_left_out_is_counted(root):
    names = ("a.m4a", "b.m4a", "README", "notes.txt", ".hidden.wav", ".cache/x.wav", "dog/x.RAW")
    put(*(root / name for name in names), root / "stray.wav", root / "dog" / "2.AIFC")
    manifest = load_manifest(root)
    assert [clip.path for clip in manifest.clips] == ["dog/0.wav", "dog/1.wav", "dog/2.AIFC", "stray.wav"]
    assert manifest.notes == (
        f"{root}: left out: 2 .m4a files, 1 .raw file, 1 .txt file, 1 hidden file, 1 hidden folder, 1 suffixless file; "
        "a manifest may name files of any suffix",
        f"{root}: 1 of 4 clips lie in no subfolder and so have no label, e.g. stray.wav",
    )
    put(root / "flat" / "a.wav")
    assert load_manifest(root / "flat").notes == ()
    put(root / "none" / "a.m4a")
    with pytest.raises(ManifestError, match=r"no clips in it.*left out: 1 \.m4a file"):
        load_manifest(root / "none")


def test_every_suffix_that_is_looked_for_can_be_read(tmp_path):
    np, soundfile = pytest.importorskip("numpy"), pytest.importorskip("soundfile")
    from cat.data.audio import read_audio

    formats = {
        **dict.fromkeys([".wav", ".wave", ".bwf"], "WAV"),
        **dict.fromkeys([".aif", ".aiff", ".aifc"], "AIFF"),
        **dict.fromkeys([".ogg", ".oga"], "OGG"),
        **dict.fromkeys([".au", ".snd"], "AU"),
        **dict.fromkeys([".sph", ".nist"], "NIST"),
        **dict.fromkeys([".svx", ".8svx"], "SVX"),
        **{".wve": "WVE"},
    }
    for suffix in AUDIO_SUFFIXES:
        form = formats.get(suffix, suffix[1:].upper())
        subtype = {".opus": "OPUS", ".wve": "ALAW"}.get(suffix)
        path = tmp_path / f"a{suffix}"
        soundfile.write(path, np.zeros(8000), 8000, format="OGG" if suffix == ".opus" else form, subtype=subtype)
        assert len(read_audio(path, 8000)) >= 8000, suffix
    assert len(load_manifest(tmp_path)) == len(AUDIO_SUFFIXES)


def test_names_of_any_bytes(tmp_path):
    folder, name = os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff \n'\".wav")
    try:
        put(tmp_path / folder / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    manifest = load_manifest(tmp_path)
    assert [clip.labels for clip in manifest.clips] == [("caf\\xe9",)]  # text that can be printed
    assert manifest.path(0).exists()
    assert len(manifest.fingerprint) == 64
    write_manifest(manifest, tmp_path / "lists" / "m.jsonl")
    read = load_manifest(tmp_path / "lists" / "m.jsonl")
    assert read.path(0).samefile(tmp_path / folder / name)
    assert read.clips[0].labels == ("caf\\xe9",)
