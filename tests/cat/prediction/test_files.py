"""Predictions of files: all of them, in order, each once, whatever is wrong with some."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from cat.data import load_manifest
from cat.data.listing import listed_files
from cat.data.manifest import ManifestError
from cat.evaluation.events import hear_clips, write_chosen
from cat.outputs import OutputError
from cat.prediction import CATClassifier, EventSettings
from cat.prediction.events import read_settings
from cat.prediction.files import predict_files
from cat.prediction.outputs import write_predictions

soundfile = pytest.importorskip("soundfile")

RATE = 16000
EVENTS = dict.fromkeys(("low", "high", "none"), EventSettings())


@pytest.fixture
def folder(tmp_path, sound):
    """Three good files, one of them long, and two that are not."""
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "a.wav", sound(1.0, ("low", 0.16, 0.8)), RATE)
    soundfile.write(folder / "b.flac", sound(70.08, ("high", 30.08, 62.4), ("low", 69.76, 71)), RATE)
    (folder / "c.wav").write_bytes(b"not audio")
    soundfile.write(folder / "d.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "e.wav", sound(0.5), RATE)
    return folder


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_file_has_its_result_in_order(tones, folder, batch_size):
    results = list(predict_files(tones, listed_files([folder]), batch_size=batch_size))
    assert [result.path.rpartition("/")[2] for result in results] == ["a.wav", "b.flac", "c.wav", "d.wav", "e.wav"]
    assert [result.error is None for result in results] == [True, True, False, False, True]
    assert [result.seconds for result in results if result.error is None] == [1, 70.08, 0.5]
    assert results[1].scores.clip.tolist() == pytest.approx([0.99, 0.99, 0.01], abs=0.2)
    assert results[4].scores.clip.max() < 0.1


def test_events_of_long_files_are_neither_cut_nor_doubled(tones, folder):
    """One of 32 s runs through fifty windows."""
    for options in ({}, {"hop": 0.32, "lookahead": 0.16}, {"step": 0.04}):
        results = list(predict_files(tones, listed_files([folder]), plan=tones.plan(**options), events=EVENTS))
        found = [[(e.label, e.onset, e.offset) for e in result.events or ()] for result in results]
        near = 0.17 if "step" not in options else 0.05
        assert found[0] == [("low", pytest.approx(0.16, abs=near), pytest.approx(0.8, abs=near))]
        assert found[1] == [
            ("high", pytest.approx(30.08, abs=near), pytest.approx(62.4, abs=near)),
            ("low", pytest.approx(69.76, abs=near), pytest.approx(70.08, abs=near)),
        ]
        assert found[2:] == [[], [], []]


def test_of_a_long_file_only_the_scores_are_kept(tones, tmp_path):
    """It is 9 MB of samples, and its windows are 72 MB."""
    soundfile.write(tmp_path / "long.wav", np.zeros(140 * RATE, np.float32), RATE)
    tones.hear = lambda windows, size: ((item, (np.zeros(3), None)) for item in windows)
    tracemalloc.start()
    (result,) = predict_files(tones, [tmp_path / "long.wav"], plan=tones.plan(hop=0.16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result.scores.windows) > 800
    assert peak < 16e6


def test_files_folders_and_manifests_are_listed_once(folder, tmp_path):
    manifest = tmp_path / "list.jsonl"
    manifest.write_text('{"path": "audio/e.wav"}\n{"path": "gone.wav"}\n')
    found = listed_files([folder / "e.wav", folder, manifest, "nowhere.wav"])
    assert [path.name for path in found] == ["e.wav", "a.wav", "b.flac", "c.wav", "d.wav", "gone.wav", "nowhere.wav"]
    with pytest.raises(ManifestError, match="no such file"):
        listed_files([tmp_path / "missing.jsonl"])


def test_a_clip_head_finds_no_events(save_run, folder):
    classifier = CATClassifier.from_pretrained(save_run())
    with pytest.raises(ValueError, match="head of kind 'clip'; events need one of kind 'frames'"):
        next(predict_files(classifier, [folder / "a.wav"], events=EVENTS))


def test_scores_that_are_not_finite_are_a_failure(tones, folder):
    tones.model.probabilities = lambda logits: logits * float("nan")
    (result,) = predict_files(tones, [folder / "a.wav"])
    assert result.error == "the model gave scores that are not finite"


# ---------------------------------------------------------------- written


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_was_stopped_goes_on(tones, folder, tmp_path, capsys):
    files, out, table = listed_files([folder]), tmp_path / "out.jsonl", tmp_path / "out.csv"
    outputs = {out: "json", table: "csv"}
    plain = tmp_path / "plain.jsonl"
    write_predictions(tones, files, {plain: "json"}, plan=tones.plan())

    def stop(row):
        if row["path"].endswith("b.flac"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(tones, files, outputs, plan=tones.plan(), show=stop, batch_size=1)
    assert not out.exists()
    assert f"2 of 5 files are kept in {out}.part; the same command goes on" in capsys.readouterr().err
    part = tmp_path / "out.jsonl.part" / "rows.jsonl"
    assert len(rows(part)) == 3  # what made them, and two files
    with open(part, "ab") as file:
        file.write(b'{"path": "cut')  # killed while it wrote

    calls, shown = tones.model.calls, []
    failed = write_predictions(tones, files, outputs, plan=tones.plan(), show=shown.append)
    assert [row["path"][-5:] for row in shown] == ["c.wav", "d.wav", "e.wav"]
    assert tones.model.calls == calls + 1  # what is left of the three fits into one batch
    assert [result.path[-5:] for result in failed] == ["c.wav", "d.wav"]
    assert rows(out) == rows(plain)
    assert table.read_text().splitlines()[0] == "path,rank,label,name,score"
    assert len(table.read_text().splitlines()) == 1 + 3 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "out.csv", "out.jsonl", "plain.jsonl", "tones"]


def test_rows_of_other_settings_are_not_mixed(tones, folder, tmp_path):
    out = tmp_path / "out.jsonl"

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(tones, [folder / "a.wav"], {out: "json"}, plan=tones.plan(), show=stop)
    with pytest.raises(OutputError, match="of another model, or of other settings"):
        write_predictions(tones, [folder / "a.wav"], {out: "json"}, plan=tones.plan(), top=1)
    write_predictions(tones, [folder / "a.wav"], {out: "json"}, plan=tones.plan(), top=1, overwrite=True)
    assert len(rows(out)[0]["scores"]) == 1


def test_nothing_of_the_users_is_replaced(tones, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(OutputError, match="it is left alone"):
        write_predictions(tones, [folder / "a.wav"], {out: "json"}, plan=tones.plan())
    with pytest.raises(OutputError, match="which this command reads"):
        write_predictions(tones, [folder / "a.wav"], {folder / "a.wav": "csv"}, plan=tones.plan(), overwrite=True)
    assert out.read_text() == "mine"


def test_events_as_rows(tones, folder, tmp_path):
    out = {tmp_path / "out.jsonl": "json", tmp_path / "out.csv": "csv"}
    write_predictions(tones, listed_files([folder]), out, plan=tones.plan(), events=EVENTS)
    written = rows(tmp_path / "out.jsonl")
    assert written[0]["events"] == [{"onset": 0.16, "offset": 0.8, "label": "low", "name": "Low tone", "score": 0.99}]
    assert written[4]["events"] == []
    assert (tmp_path / "out.csv").read_text().splitlines()[1].endswith("a.wav,0.16,0.8,low,Low tone,0.99")


# ---------------------------------------------------------------- strong labels


def manifest(tmp_path, *entries: str):
    path = tmp_path / "valid.jsonl"
    path.write_text("\n".join(entries) + "\n")
    return load_manifest(path)


def test_clips_are_heard_with_their_labels(tones, folder, tmp_path):
    clips = manifest(
        tmp_path,
        '{"path": "audio/a.wav", "events": [{"onset": 0.16, "offset": 0.8, "label": "low"}]}',
        '{"path": "audio/c.wav", "events": []}',
        '{"path": "audio/e.wav", "events": []}',
    )
    heard = hear_clips(tones, clips)
    assert [clip.path[-5:] for clip in heard.clips] == ["a.wav", "e.wav"]
    assert [clip.path[-5:] for clip in heard.failed] == ["c.wav"]
    assert heard.truth == [[(0.16, 0.8, "low")], []]
    assert [len(clip.rows) for clip in heard.clips] == [7, 3]
    assert [len(events) for events in heard.events(EVENTS)] == [1, 0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"path": "audio/a.wav", "labels": ["low"]}', 'expected a field "events" of every clip'),
        (
            '{"path": "audio/a.wav", "events": [{"onset": 0, "offset": 1, "label": "dog"}]}',
            "events of 'dog', which the model does not know",
        ),
        ('{"path": "audio/c.wav", "events": []}', "none of the 1 clips could be read"),
    ],
)
def test_labels_that_do_not_fit(tones, folder, tmp_path, entry, message):
    with pytest.raises(ManifestError, match=message):
        hear_clips(tones, manifest(tmp_path, entry))


@pytest.mark.usefixtures("sed_eval")
def test_chosen_settings_are_found_by_predict(tones, folder, tmp_path):
    from cat.evaluation.events import choose_settings, evaluate_events

    entry = '{"path": "audio/b.flac", "events": [{"onset": 30.08, "offset": 62.4, "label": "high"}]}'
    heard = hear_clips(tones, manifest(tmp_path, entry))
    settings = choose_settings(heard)
    path = write_chosen(tones.info.path, settings, tmp_path / "valid.jsonl", evaluate_events(heard, settings))
    assert read_settings(path, tones.classes) == settings
    assert json.loads(path.read_text())["chosen"]["event F1"] == pytest.approx(1)
