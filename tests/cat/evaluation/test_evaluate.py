"""`cat-audio evaluate`: the scores are those of each clip alone, everything left out is named, no file is lost."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.checkpoints import load_classifier
from cat.commands import main
from cat.data.features import frames_in, log_mel
from cat.data.manifest import Clip, Manifest, load_manifest, write_manifest
from cat.evaluation import report
from cat.evaluation.evaluate import Scored, ScoreError, evaluate, mistakes_of, score_clips
from cat.model.encoder import rows_of
from cat.prediction import CATClassifier

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")

CLASSES = ("$x_1$", "狗叫声", "_a;b_")
RATE = 16000
FILES = ("evaluation.json", "classes.csv", "clips.csv")


def noise(path: Path, samples: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).normal(size=samples), RATE)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder a class: 1, 2 and 3 clips from shorter than a frame to longer than the checkpoint hears (0.66 s)."""
    lengths = {"$x_1$": [200], "狗叫声": [3000, 14000], "_a;b_": [2000, 8000, 5000]}
    for number, (label, samples) in enumerate(lengths.items()):
        for i, count in enumerate(samples):
            noise(tmp_path / "data" / label / f"{i}.wav", count, seed=10 * number + i)
    return tmp_path / "data"


def always(c: int, margin: float = 3.0) -> Callable[[torch.nn.Module], None]:
    """Makes a model that gives class `c` the highest score of every clip."""
    return lambda model: model.head.linear.bias[c].add_(margin)


def read(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


def rows_in(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(*words: object) -> int:
    return main(["evaluate", *map(str, words), "--quiet"])


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("padding", ["mask", "fill"])
def test_a_clip_is_scored_as_if_it_were_alone(classifier_checkpoint, data, tmp_path, padding):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES, padding=padding)
    classifier, info = load_classifier(checkpoint)
    manifest = load_manifest(data)
    found = [score_clips(classifier, info, manifest, batch_size=size, num_workers=n) for size, n in ((1, 0), (4, 1))]
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-5)
    for row, clip in enumerate(found[0].clips):
        wave, _ = soundfile.read(manifest.path(clip), dtype="float32")
        if len(wave) < info.features.frame_length:
            continue
        wave = torch.from_numpy(wave[: info.features.samples])
        spec = log_mel(wave, info.features)
        rows = [rows_of(int(frames_in(info.features, torch.tensor(len(wave)))), info.model.patch_size)]
        with torch.no_grad():
            logits = classifier(spec, rows=rows if padding == "mask" else None).clip
        np.testing.assert_allclose(found[0].scores[row], logits.softmax(-1)[0], rtol=1e-5)
    assert found[0].targets.sum(axis=0).tolist() == [1, 2, 3]


def test_a_model_of_known_answers(classifier_checkpoint, data, tmp_path, capsys):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES, change=always(1), names=["one", "two", "three"])
    assert run(checkpoint, data, "--out", tmp_path / "out", "--resamples", 200, "--seed", 5) == 0
    found = read(tmp_path / "out")
    assert found["metrics"]["accuracy"] == 2 / 6
    assert found["metrics"]["balanced accuracy"] == pytest.approx(1 / 3)
    assert found["confusion"] == {"$x_1$": {"狗叫声": 1}, "狗叫声": {"狗叫声": 2}, "_a;b_": {"狗叫声": 3}}
    assert found["intervals"]["accuracy"] == pytest.approx([0, 4 / 6], abs=0.17)
    assert (found["intervals"]["resamples"], found["intervals"]["seed"]) == (200, 5)
    assert found["main"] == "accuracy"
    assert (found["checkpoint"]["step"], len(found["checkpoint"]["sha256"])) == (7, 64)
    assert found["arguments"]["data"] == str(data)
    told = capsys.readouterr().out
    assert "accuracy           33.3 %" in told
    assert "two    2 " in told, "the class's name for people"
    classes = rows_in(tmp_path / "out" / "classes.csv")
    assert [(row["label"], row["name"], row["clips"], row["recall"]) for row in classes] == [
        ("$x_1$", "one", "1", "0.0"),
        ("狗叫声", "two", "2", "1.0"),
        ("_a;b_", "three", "3", "0.0"),
    ]
    clips = rows_in(tmp_path / "out" / "clips.csv")
    assert [row["path"] for row in clips] == [clip.path for clip in load_manifest(data).clips]
    assert {row["highest"] for row in clips} == {"狗叫声"}
    assert all(float(row["狗叫声"]) > 0.5 for row in clips)


