"""`cat-audio synth`: valid, varied, reproducible, and safe to run again."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from cat.commands import main
from cat.data.manifest import load_manifest
from cat.data.synth import SPLITS, SynthConfig, clip_rng, synthesise
from cat.sounds import CLASSES, make_clip

soundfile = pytest.importorskip("soundfile")

SMALL = SynthConfig(clips_per_class=3, eval_clips_per_class=1, seconds=(0.3, 0.6))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "set"
    assert synthesise(SMALL, out)
    return out


def test_manifests_describe_the_files(data_set: Path) -> None:
    for split in SPLITS:
        manifest = load_manifest(data_set / f"{split}.jsonl")
        assert manifest.classes == tuple(CLASSES)
        assert len(manifest) == len(CLASSES) * SMALL.clips_of(split)
        for index, clip in enumerate(manifest.clips):
            info = soundfile.info(manifest.path(index))
            assert (info.frames, info.samplerate) == (clip.samples, clip.sample_rate)
            assert manifest.path(index).parent.name == clip.labels[0]


def test_files_vary(data_set: Path) -> None:
    """Rates, formats, sample formats, channels, lengths and levels differ inside the training split."""
    manifest = load_manifest(data_set / "train.jsonl")
    infos = [soundfile.info(manifest.path(index)) for index in range(len(manifest))]
    assert {info.samplerate for info in infos} >= {8000, 16000, 44100, 48000}
    assert {info.format for info in infos} == {"WAV", "FLAC", "OGG"}
    assert {info.subtype for info in infos} >= {"PCM_16", "PCM_24", "PCM_32", "VORBIS"}
    assert {info.channels for info in infos} == {1, 2}
    assert all(0.29 < info.duration < 0.61 for info in infos)
    peaks = [np.abs(soundfile.read(manifest.path(index))[0]).max() for index in range(len(manifest))]
    assert max(peaks) / min(peaks) > 8


def test_same_seed_same_samples_and_files(data_set: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    synthesise(SMALL, again)
    paths = sorted(path.relative_to(data_set) for path in data_set.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for path in paths:
        if path.suffix == ".ogg":
            first, second = (soundfile.read(folder / path)[0] for folder in (data_set, again))
            np.testing.assert_array_equal(first, second)
        else:
            digests = {hashlib.sha256((folder / path).read_bytes()).digest() for folder in (data_set, again)}
            assert len(digests) == 1, path


def test_another_seed_other_sounds() -> None:
    clips = [make_clip(clip_rng(seed, "train", "bell", 0), "bell", (0.5, 0.5), (10, 10))[0] for seed in (0, 1)]
    assert clips[0].shape != clips[1].shape or not np.allclose(clips[0], clips[1])


def test_more_clips_and_fewer_classes_change_no_clip(data_set: Path, tmp_path: Path) -> None:
    synthesise(SynthConfig(4, 1, seconds=SMALL.seconds, classes=("wind", "bell")), tmp_path / "more")
    for label in ("wind", "bell"):
        for path in (data_set / "train" / label).glob("*.[wf]*"):
            assert (tmp_path / "more" / "train" / label / path.name).read_bytes() == path.read_bytes()


def test_no_clip_is_in_two_splits(data_set: Path) -> None:
    files = [path for path in data_set.rglob("*") if path.suffix in (".wav", ".flac")]
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in files}) == len(files)


@pytest.mark.parametrize("label", CLASSES)
def test_every_class_is_finite_audible_and_varies(label: str) -> None:
    spectra = []
    for number in range(4):
        clip, rate = make_clip(np.random.default_rng([7, number]), label, (0.8, 0.8), (60, 60))
        assert np.isfinite(clip).all()
        peak = np.abs(clip).max()
        assert 10 ** (-27 / 20) < peak <= 1
        # Sparse sounds (clicks) are silent for most of the time, but not for all of it.
        assert np.mean(np.abs(clip[0]) > 0.05 * peak) > 0.001
        frequencies, amplitudes = np.fft.rfftfreq(clip.shape[1], 1 / rate), np.abs(np.fft.rfft(clip[0]))
        bands, _ = np.histogram(frequencies, np.geomspace(60, 4000, 17), weights=amplitudes)
        spectra.append(bands / bands.sum())
    distances = [np.abs(a - b).sum() / 2 for i, a in enumerate(spectra) for b in spectra[:i]]
    assert max(distances) > 0.1


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("seconds", [0.1, 6.0])
def test_every_class_at_awkward_lengths(label: str, seconds: float) -> None:
    clip, rate = make_clip(np.random.default_rng(3), label, (seconds, seconds), (0, 0))
    assert clip.shape[1] == int(seconds * rate)
    assert np.isfinite(clip).all()


def test_run_again_does_nothing_and_other_settings_need_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    small = [
        "--clips-per-class",
        "1",
        "--eval-clips-per-class",
        "1",
        "--seconds",
        "0.2",
        "0.3",
        "--classes",
        "rain",
        "siren",
    ]
    assert main(["synth", str(out), *small]) == 0
    assert "(made)" in capsys.readouterr().out
    before = (out / "train.jsonl").stat().st_mtime_ns
    assert main(["synth", str(out), *small]) == 0
    assert "(already there)" in capsys.readouterr().out
    assert (out / "train.jsonl").stat().st_mtime_ns == before
    assert main(["synth", str(out), *small, "--seed", "1"]) == 1
    assert "--force" in capsys.readouterr().err
    assert json.loads((out / "synth.json").read_text())["seed"] == 0
    assert main(["synth", str(out), *small, "--seed", "1", "--force"]) == 0
    assert json.loads((out / "synth.json").read_text())["seed"] == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["synth", str(tmp_path), "--force"]) == 1
    assert "not made by cat-audio synth" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


MINUTE = SynthConfig(2, 1, seconds=(0.1, 0.1), classes=("rain", "wind"))
OTHER = SynthConfig(1, 1, seed=1, seconds=(0.1, 0.1), classes=("rain", "bell"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    """OGG files have random bytes in them."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A data set in a folder that somebody has put own files into."""
    out = tmp_path / "set"
    synthesise(MINUTE, out)
    mine = {
        "notes.txt": b"years of work",
        "clap/e.npy": b"embeddings",
        "train/wind/mine.wav": b"a recording",
        "train/rain/rain-00009.wav": b"another one",
    }
    for name, content in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    return out, mine


