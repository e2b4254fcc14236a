"""``cat-audio predict`` on files: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from cat.commands import main
from cat.figures import is_figure
from cat.figures.prediction import _heard
from cat.prediction import CATClassifier, EventSettings
from cat.prediction.events import write_settings

soundfile = pytest.importorskip("soundfile")

RATE = 16000


@pytest.fixture
def clip(tmp_path, sound):
    path = tmp_path / "clip.wav"
    soundfile.write(path, sound(3.2, ("low", 0.48, 1.6), ("high", 2.4, 3.2)), RATE)
    return path


@pytest.fixture
def run_with_tones(monkeypatch, tones):
    """The command, whose checkpoint hears tones."""
    monkeypatch.setattr(CATClassifier, "from_pretrained", lambda path, device=None: tones)
    return lambda *arguments: main(["predict", "run", "--quiet", *map(str, arguments)])


def test_a_table(save_run, clip, capsys):
    assert main(["predict", str(save_run()), str(clip), "--top", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{clip}      3.20 s  ")
    expected = CATClassifier.from_pretrained(save_run())(soundfile.read(clip)[0], RATE)
    (label, score), _ = expected.top(2)[0]
    name = dict(zip(expected.classes, expected.names, strict=True))[label]
    assert line.split("  ")[-2] == f"{name} {score:.3f}"


def test_a_bad_file_is_told_and_the_others_are_done(run_with_tones, clip, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no audio")
    assert run_with_tones(bad, clip, tmp_path / "gone.wav", "--top", "1") == 1
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.split("/")[-1].split()[0] for line in lines] == ["bad.wav", "clip.wav", "gone.wav"]
    assert "failed: no such file" in lines[2]
    assert f"2 of 3 files failed. The first: {bad}: cannot be read" in output.err


def test_json_and_csv_on_stdout(run_with_tones, clip, capsys):
    assert run_with_tones(clip, "--json", "-", "--windows", "--top", "0") == 0
    row = json.loads(capsys.readouterr().out)
    assert [entry["label"] for entry in row["scores"]] == ["low", "high", "none"]
    assert row["windows"][0]["begin"] == 0
    assert row["windows"][-1]["end"] == 3.2
    assert run_with_tones(clip, "--csv", "-", "--events") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["label"], row["onset"], row["offset"]) for row in table] == [
        ("low", "0.48", "1.6"),
        ("high", "2.4", "3.2"),
    ]


def test_events_by_the_runs_settings_and_by_those_said(run_with_tones, tones, clip, capsys):
    chosen = {"low": EventSettings(), "high": EventSettings(0.999), "none": EventSettings()}
    write_settings(tones.info.path.parent / "events.json", chosen, {})
    assert run_with_tones(clip, "--events") == 0
    assert capsys.readouterr().out.split()[1:] == ["0.48", "-", "1.60", "s", "0.990", "Low", "tone"]
    assert run_with_tones(clip, "--events", "--threshold", "0.9", "--shortest", "1.2") == 0
    assert capsys.readouterr().out.split()[1:] == ["no", "events", "in", "3.20", "s"]
    assert run_with_tones(clip, "--events", "--median", "2") == 1
    assert "expected an odd number of rows" in capsys.readouterr().err


def test_a_picture_of_one_file(run_with_tones, tones, clip, tmp_path, capsys):
    picture = tmp_path / "heard.png"
    assert run_with_tones(clip, "--events", "--picture", picture) == 0
    assert is_figure(picture)
    assert run_with_tones(clip, "--picture", picture) == 0  # its own is replaced
    picture.write_bytes(b"mine")
    for arguments, message in (
        ((clip, "--picture", picture), "it is left alone"),
        ((clip, clip.with_name("b.wav"), "--picture", picture), "--picture shows one file"),
        ((clip, "--picture", tmp_path / "heard.jpg"), "ends in .png"),
    ):
        assert run_with_tones(*arguments) == 1
        assert message in capsys.readouterr().err
    assert picture.read_bytes() == b"mine"


def test_a_picture_shows_what_is_heard_when(tones, save_run, sound):
    wave = sound(3.2, ("low", 0.48, 1.6))
    edges, scores, events = _heard(tones, wave, tones.plan(), dict.fromkeys(tones.classes, EventSettings()))
    assert (edges[0], edges[-1], len(edges)) == (0, 3.2, 21)
    assert np.flatnonzero(scores[:, 0] > 0.5).tolist() == list(range(3, 10))
    assert [(event.onset, event.offset) for event in events] == [(pytest.approx(0.48), pytest.approx(1.6))]
    clips = CATClassifier.from_pretrained(save_run())
    edges, scores, events = _heard(clips, wave, clips.plan(window=1.0, hop=0.32), None)
    assert len(edges) == len(scores) + 1
    assert (np.diff(edges) > 0).all()
    assert events == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-",), "- is stdin, which is read with --stream"),
        (("a.wav", "--top", "-1"), "--top is -1"),
        (("a.wav", "--json", "-", "--csv", "-"), "would both write to -"),
        (("a.wav", "--hop", "9"), "expected hop and lookahead within the window"),
        (("a.wav", "--batch-size", "0"), "batch_size is 0"),
    ],
)
def test_what_cannot_be(run_with_tones, arguments, message, capsys):
    assert run_with_tones(*arguments) == 1
    assert message in capsys.readouterr().err


def test_events_of_a_clip_head(save_run, clip, capsys):
    assert main(["predict", str(save_run()), str(clip), "--events"]) == 1
    assert "cat-audio finetune task=events" in capsys.readouterr().err