def test_the_numbers_are_those_of_fine_tuning(data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{train: {data}, valid: {data}, test: {data}, batch_size: 3, num_workers: 0}}\n"
        "model: {channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2}\n"
        "optim: {lr: 1e-2, warmup_steps: 1, steps: 2, average: 0.5}\n"
        f"run: {{dir: {tmp_path}, name: tuned, threads: 1, device: cpu, tensorboard: false, figures: false}}\n"
    )
    assert main(["finetune", str(recipe), "encoder=none", "--quiet"]) == 0
    told = json.loads((tmp_path / "tuned" / "scores.json").read_text())
    assert run(tmp_path / "tuned", data, "--out", tmp_path / "out", "--resamples", 0) == 0
    found = read(tmp_path / "out")
    assert found["checkpoint"]["step"] == told["step"]
    assert found["metrics"] == pytest.approx({name: told["test"][name] for name in found["metrics"]}, abs=1e-9)


def test_neither_workers_nor_batches_nor_a_second_time_change_the_numbers(classifier_checkpoint, data, tmp_path):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES)
    found = []
    for name, options in (("a", ()), ("b", ("--batch-size", 2, "--num-workers", 2)), ("c", ())):
        assert run(checkpoint, data, "--out", tmp_path / name, "--resamples", 50, *options) == 0
        found.append({key: read(tmp_path / name)[key] for key in ("metrics", "intervals", "classes")})
    assert found[0] == found[2]
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"])


def test_of_longer_clips_the_part_is_heard_that_training_chose(classifier_checkpoint, tmp_path):
    """Two clips of equal beginning and different centres."""
    start = 0.1 * np.random.default_rng(0).normal(size=12000)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rest = 0.1 * np.random.default_rng(ord(name)).normal(size=30000)
        soundfile.write(tmp_path / "data" / name / "x.wav", np.concatenate([start, rest]), RATE)
    alike = {}
    for crop in ("start", "random", "center"):
        config = {"data": {"padding": "mask", "crop": crop}}
        classifier, info = load_classifier(classifier_checkpoint(tmp_path / crop, "ab", config=config))
        first, second = score_clips(classifier, info, load_manifest(tmp_path / "data")).scores
        alike[crop] = bool((first == second).all())
    assert alike == {"start": True, "random": False, "center": False}


def test_several_labels_and_clips_that_have_none(classifier_checkpoint, tmp_path):
    """Clips that are said to have no label are judged; those that say nothing are left out, and named."""
    for i in range(4):
        noise(tmp_path / f"{i}.wav", 4000, seed=i)
    clips = [Clip("0.wav", labels=("a", "b")), Clip("1.wav", labels=("b",)), Clip("3.wav")]
    write_manifest(Manifest(clips, tmp_path), tmp_path / "test.jsonl")
    with open(tmp_path / "test.jsonl", "a") as file:
        file.write('{"path": "2.wav", "labels": []}\n')
    for task in ("multi-label", "events"):
        checkpoint = classifier_checkpoint(tmp_path / task, "abc", task=task)
        assert run(checkpoint, tmp_path / "test.jsonl", "--out", tmp_path / task / "out", "--resamples", 20) == 0
        found = read(tmp_path / task / "out")
        assert (found["data"]["clips"], found["main"], found["confusion"]) == (3, "mAP", None)
        assert found["left_out"] == {"mAP": ["c"], "AUC": ["c"]}
        assert any("1 clips left out, without a label; the first: 3.wav" in note for note in found["notes"])
        assert [row["labels"] for row in rows_in(tmp_path / task / "out" / "clips.csv")] == ["a;b", "b", ""]


def test_classes_without_a_clip_are_named(classifier_checkpoint, data, tmp_path, capsys):
    checkpoint = classifier_checkpoint(tmp_path / "run", (*CLASSES, "bell"))
    assert run(checkpoint, data, "--out", tmp_path / "out", "--resamples", 20) == 0
    assert "classes without a clip, in no mean over classes: 1 of 4 (bell)" in capsys.readouterr().out
    assert read(tmp_path / "out")["left_out"]["balanced accuracy"] == ["bell"]


