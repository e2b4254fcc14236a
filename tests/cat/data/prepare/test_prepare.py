"""`cat-audio prepare`: every file is checked, nothing is lost or overwritten, and how it was done changes nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cat.commands import main
from cat.data import AudioError, Clip, Manifest, load_manifest, read_audio, write_manifest
from cat.data.prepare import PrepareConfig, check, convert, prepare_clips, read_source, work
from cat.locks import InUseError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

GOOD = ("bell/0.wav", "bell/1.flac", "bell/2.ogg", "horn/3.wav", "horn/4.wav", "horn/again.flac")
BAD = {
    "bell/cut.wav": "cut off",
    "bell/empty.wav": "empty",
    "horn/constant.wav": "silent",
    "horn/nan.wav": "samples are NaN or infinite",
    "horn/short.wav": "too short",
    "horn/text.wav": "cannot be read",
}


def noise(number: int, samples: int = 5000) -> np.ndarray:
    return 0.1 * np.random.default_rng(number).standard_normal(samples)


@pytest.fixture
def audio(tmp_path) -> Path:
    """A folder of folders: six files of several kinds that can be used, the last one the first one's sound, and one for
    every reason not to."""
    folder = tmp_path / "audio"
    for label in ("bell", "horn"):
        (folder / label).mkdir(parents=True)
    for number, name in enumerate(GOOD):
        rate = 22050 if number == 3 else 16000
        wave = (32768 * noise(number % 5, 5000 + 1000 * (number % 5))).astype(np.int16)
        soundfile.write(folder / name, wave, rate)
    whole = (folder / "bell/0.wav").read_bytes()
    (folder / "bell/cut.wav").write_bytes(whole[:4000])
    (folder / "bell/empty.wav").write_bytes(b"")
    (folder / "horn/text.wav").write_text("no audio")
    soundfile.write(folder / "horn/constant.wav", np.full(5000, 0.3), 16000)
    soundfile.write(folder / "horn/short.wav", noise(0, 300), 16000)
    with_nan = noise(0).astype(np.float32)
    with_nan[4999] = np.nan
    soundfile.write(folder / "horn/nan.wav", with_nan, 16000, subtype="FLOAT")
    return folder


def run(audio: Path, *words: object, out: str = "out") -> int:
    standard = ["--quiet", "--jobs", "1", *map(str, words)]
    return main(["prepare", str(audio), "-o", str(audio.parent / out), *standard])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejected(folder: Path) -> dict[str, str]:
    return {line["path"]: line["reason"] for line in map(json.loads, (folder / "rejected.jsonl").open())}


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """The files that this process checks; a block is kept after every two of them."""
    found: list[str] = []
    before = work.check_file

    def check_file(path, *others):
        found.append(path.name)
        return before(path, *others)

    monkeypatch.setattr(work, "check_file", check_file)
    monkeypatch.setattr(work, "_AT_ONCE", 2)
    monkeypatch.setattr(work, "SECONDS", 0)
    return found


# ---------------------------------------------------------------- what is written


def test_every_file_is_usable_or_rejected_with_its_reason(audio, capsys):
    before = content(audio)
    assert run(audio) == 0
    out = audio.parent / "out"
    assert sorted(content(out)) == [
        "duplicates.jsonl",
        "manifest.jsonl",
        "rejected.jsonl",
        "report.json",
        "report.md",
    ]
    manifest = load_manifest(out / "manifest.jsonl")
    assert [manifest.path(i).resolve() for i in range(len(manifest))] == [audio / name for name in GOOD]
    assert [(clip.samples, clip.sample_rate) for clip in manifest.clips][2:4] == [(7000, 16000), (8000, 22050)]
    reasons = rejected(out)
    assert {str(Path(path).relative_to(audio)) for path in reasons} == set(BAD)
    assert all(BAD[str(Path(path).relative_to(audio))] in reason for path, reason in reasons.items())
    report = json.loads((out / "report.json").read_text())
    assert report["clips"] == {"listed": 12, "usable": 6, "rejected": 6, "dropped": 0}
    assert report["rejected"] == dict.fromkeys(sorted(BAD.values()), 1)
    assert report["sample_rates"] == {"16000": 5, "22050": 1}
    assert report["seconds"]["all"] == pytest.approx((5000 + 6000 + 7000 + 5804 + 9000 + 5000) / 16000)
    assert [(one["label"], one["clips"], round(one["weight"], 1)) for one in report["classes"]] == [
        ("bell", 3, 332.2),
        ("horn", 3, 332.2),
    ]
    assert content(audio) == before
    told = capsys.readouterr().out
    assert "6 of 12 clips" in told
    lines = f"features: {{mean: {report['features']['mean']:.3f}, std: {report['features']['std']:.3f}}}"
    assert lines in told
    assert lines in (out / "report.md").read_text()


def test_the_statistics_are_those_of_the_log_mel_values(audio):
    """Of all frames, however long the file; one that is longer than a crop counts as much as a crop."""
    import torch

    from cat.data.features import FeatureConfig, log_mel

    assert run(audio) == 0
    found = json.loads((audio.parent / "out" / "report.json").read_text())["features"]
    specs = []
    for name in GOOD:
        wave = torch.from_numpy(read_audio(audio / name, 16000))
        frames = 1 + (len(wave) - 400) // 160
        specs.append(log_mel(wave, FeatureConfig(frames=frames, mean=0, std=0.5)).flatten().double())
    values = torch.cat(specs)
    assert found["mean"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert found["std"] == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    assert found["frames"] == found["frames_in_all"] == len(values) // 128

    short = FeatureConfig(frames=10)  # 1840 samples
    records = np.stack([check.check_file(audio / name, PrepareConfig(features=short)) for name in GOOD])
    mean, _, heard = check.statistics(records, short)
    assert heard == pytest.approx(60)
    assert mean == pytest.approx(float(np.mean(records["sum"] / records["frames"])) / 128)


def test_a_recipe_says_which_features(audio):
    recipe = audio.parent / "mine.yaml"
    recipe.write_text("features: {preset: esc50, mel_bins: 40, sample_rate: 8000}\noptim: {steps: 1}\n")
    assert run(audio, "--recipe", recipe, "--convert", "wav") == 0
    report = json.loads((audio.parent / "out/report.json").read_text())
    assert report["made_with"]["features"]["mel_bins"] == 40
    assert soundfile.info(audio.parent / "out/audio/bell/1.wav").samplerate == 8000


def test_converted_files_are_what_training_would_have_read(audio):
    for form in ("wav", "flac"):
        out = audio.parent / form
        assert run(audio, "--convert", form, out=form) == 0
        manifest = load_manifest(out / "manifest.jsonl")
        assert [clip.path for clip in manifest.clips][:2] == [f"audio/bell/0.{form}", f"audio/bell/1.{form}"]
        assert sum(path.is_file() for path in (out / "audio").rglob("*")) == len(GOOD)
        for index, name in enumerate(GOOD):
            about = soundfile.info(manifest.path(index))
            assert (about.samplerate, about.channels, about.subtype) == (16000, 1, "PCM_16")
            assert about.frames == manifest.clips[index].samples
            wave = read_audio(audio / name, 16000)
            difference = np.abs(read_audio(manifest.path(index), 16000) - wave).max()
            assert difference <= (2**-16 * 1.001 if name.endswith(("ogg", "3.wav")) else 0)


def test_what_16_bits_cannot_hold_is_counted():
    samples, over = convert.as_int16(np.array([-1.5, -1.0, 0.0, 32767 / 32768, 1.0], np.float32))
    assert samples.tolist() == [-32768, -32768, 0, 32767, 32767]
    assert over == 2


def test_duplicates_are_told_and_left_out_if_asked(audio):
    soundfile.write(audio / "horn/quiet.wav", 0.5 * noise(0), 16000)  # another sound
    assert run(audio) == 0
    (line,) = map(json.loads, (audio.parent / "out/duplicates.jsonl").open())
    assert [Path(path).name for path in line["paths"]] == ["0.wav", "again.flac"]
    assert line["same_labels"] is False
    assert run(audio, "--drop-duplicates", "--convert", "flac", out="dropped") == 0
    manifest = load_manifest(audio.parent / "dropped/manifest.jsonl")
    assert [Path(clip.path).stem for clip in manifest.clips] == ["0", "1", "2", "3", "4", "quiet"]
    assert not (audio.parent / "dropped/audio/horn/again.flac").exists()
    report = json.loads((audio.parent / "dropped/report.json").read_text())
    assert report["duplicates"] == {"groups": 1, "clips": 1, "with_other_labels": 1}
    assert report["clips"]["dropped"] == 1


def test_fields_of_a_manifest_stay_and_its_embeddings_do_not(audio):
    np.save(audio / "rows.npy", np.zeros((3, 4), np.float32))
    clips = [Clip(name, 1, 2, ("x",), i, {"speaker": i}) for i, name in enumerate(("bell/0.wav", "bell/1.flac"))]
    clips.append(Clip("horn/text.wav", labels=("gone",), embedding=2))
    names = {"gone": "Gone", "x": "X"}
    given = Manifest(clips, audio, embeddings=audio / "rows.npy", label_names=names, extra={"licence": "mine"})
    write_manifest(given, audio / "given.jsonl")
    assert main(["prepare", str(audio / "given.jsonl"), "-o", str(audio.parent / "out"), "--quiet"]) == 0
    manifest = load_manifest(audio.parent / "out/manifest.jsonl")
    assert [(clip.samples, clip.embedding, clip.extra) for clip in manifest.clips] == [
        (5000, None, {"speaker": 0}),
        (6000, None, {"speaker": 1}),
    ]
    assert (manifest.embeddings, manifest.label_names, manifest.extra) == (None, {"x": "X"}, {"licence": "mine"})
    notes = " ".join(json.loads((audio.parent / "out/report.json").read_text())["notes"])
    assert "no clip is left of 1 classes: gone" in notes
    assert "cat-audio embed makes new ones" in notes


def test_names_of_converted_files_are_all_different():
    paths = ["a.wav", "a.mp3", "b.wav", "A.ogg", "./b.wav", "c", "d.e/f.wav"]
    names = convert.Names(Manifest([Clip(path) for path in paths], Path("/data")), ".flac")
    found = [names[place] for place in range(len(paths))]
    assert found[2] == found[4] == "b.flac"  # one file
    assert found[5:] == ["c.flac", "d.e/f.flac"]
    assert [re.sub("~[0-9a-f]{12}", "~", name) for name in (found[0], found[1], found[3])] == ["a~.flac"] * 2 + [
        "A~.flac"
    ]
    assert len({name.casefold() for name in found}) == len(paths) - 1
    outside = convert.Names(Manifest([Clip("../x/a.wav"), Clip("/y/b.wav")], Path("/data/z")), ".wav")
    assert [outside[0], outside[1]] == ["data/x/a.wav", "y/b.wav"]


def test_file_names_of_any_bytes(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (folder / "a b").mkdir(parents=True)
    for name in (b"caf\xe9.wav", b"new\nline.wav", b'quote".wav'):
        path = folder / "a b" / os.fsdecode(name)
        with open(path, "wb") as file:
            soundfile.write(file, noise(len(name)), 16000, format="WAV")
    (folder / "a b" / os.fsdecode(b"bad\xe9.wav")).write_bytes(b"x")
    words = ["prepare", str(folder), "--convert", "flac", "--quiet", "--jobs", "1", "-o"]
    assert main([*words, str(tmp_path / "out")]) == 0
    manifest = load_manifest(tmp_path / "out/manifest.jsonl")
    assert len(manifest) == 3
    assert all(manifest.path(index).is_file() for index in range(3))


def test_shards_of_what_can_be_used_and_out_of_shards(audio, capsys):
    assert run(audio, "--shards", "20kB") == 0
    out = audio.parent / "out"
    sharded, listed = load_manifest(out / "shards"), load_manifest(out / "manifest.jsonl")
    assert [clip.labels for clip in sharded.clips] == [clip.labels for clip in listed.clips]
    assert len(list((out / "shards").glob("*.tar"))) > 1
    before = content(out)
    assert run(audio, "--shards", "20kB") == 0
    assert content(out) == before
    assert run(out / "shards", "--min-seconds", "0.35", out="../less") == 0
    less = load_manifest(out.parent / "less/manifest.jsonl")
    assert [Path(clip.path).name for clip in less.clips] == ["1.flac", "2.ogg", "3.wav", "4.wav"]
    assert np.array_equal(read_audio(less.audio(0), 16000), read_audio(audio / "bell/1.flac", 16000))
    capsys.readouterr()
    assert run(audio, "--shards", "many", out="other") == 1
    assert "--shards is 'many'; expected a size such as 256MB" in capsys.readouterr().err
    assert not (out.parent / "other").exists()


# ---------------------------------------------------------------- AudioSet


@pytest.fixture
def audioset(tmp_path) -> Path:
    (tmp_path / "files/deep").mkdir(parents=True)
    soundfile.write(tmp_path / "files/deep/Y-abcdefghij.wav", noise(1), 16000)
    soundfile.write(tmp_path / "files/Yabcdefghij0_30.000.flac", noise(2), 16000)
    (tmp_path / "files/Ymissing-000.m4a").touch()
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/m/0dgw9r,"Other"\n'
    )
    header = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=3\n# YTID, start, end, positive_labels\n"
    (tmp_path / "balanced_train_segments.csv").write_text(
        f'{header}-abcdefghij, 30.000, 40.000, "/m/09x0r,/m/05zppz"\nabcdefghij0, 30.000, 40.000, "/m/09x0r"\n'
    )
    (tmp_path / "unbalanced_train_segments.csv").write_text(f'{header}missing-000, 0.000, 10.000, "/m/09x0r"\n')
    return tmp_path


def test_audiosets_lists(audioset, capsys):
    tables = [str(audioset / f"{name}_segments.csv") for name in ("balanced_train", "unbalanced_train")]
    words = ["--audio", str(audioset / "files"), "--quiet", "--convert", "flac"]
    assert main(["prepare", *tables, *words, "-o", str(audioset / "out")]) == 0
    manifest = load_manifest(audioset / "out/manifest.jsonl")
    assert [(clip.path, clip.labels) for clip in manifest.clips] == [
        ("audio/deep/Y-abcdefghij.flac", ("/m/09x0r", "/m/05zppz")),
        ("audio/Yabcdefghij0_30.000.flac", ("/m/09x0r",)),
    ]
    assert manifest.label_names == {"/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking"}
    assert rejected(audioset / "out") == {
        "missing-000 from 0.000 s": f"no file of this video (looked in {audioset / 'files'})"
    }
    told = capsys.readouterr()
    assert "1 rejected: 1 no file of this video" in told.out
    assert "left out: 1 .m4a file" in told.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["balanced_train_segments.csv", "files"], "expected one folder of audio, one manifest, or"),
        (["files", "--audio", "files"], "to which --audio belongs"),
        (["balanced_train_segments.csv", "--audio", "nowhere"], "nowhere: no such folder"),
        (["eval_segments.csv", "--audio", "files"], "eval_segments.csv: no such file; AudioSet's lists"),
        (["unbalanced_train_segments.csv", "--audio", "files"], "files: no file of the 1 videos in unbalanced"),
        (["files", "--min-seconds", "-1"], "min_seconds is -1.0; expected 0 or more"),
        (["files", "--silence", "3"], "silence_db is 3.0; expected 0 or less"),
        (["files", "--jobs", "0"], "0 jobs; expected at least 1"),
        (["files", "--max-rejected-share", "2"], "max_rejected_share is 2.0; expected a share"),
        (["files", "-o", "files/out"], "files/out lies in files, in which all audio is a clip"),
        (["files", "-o", "class_labels_indices.csv"], "is a file; expected a folder to fill"),
    ],
)
def test_what_cannot_be(audioset, monkeypatch, capsys, words, told):
    monkeypatch.chdir(audioset)
    assert main(["prepare", "-o", "out", *words]) == 1
    assert told in capsys.readouterr().err
    assert not (audioset / "out").exists()


# ---------------------------------------------------------------- stopped and going on


def undisturbed(audio: Path, *words: object) -> dict[str, bytes]:
    assert run(audio, *words, out="two") == 0
    return content(audio.parent / "two")


def test_any_number_of_processes_gives_the_same_files(audio, monkeypatch):
    monkeypatch.setattr(work, "_AT_ONCE", 2)
    assert run(audio, "--convert", "flac", "--jobs", "2") == 0
    assert content(audio.parent / "out") == undisturbed(audio, "--convert", "flac")


KILLED = """
import itertools, os, sys
from cat.commands import main
from cat.data.prepare import convert, work
work.SECONDS, work._AT_ONCE = 0, 2
write, calls = convert.Writer.write, itertools.count(1)
convert.Writer.write = lambda *a: (write(*a), os.kill(os.getpid(), 9) if next(calls) == 5 else None)
main(sys.argv[1:])
"""


def test_killed_it_goes_on_and_writes_the_same_files(audio, checked):
    """Killed while it writes the audio of a file."""
    words = ["prepare", str(audio), "-o", str(audio.parent / "out"), "--jobs", "1", "--convert", "flac"]
    assert subprocess.run([sys.executable, "-c", KILLED, *words], check=False).returncode == -signal.SIGKILL
    assert not any((audio.parent / "out" / name).exists() for name in ("manifest.jsonl", "audio", "report.json"))
    assert run(audio, "--convert", "flac") == 0
    assert checked[0] == "4.wav"
    assert content(audio.parent / "out") == undisturbed(audio, "--convert", "flac")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_keeps_all_that_is_done(audio, checked, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        patch.setattr(work, "SECONDS", 3600)  # no block is due
        before, calls = work.check_file, itertools.count(1)
        patch.setattr(work, "check_file", lambda *a: os.kill(os.getpid(), number) if next(calls) == 5 else before(*a))
        assert run(audio) == 128 + number
    assert f"4 of 12 files are done, in {audio.parent / 'out'}; the same command goes on" in capsys.readouterr().err
    checked.clear()
    assert run(audio) == 0
    assert len(checked) == 8
    assert content(audio.parent / "out") == undisturbed(audio)


def test_stopped_before_anything_is_done_it_leaves_nothing(audio, monkeypatch):
    before, calls = work.check_file, itertools.count(1)
    monkeypatch.setattr(
        work, "check_file", lambda *a: os.kill(os.getpid(), signal.SIGINT) if next(calls) == 3 else before(*a)
    )
    assert run(audio, "--convert", "flac") == 130
    assert not (audio.parent / "out").exists()


def test_a_second_process_is_refused(audio, checked, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        held: list[str] = []
        patch.setattr(work, "_check_rest", lambda *_: held.append(try_again(audio)))
        assert run(audio) == 1  # nothing was checked
    assert "out is in use by another thread of this process; another prepare fills it: wait for it" in held[0]
    assert checked == []


def try_again(audio: Path) -> str:
    """What a thread is told that prepares the same."""
    told: list[str] = []

    def again() -> None:
        try:
            prepare_clips(read_source([audio]), audio.parent / "out", jobs=1)
        except InUseError as error:
            told.append(str(error))

    thread = threading.Thread(target=again)
    thread.start()
    thread.join(60)
    return told[0]


def test_stopped_between_the_files_it_writes(audio, checked, monkeypatch):
    """The audio has its name, the manifest has not."""
    words = ("--convert", "wav", "--drop-duplicates")
    with monkeypatch.context() as patch:
        patch.setattr(work, "write_manifest", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(audio, *words) == 130
    assert (audio.parent / "out/audio").exists()
    checked.clear()
    assert run(audio, *words) == 0
    assert checked == []
    assert content(audio.parent / "out") == undisturbed(audio, *words)


def test_a_full_disk(audio, checked, monkeypatch, capsys):
    class Full(convert._Sink):
        def write(self, content):
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(content)

    with monkeypatch.context() as patch:
        calls = itertools.count(1)
        patch.setattr(convert, "_Sink", lambda path: (Full if next(calls) == 6 else sink)(path))
        sink = Full.__mro__[1]
        assert run(audio, "--convert", "flac") == 1
    told = capsys.readouterr().err
    assert "audio.partial/horn/3.flac: No space left on device" in told
    assert "of 12 files are done" in told
    assert not (audio.parent / "out/audio.partial/horn/3.flac").exists()
    checked.clear()
    assert run(audio, "--convert", "flac") == 0
    assert "0.wav" not in checked
    assert content(audio.parent / "out") == undisturbed(audio, "--convert", "flac")


def test_a_file_that_changes_meanwhile_is_checked_again(audio, checked, monkeypatch, capsys):
    rest = work._check_rest

    def then_change(*arguments):
        rest(*arguments)
        soundfile.write(audio / "bell/0.wav", noise(7), 16000)

    with monkeypatch.context() as patch:
        patch.setattr(work, "_check_rest", then_change)
        assert run(audio) == 1
    assert "audio files have changed since they were checked; the same command does it again" in capsys.readouterr().err
    checked.clear()
    assert run(audio) == 0
    assert checked == ["0.wav", "1.flac"]
    assert content(audio.parent / "out") == undisturbed(audio)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_not_as_it_was_written_is_written_again(audio, checked, monkeypatch, capsys, damage):
    """By the power, or by somebody who clears up."""
    with monkeypatch.context() as patch:
        patch.setattr(work, "_assemble", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(audio, "--convert", "flac") == 130
    path = audio.parent / "out/audio.partial/horn/4.flac"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert run(audio, "--convert", "flac") == 1
    assert f"1 files are not, or no longer, what was written, such as {path}; the same command writes them again" in (
        capsys.readouterr().err
    )
    checked.clear()
    assert run(audio, "--convert", "flac") == 0
    assert checked == ["4.wav", "again.flac"]
    assert content(audio.parent / "out") == undisturbed(audio, "--convert", "flac")


def test_what_a_killed_writer_left_is_in_nobodys_way(audio, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(work, "_assemble", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(audio) == 130
    left = audio.parent / "out/.manifest.jsonl.abcdefgh.tmp"
    left.mkdir()
    (left / ".lock").write_text(socket.gethostname())
    assert run(audio) == 0
    assert not left.exists()


def test_another_job_is_refused_with_the_reason(audio, checked, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(work, "_assemble", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(audio) == 130
    before = content(audio.parent / "out")
    assert run(audio, "--min-seconds", "0.1") == 1
    told = capsys.readouterr().err
    assert "min_seconds was 0.0, now 0.1. The results of both would not fit together" in told
    (audio / "horn/4.wav").unlink()
    assert run(audio) == 1
    assert "the data set had 12 clips, now 11" in capsys.readouterr().err
    assert content(audio.parent / "out") == before


# ---------------------------------------------------------------- nothing of the user's


def test_a_second_call_does_nothing(audio, checked, capsys):
    assert run(audio, "--convert", "flac") == 0
    before = content(audio.parent / "out")
    first = capsys.readouterr().out
    checked.clear()
    assert run(audio, "--convert", "flac") == 0
    assert checked == []
    assert capsys.readouterr().out == first.replace(" hours\n", " hours, as it was before\n")
    for words, told in [
        (("--convert", "wav"), "convert was flac, now wav"),
        (("--convert", "flac", "--drop-duplicates"), "drop_duplicates was False, now True"),
    ]:
        assert run(audio, *words) == 1
        assert f"holds what another prepare has made: {told}" in capsys.readouterr().err
    os.utime(audio / "bell/0.wav")
    assert run(audio, "--convert", "flac") == 1
    assert "audio files have changed since" in capsys.readouterr().err
    assert content(audio.parent / "out") == before


@pytest.mark.parametrize("name", ["notes.txt", "manifest.jsonl", "audio/mine.flac", "report.json", "partial/job.json"])
def test_a_folder_of_the_users_is_left_alone(audio, capsys, name):
    path = audio.parent / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    assert run(audio, "--convert", "flac") == 1
    assert "Give another -o" in capsys.readouterr().err
    assert content(audio.parent / "out") == {name: b'{"mine": 1}'}


def test_too_many_rejected_are_told_without_a_manifest(audio, checked, capsys):
    assert run(audio, "--max-rejected-share", "0.4") == 1
    out = audio.parent / "out"
    told = capsys.readouterr().err
    assert "6 of 12 files are rejected, more than the allowed share of 0.4" in told
    assert set(map(Path, rejected(out))) == {audio / name for name in BAD}
    assert not (out / "manifest.jsonl").exists()
    checked.clear()
    assert run(audio) == 0
    assert checked == []
    assert content(out) == undisturbed(audio)


def test_nothing_that_can_be_used(audio, capsys):
    assert run(audio, "--min-seconds", "60", "--max-rejected-share", "1") == 1
    assert "12 of 12 files are rejected, none can be used: 9 too short, 1 cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------- a file


def test_silence_is_what_never_moves_enough(tmp_path):
    def peak(wave: np.ndarray) -> float:
        soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
        return float(check.check_file(tmp_path / "a.wav", PrepareConfig())["peak"])

    assert peak(np.full(5000, 0.5) + 2e-4 * np.sin(np.arange(5000))) == pytest.approx(2e-4, rel=1e-3)
    with pytest.raises(AudioError, match=r"silent: its peak is -86.0 dB of full scale, at least -80 are needed"):
        peak(5e-5 * np.sin(np.arange(5000)))
    silent = check.check_file(tmp_path / "a.wav", PrepareConfig(silence_db=-np.inf))
    assert silent["frames"] == 29


def test_a_long_file_is_measured_piece_by_piece(tmp_path, monkeypatch):
    """Memory does not grow with it, and what is measured is that of its pieces."""
    monkeypatch.setattr(check, "_READ_SECONDS", 2)
    soundfile.write(tmp_path / "a.wav", noise(0, 80_000), 16000)
    record = check.check_file(tmp_path / "a.wav", PrepareConfig(), tmp_path / "b.flac")
    assert record["heard"] == record["samples"] == 80_000
    assert 490 < record["frames"] < 498  # frames across the edges of three windows are in none
    assert np.array_equal(soundfile.read(tmp_path / "b.flac")[0], soundfile.read(tmp_path / "a.wav")[0])


def test_a_wav_file_cannot_hold_more_than_4_gb(tmp_path, monkeypatch):
    monkeypatch.setitem(convert._MOST_BYTES, "wav", 9000)
    soundfile.write(tmp_path / "a.wav", noise(0), 16000)
    with pytest.raises(AudioError, match="too long for a WAV file, which holds 4 GB: convert to flac"):
        check.check_file(tmp_path / "a.wav", PrepareConfig(convert="wav"), tmp_path / "b.wav")
    assert not (tmp_path / "b.wav").exists()


def test_from_python(audio, tmp_path):
    prepared = prepare_clips(read_source([audio]), tmp_path / "x" / "y", jobs=1)
    assert prepared.fresh
    assert len(load_manifest(prepared.manifest)) == 6
    assert not prepare_clips(read_source([audio]), tmp_path / "x" / "y", jobs=1).fresh