def test_force_replaces_its_own_files_alone(mixed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    out, mine = mixed
    synthesise(OTHER, out, force=True)
    synthesise(OTHER, tmp_path / "fresh")
    assert {name: content for name, content in contents(out).items() if name in mine} == mine
    assert names(out) - names(tmp_path / "fresh") == {*mine, "clap", "train/wind"}
    assert names(tmp_path / "fresh") <= names(out)
    assert not synthesise(OTHER, out)


def test_a_data_set_of_before_files_were_listed(mixed: tuple[Path, dict[str, bytes]]) -> None:
    out, mine = mixed
    settings = json.loads((out / "synth.json").read_text())
    del settings["files"]
    (out / "synth.json").write_text(json.dumps(settings))
    assert not synthesise(MINUTE, out)
    synthesise(OTHER, out, force=True)
    assert {name: content for name, content in contents(out).items() if name in mine} == mine
    assert not list(out.rglob("wind-*"))


@pytest.mark.parametrize("name", ["train.jsonl", "train/rain/rain-00000*", "train/bell/bell-00000.new"])
def test_force_stops_before_what_was_changed(
    mixed: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file of the old data set that has been edited, and one of somebody else's where a new one would be."""
    out, _ = mixed
    if name.endswith(".new"):
        synthesise(OTHER, tmp_path / "fresh")
        changed = out / next((tmp_path / "fresh").glob("train/bell/*")).relative_to(tmp_path / "fresh")
        changed.parent.mkdir()
    else:
        changed = next(out.glob(name))
    content = changed.read_bytes() if changed.exists() else b"a recording"
    changed.write_bytes(content.replace(b"rain-00000", b"rain-00001") if changed.suffix == ".jsonl" else content + b".")
    before = contents(out)
    monkeypatch.setattr("cat.data.synth.make_clip", None)  # before any work
    with pytest.raises(FileExistsError, match=rf"{changed.name} is not, or no longer, what cat-audio synth wrote"):
        synthesise(OTHER, out, force=True)
    assert contents(out) == before


def test_force_deletes_nothing_that_no_data_set_has(mixed: tuple[Path, dict[str, bytes]]) -> None:
    out, mine = mixed
    (out.parent / "precious").write_bytes(b"123")
    settings = json.loads((out / "synth.json").read_text())
    settings["files"] |= {"../precious": zlib.crc32(b"123"), "notes.txt": zlib.crc32(mine["notes.txt"])}
    (out / "synth.json").write_text(json.dumps(settings))
    synthesise(OTHER, out, force=True)
    assert (out.parent / "precious").exists()
    assert (out / "notes.txt").read_bytes() == mine["notes.txt"]


def test_killed_while_replacing_it_can_be_done_again(
    mixed: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mine = mixed
    real, calls = os.replace, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        calls.extend([target] if "/train/" in str(target) else [])
        if len(calls) == 2:
            raise OSError("no more")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail_at_the_second)
        with pytest.raises(OSError, match="no more"):
            synthesise(OTHER, out, force=True)
    with pytest.raises(FileExistsError, match="was interrupted; finish it with --force"):
        synthesise(OTHER, out)
    synthesise(OTHER, out, force=True)
    synthesise(OTHER, tmp_path / "fresh")
    assert names(out) - names(tmp_path / "fresh") == {*mine, "clap", "train/wind"}
    assert not synthesise(OTHER, out)


def test_a_data_set_with_a_hole(tmp_path: Path) -> None:
    synthesise(MINUTE, tmp_path / "set")
    next((tmp_path / "set").glob("valid/wind/*")).unlink()
    with pytest.raises(FileExistsError, match=r"not complete, valid/wind/wind-00000.* is missing; .* --force"):
        synthesise(MINUTE, tmp_path / "set")
    assert synthesise(MINUTE, tmp_path / "set", force=True)
    assert not synthesise(MINUTE, tmp_path / "set")


@pytest.mark.parametrize("exists", ["no", "empty", "a data set"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=lambda v: str(v)
)
def test_stopped_by_a_signal_it_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: str, number: int, code: int
) -> None:
    out = tmp_path / "set"
    if exists == "a data set":
        synthesise(MINUTE, out)
    elif exists == "empty":
        out.mkdir()
    before, there = contents(tmp_path), names(tmp_path)
    monkeypatch.setattr("cat.data.synth.make_clip", lambda *_: os.kill(os.getpid(), number) or time.sleep(60))
    assert main(["synth", str(out), "--force", "--quiet"]) == code
    assert contents(tmp_path) == before
    assert names(tmp_path) == there


def test_what_a_killed_one_left_goes_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "set"
    code = (
        "import os, sys, cat.data.synth as synth\n"
        "synth.make_clip = lambda *_: os._exit(9)\n"
        "synth.synthesise(synth.SynthConfig(), sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    synthesise(MINUTE, out)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["synth", str(tmp_path / "set"), "--quiet"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "set").symlink_to("real")
    assert synthesise(MINUTE, tmp_path / "set")
    assert synthesise(OTHER, tmp_path / "set", force=True)
    assert (tmp_path / "set").is_symlink()
    assert len(load_manifest(tmp_path / "real" / "train.jsonl")) == 2


def test_quiet_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--clips-per-class",
        "1",
        "--eval-clips-per-class",
        "1",
        "--seconds",
        "0.1",
        "0.1",
        "--classes",
        "rain",
        "wind",
    ]
    assert main(["synth", str(tmp_path / "a"), *small]) == 0
    assert "synth: 6/6 clips" in capsys.readouterr().err
    assert main(["synth", str(tmp_path / "b"), *small, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips_per_class": 0}, "clips_per_class is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seconds": (2.0, 1.0)}, "shortest <= longest"),
        ({"seconds": (0.0, 1.0)}, "0.1 <= shortest"),
        ({"snr_db": (30.0, 5.0)}, "noisiest, cleanest"),
        ({"classes": ("bell", "gong")}, "gong unknown"),
        ({"classes": ("bell", "bell")}, "two or more different"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthConfig(**settings)