def test_clips_of_one_class_only(classifier_checkpoint, data, tmp_path):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES, change=always(2))
    manifest = load_manifest(data)
    write_manifest(manifest.take(np.array([1, 2])), data / "one.jsonl")
    assert {clip.labels for clip in load_manifest(data / "one.jsonl").clips} == {("_a;b_",)}
    assert run(checkpoint, data / "one.jsonl", "--out", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert found["metrics"] == {"accuracy": 1, "balanced accuracy": 1, "mAP": 1, "lwlrap": 1}
    assert found["left_out"]["AUC"] == list(CLASSES)


def test_silence_is_scored(classifier_checkpoint, tmp_path):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        soundfile.write(tmp_path / "data" / label / "x.wav", np.zeros(8000), RATE)
    classifier, info = load_classifier(classifier_checkpoint(tmp_path / "run", "ab"))
    found = evaluate(classifier, info, load_manifest(tmp_path / "data"), resamples=10)
    assert np.isfinite(found.scored.scores).all()
    assert found.scores.metrics["AUC"] == 0.5


def test_mistakes_by_hand():
    manifest = Manifest([Clip(f"{i}.wav") for i in range(9)], Path("/"))
    scores = np.array([[0.2, 0.7, 0.1], [0.0, 0.4, 0.6], [0.6, 0.3, 0.1], [0.85, 0.5, 0.3], [0.5, 0.1, 0.0]])
    targets = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=bool)
    scored = Scored(manifest, scores, targets, np.array([2, 3, 4, 5, 6]), ())
    found = mistakes_of(scored, ("a", "b", "c"))
    # The third is right, the last has no class that could be missed.
    assert [(m.path, m.predicted, m.missed) for m in found] == [
        ("3.wav", "c", "a"),
        ("5.wav", "a", "c"),
        ("2.wav", "b", "a"),
    ]
    assert (found[1].labels, found[1].score, found[1].missed_score) == (("b", "c"), 0.85, 0.3)
    assert len(mistakes_of(scored, ("a", "b", "c"), most=2)) == 2


# ---------------------------------------------------------------- events


@pytest.fixture
def street(tmp_path) -> Path:
    """Two clips that say when their sounds are, and one that only says which."""
    for i in range(3):
        noise(tmp_path / "street" / f"{i}.wav", 16000, seed=i)
    entries = [
        {"path": "0.wav", "events": [{"onset": 0.1, "offset": 0.9, "label": "car"}]},
        {"path": "1.wav", "events": []},
        {"path": "2.wav", "labels": ["bird"]},
    ]
    path = tmp_path / "street" / "valid.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.usefixtures("sed_eval")
def test_events_are_scored_where_the_labels_say_when_they_are(classifier_checkpoint, street, tmp_path, capsys):
    checkpoint = classifier_checkpoint(tmp_path / "run", ["car", "bird"], task="events", change=always(0))
    assert run(checkpoint, street, "--out", tmp_path / "a", "--resamples", 10) == 0
    assert "events in 2 clips; settings: defaults" in capsys.readouterr().out
    found = read(tmp_path / "a")
    assert found["data"]["clips"] == 3
    car, bird = found["events"]["classes"]
    # A car from beginning to end of both clips: the second has none, and the first is found early and ends late.
    assert (car["labelled"], car["found"], car["segment_f1"]) == (1, 2, pytest.approx(2 / 3))
    assert (bird["labelled"], bird["f1"], found["events"]["left_out"]) == (0, None, ["bird"])
    assert found["events"]["settings"]["car"]["threshold"] == 0.5


@pytest.mark.usefixtures("sed_eval")
def test_settings_of_events_are_chosen_on_clips_and_used_from_then_on(classifier_checkpoint, street, tmp_path, capsys):
    checkpoint = classifier_checkpoint(tmp_path / "run", ["car", "bird"], task="events")
    command = (checkpoint, street, "--out", tmp_path / "out", "--resamples", 10)
    assert run(*command, "--choose-events") == 0
    chosen = json.loads((tmp_path / "run" / "events.json").read_text())
    assert chosen["chosen"]["on"] == str(street)
    assert read(tmp_path / "out")["events"]["settings"] == chosen["classes"]
    assert run(*command) == 0
    assert f"settings: {tmp_path / 'run' / 'events.json'}" in capsys.readouterr().out
    assert run(*command, "--choose-events") == 0, "it is its own file"
    (tmp_path / "run" / "events.json").write_text("{}")
    assert run(*command, "--choose-events") == 1
    assert "events.json exists, and is not, or no longer, what this command wrote" in capsys.readouterr().err


