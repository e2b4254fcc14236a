"""`cat-audio synth`: valid, varied, reproducible, and safe to run again."""

import hashlib
import json
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


def test_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cat.data.synth.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        synthesise(SynthConfig(1, 1, seconds=(0.2, 0.2), classes=("rain", "wind")), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


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