def test_events_that_cannot_be_scored(classifier_checkpoint, data, street, tmp_path, monkeypatch, capsys):
    frames = classifier_checkpoint(tmp_path / "frames", ["car", "bird"], task="events")
    clip = classifier_checkpoint(tmp_path / "clip", CLASSES)
    assert run(clip, data, "--out", tmp_path / "a", "--choose-events") == 1
    assert "has no frame head; it is of task 'single-label'" in capsys.readouterr().err
    write_manifest(load_manifest(street).take(np.array([1, 2])), street.with_name("weak.jsonl"))
    weak = (frames, street.with_name("weak.jsonl"), "--out", tmp_path / "b", "--resamples", 0)
    assert run(*weak) == 0
    assert "events are judged by clip only: no clip of" in capsys.readouterr().out
    assert read(tmp_path / "b")["events"] is None
    assert run(*weak, "--choose-events") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(frames, street, "--out", tmp_path / "c", "--resamples", 0) == 0
    assert "events are judged by clip only: scores of events need sed_eval" in capsys.readouterr().out


# ---------------------------------------------------------------- what cannot be scored


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (
            [Clip("0.wav", labels=("a",)), Clip("1.wav", labels=("cow",))],
            "1 clip with labels that are none of the 2 classes",
        ),
        ([Clip("0.wav"), Clip("1.wav")], "none of its 2 clips has a label"),
        ([Clip("0.wav", labels=("a", "b"))], "1 clip with several labels in a single-label task"),
    ],
)
def test_labels_that_do_not_fit(classifier_checkpoint, tmp_path, capsys, clips, message):
    for i in range(2):
        noise(tmp_path / f"{i}.wav", 4000, seed=i)
    write_manifest(Manifest(clips, tmp_path), tmp_path / "test.jsonl")
    checkpoint = classifier_checkpoint(tmp_path / "run", "ab")
    assert run(checkpoint, tmp_path / "test.jsonl", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_that_are_not_numbers(classifier_checkpoint, data, tmp_path):
    def damaged(model):
        model.head.linear.weight[0, 0] = torch.nan

    classifier, info = load_classifier(classifier_checkpoint(tmp_path / "run", CLASSES, change=damaged))
    with pytest.raises(ScoreError, match=r"scores that are not finite, first for .*0\.wav; its weights are damaged"):
        evaluate(classifier, info, load_manifest(data))


def test_clips_that_cannot_be_read(classifier_checkpoint, data, tmp_path, capsys):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES)
    (data / "_a;b_" / "2.wav").write_bytes(b"RIFF")
    soundfile.write(data / "_a;b_" / "3.wav", np.full(4000, np.nan), RATE, subtype="FLOAT")
    assert run(checkpoint, data, "--out", tmp_path / "out", "--resamples", 20) == 0
    told = capsys.readouterr().out
    assert "WARNING: 2 of 7 clips could not be read and are in no score; the first: " in told
    found = read(tmp_path / "out")["data"]
    assert [Path(failure["path"]).name for failure in found["failures"]] == ["2.wav", "3.wav"]
    assert found["clips"] == len(rows_in(tmp_path / "out" / "clips.csv")) == 5
    assert run(checkpoint, data, "--out", tmp_path / "new", "--max-failed-share", 0.2) == 1
    assert "2 of 7 clips" in (told := capsys.readouterr().err)
    assert "more than the allowed share of 0.2; nothing was written" in told
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "0"), "batch_size is 0; expected at least 1"),
        (("--resamples", "-1"), "resamples is -1; expected at least 0"),
        (("--max-failed-share", "2"), "max_failed_share is 2.0; expected a share from 0 to 1"),
        (("--device", "tpu"), "--device is 'tpu'"),
    ],
)
def test_options_that_cannot_be(classifier_checkpoint, data, tmp_path, capsys, options, message):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES)
    assert run(checkpoint, data, "--out", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- files


def test_where_it_is_written(classifier_checkpoint, data, tmp_path, capsys):
    """Into the run, by data and step: neither other data nor a later checkpoint takes its place."""
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES)
    (tmp_path / "run" / "config.yaml").write_text("task: single-label\n")
    assert run(tmp_path / "run", data, "--resamples", 0) == 0
    out = tmp_path / "run" / "evaluation" / "data-step-00000007"
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert read(out)["intervals"] is None
    assert "interval" not in capsys.readouterr().out
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    (checkpoint / "model.safetensors").rename(alone)
    assert run(alone, data, "--resamples", 0) == 0
    assert (tmp_path / "alone" / "evaluation" / "data-step-00000007" / "clips.csv").is_file()


def test_a_published_model_has_the_scores_of_its_checkpoint(classifier_checkpoint, data, tmp_path):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES)
    CATClassifier.from_folder(checkpoint).save_pretrained(tmp_path / "published")
    for name, model in (("a", checkpoint), ("b", tmp_path / "published")):
        assert run(model, data, "--out", tmp_path / name, "--resamples", 0) == 0
    assert read(tmp_path / "a")["metrics"] == read(tmp_path / "b")["metrics"]
    assert (tmp_path / "a" / "clips.csv").read_bytes() == (tmp_path / "b" / "clips.csv").read_bytes()
    assert run(tmp_path / "published", data, "--resamples", 0) == 0
    assert (tmp_path / "published" / "evaluation" / "data" / "evaluation.json").is_file()


def test_nothing_of_the_users_is_replaced(classifier_checkpoint, data, tmp_path, capsys):
    checkpoint, out = classifier_checkpoint(tmp_path / "run", CLASSES), tmp_path / "out"
    command = (checkpoint, data, "--out", out, "--resamples", 10)
    out.mkdir()
    (out / "classes.csv").write_text("mine\n")
    assert run(*command) == 1
    assert "classes.csv exists, and is not, or no longer, what this command wrote" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["classes.csv"]
    assert run(*command, "--overwrite") == 0
    assert run(*command) == 0, "now they are its own"
    text = (out / "clips.csv").read_text()
    (out / "clips.csv").write_text(text + "a note of mine\n")
    assert run(*command) == 1
    assert (out / "clips.csv").read_text() == text + "a note of mine\n"


def test_the_data_are_never_replaced(classifier_checkpoint, data, tmp_path, capsys):
    checkpoint = classifier_checkpoint(tmp_path / "run", CLASSES)
    write_manifest(load_manifest(data), tmp_path / "test.jsonl")
    (tmp_path / "evaluation.json").symlink_to("test.jsonl")
    assert run(checkpoint, tmp_path / "test.jsonl", "--out", tmp_path, "--overwrite") == 1
    assert "would be written over" in capsys.readouterr().err
    assert len(load_manifest(tmp_path / "test.jsonl")) == 6


def test_the_files_appear_together(classifier_checkpoint, data, tmp_path, monkeypatch, capsys):
    checkpoint, out = classifier_checkpoint(tmp_path / "run", CLASSES), tmp_path / "out"
    assert run(checkpoint, data, "--out", out, "--resamples", 10) == 0
    before = {name: (out / name).read_bytes() for name in FILES}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "_write_clips", full)
        assert run(checkpoint, data, "--out", out, "--resamples", 0) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(checkpoint, data, "--out", out, "--resamples", 0) == 0


def test_files_of_any_name(classifier_checkpoint, tmp_path):
    noise(tmp_path / "data" / "a,b" / "x.wav", 4000, seed=0)
    (tmp_path / "data" / "a,b" / "x.wav").rename(tmp_path / "data" / "a,b" / "caf\udce9.wav")
    noise(tmp_path / "data" / "c" / 'x"y\n.wav', 4000, seed=1)
    checkpoint = classifier_checkpoint(tmp_path / "run", ["a,b", "c"])
    assert run(checkpoint, tmp_path / "data", "--out", tmp_path / "out", "--resamples", 0) == 0
    clips = rows_in(tmp_path / "out" / "clips.csv")
    assert [(row["path"], row["labels"]) for row in clips] == [("a,b/caf\\udce9.wav", "a,b"), ('c/x"y\n.wav', "c")]


def test_figures(classifier_checkpoint, data, tmp_path):
    pytest.importorskip("matplotlib")
    for task, pictures in (
        ("single-label", {"classes.png", "confusion.png", "curves.png", "mistakes.png"}),
        ("multi-label", {"classes.png", "curves.png", "mistakes.png"}),
    ):
        checkpoint, out = classifier_checkpoint(tmp_path / task, CLASSES, task=task), tmp_path / task / "out"
        command = (checkpoint, data, "--out", out, "--resamples", 10, "--figures")
        assert run(*command) == 0
        assert {path.name for path in (out / "figures").iterdir()} == pictures
        (out / "figures" / "curves.png").write_bytes(b"mine")
        assert run(*command) == 1
