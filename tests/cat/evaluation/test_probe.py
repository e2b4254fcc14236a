"""Probes: tuned on valid, test scored once, the honest rows beside the trained one."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.commands import main
from cat.commands import probe as command
from cat.data import Clip, FeatureConfig, Manifest, write_manifest
from cat.encoders import CatEncoder, LogMelStatistics
from cat.evaluation import classifiers, probe, trained
from cat.evaluation.cache import FeatureCache
from cat.evaluation.classifiers import Split, chance, knn_probe, linear_probe
from cat.evaluation.metrics import mean_average_precision
from cat.model import Encoder, ModelConfig

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("sklearn")

TINY = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)


def clusters(n: int, classes: int, *, seed: int, spread: float = 0.3, multi_label: bool = False) -> Split:
    """n clips around one centre a class; with several labels a clip lies between its centres."""
    centres = np.random.default_rng(0).normal(size=(classes, 12))
    rng = np.random.default_rng(seed)
    targets = np.eye(classes, dtype=bool)[rng.integers(classes, size=n)]
    if multi_label:
        targets |= np.eye(classes, dtype=bool)[rng.integers(classes, size=n)]
    features = targets @ centres / targets.sum(1, keepdims=True) + spread * rng.normal(size=(n, 12))
    return Split(features.astype(np.float32), targets)


@pytest.mark.parametrize("fit", [knn_probe, linear_probe])
@pytest.mark.parametrize("multi_label", [False, True])
def test_probes_learn_what_is_there_and_only_that(fit, multi_label):
    train, valid, test = (clusters(n, 5, seed=s, multi_label=multi_label) for s, n in enumerate((120, 60, 60), start=1))
    result = fit(train, valid, test, multi_label=multi_label)
    floor = chance(train, test, multi_label=multi_label)
    assert result.score > 0.85
    assert result.valid_score == max(result.tried.values())
    assert result.tried[result.setting] == result.valid_score

    shuffled = Split(train.features, np.random.default_rng(9).permutation(train.targets))
    assert fit(shuffled, valid, test, multi_label=multi_label).score < floor + 0.25


@pytest.mark.parametrize("fit", [knn_probe, linear_probe])
def test_the_test_split_is_scored_once(fit, monkeypatch):
    train, valid, test = (clusters(40, 3, seed=s) for s in (1, 2, 3))
    scored = []

    def spy(scores, targets):
        scored.append(targets)
        return float(np.mean(targets[np.arange(len(targets)), scores.argmax(axis=1)]))

    monkeypatch.setattr(classifiers, "accuracy", spy)
    fit(train, valid, test, multi_label=False)
    assert sum(targets is test.targets for targets in scored) == 1
    assert scored[-1] is test.targets


def test_knn_by_hand():
    train = Split(np.array([[1.0, 0], [0.9, 0.1], [0, 1], [-1, -1]], np.float32), np.eye(2, dtype=bool)[[0, 0, 1, 1]])
    test = Split(np.array([[1.0, -0.1], [0.1, 2.0]], np.float32), np.eye(2, dtype=bool)[[0, 1]])
    result = knn_probe(train, test, test, multi_label=False)
    assert result.score == 1.0
    assert result.setting == "k=1, standardised"  # the simplest of equals


def test_class_that_training_lacks_counts_as_error():
    train, test = clusters(60, 2, seed=1, spread=0.1), clusters(60, 3, seed=2, spread=0.1)
    train = Split(train.features, np.pad(train.targets, ((0, 0), (0, 1))))
    share = 1 - test.targets[:, 2].mean()
    assert linear_probe(train, test, test, multi_label=False).score <= share
    assert knn_probe(train, test, test, multi_label=False).score <= share


def test_mean_average_precision_leaves_out_classes_without_positives():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.1, 0.9, 0.5]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=bool)
    # class 0: positives at ranks 1 and 3, (1 + 2/3) / 2; class 1: ranks 1 and 2; class 2 has none
    assert mean_average_precision(scores, targets) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    with pytest.raises(ValueError, match="no class has a positive clip"):
        mean_average_precision(scores, np.zeros((3, 3), dtype=bool))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(trained, "MAX_STEPS", 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes that differ in pitch and rhythm; valid and test as well. One test clip cannot be read."""
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 8), ("valid", 4), ("test", 4)):
        clips = []
        for c, hertz in enumerate((200, 900, 3500)):
            for i in range(per_class):
                t = np.arange(8000) / 16000
                wave = 0.3 * np.sin(2 * np.pi * hertz * rng.uniform(0.9, 1.1) * t) + 0.01 * rng.normal(size=8000)
                name = f"{split}-{c}-{i}.wav"
                soundfile.write(root / name, wave, 16000)
                clips.append(Clip(name, labels=(f"tone{c}",)))
        if split == "test":
            clips.insert(1, Clip("missing.wav", labels=("tone0",)))
        write_manifest(Manifest(tuple(clips), root), root / f"{split}.jsonl")
    return root


def manifests(root: Path) -> dict[str, Manifest]:
    from cat.data import load_manifest

    return {split: load_manifest(root / f"{split}.jsonl") for split in probe.SPLITS}


def tiny(seed: int = 0) -> CatEncoder:
    torch.manual_seed(seed)
    return CatEncoder(Encoder(TINY), FeatureConfig(frames=48))


def test_report_has_honest_rows(data):
    encoder = tiny()
    report = probe.run_probe(
        {"trained": encoder, "untrained twin": encoder.untrained_twin(1), "log-mel": LogMelStatistics()},
        manifests(data),
    )
    assert [row.name for row in report.rows] == ["trained", "untrained twin", "log-mel", "chance"]
    assert report.counts == {"train": 24, "valid": 12, "test": 12}
    assert report.task.metric == "accuracy"
    assert report.row("log-mel").scores["linear"] > 0.9  # pitch is what an average spectrum shows
    assert report.row("chance").scores == {"knn": pytest.approx(1 / 3), "linear": pytest.approx(1 / 3)}
    assert any("1 clips of test left out" in note and "missing.wav" in note for note in report.notes)
    trained = report.row("trained").test
    assert len(trained.rows) == len(report.row("trained").test_labels) == 12
    assert list(trained.indices[:3]) == [0, 2, 3]  # the clip that cannot be read is gone, nothing slipped
    text = probe.format_report(report)
    assert "kNN accuracy" in text
    assert "untrained twin" in text


def test_labels_that_make_no_task(data):
    clips = manifests(data)["train"].clips
    unlabelled = Manifest(tuple(Clip(clip.path) for clip in clips), data)
    with pytest.raises(ValueError, match="the valid manifest has 24 clips and no label"):
        probe.labelled_task({**manifests(data), "valid": unlabelled})
    one = Manifest(tuple(Clip(clip.path, labels=("a",)) for clip in clips), data)
    with pytest.raises(ValueError, match="at least two classes"):
        probe.labelled_task(dict.fromkeys(probe.SPLITS, one))


def test_a_clip_without_a_label_is_left_out_and_changes_no_number(data):
    """One stray file in the root of a folder of class folders used to turn accuracy into mAP."""
    splits, log_mel = manifests(data), {"log-mel": LogMelStatistics()}
    stray = {split: Manifest((Clip("stray.wav"), *m.clips), data) for split, m in splits.items()}
    report = probe.run_probe(log_mel, stray, probes=["knn"])
    assert report.task.metric == "accuracy"
    assert report.counts == {"train": 24, "valid": 12, "test": 12}
    assert report.rows[0].scores == probe.run_probe(log_mel, splits, probes=["knn"]).rows[0].scores
    assert "1 clips of test left out, without a label; first: stray.wav" in report.notes


def test_clips_are_heard_the_shortest_first_whatever_their_rate():
    seconds = {"a": (24000, 8000), "b": (16000, 16000), "c": (88200, 44100), "none": (1, 16000), "d": (8000, 16000)}
    clips = (Clip(name, n, rate, labels=(name,) * (name != "none")) for name, (n, rate) in seconds.items())
    found, notes = probe.labelled({"train": Manifest(tuple(clips), Path())})
    assert [(clip.path, clip.labels) for clip in found["train"].clips] == [(name, (name,)) for name in "dbca"]
    assert notes == ["1 clips of train left out, without a label; first: none"]


def test_several_labels_give_map_and_say_what_is_left_out(data):
    several = manifests(data)
    train = tuple(Clip(c.path, labels=(*c.labels, "sound", "rare")) for c in several["train"].clips)
    several["train"] = Manifest(train, data)
    report = probe.run_probe({"log-mel": LogMelStatistics()}, several, probes=["linear"])
    assert report.task.multi_label
    assert report.rows[0].scores["linear"] > 0.9
    assert any("2 classes without a clip in test (rare, sound): they have no average" in note for note in report.notes)


def test_files_in_two_splits_are_pointed_out(data):
    splits = manifests(data)
    report = probe.run_probe({"log-mel": LogMelStatistics()}, {**splits, "test": splits["valid"]}, probes=["knn"])
    assert any(note.startswith("WARNING: 12 clips of the test split are in the valid split") for note in report.notes)


def save_checkpoint(path: Path, encoder: CatEncoder) -> Path:
    from cat.checkpoints.store import save_tensors
    from cat.config import to_mapping

    tensors = {f"student.{name}": tensor for name, tensor in encoder.encoder.state_dict().items()}
    config = {"model": to_mapping(encoder.encoder.config), "features": to_mapping(encoder.features)}
    save_tensors(path, tensors, step=7, config=config)
    return path


def arguments(root: Path, *words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    splits = [word for split in probe.SPLITS for word in (f"--{split}", str(root / f"{split}.jsonl"))]
    return parser.parse_args([str(word) for word in words] + splits)


def test_command_writes_json_and_figures(data, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "model.safetensors", tiny(5))
    assert command.run(arguments(data, checkpoint, "--untrained-twin", "--figures", "--pooling", "both")) == 0
    assert "untrained twin" in capsys.readouterr().out
    written = json.loads((tmp_path / "probe.json").read_text())
    assert [row["features"] for row in written["rows"]] == ["trained", "untrained twin", "log-mel mean + std", "chance"]
    assert written["rows"][0]["width"] == 32
    assert set(written["rows"][0]["probes"]) == {"knn", "linear"}
    assert written["arguments"]["pooling"] == "both"
    assert (tmp_path / "figures" / "embeddings.png").stat().st_size > 10_000


def test_require_better_fails_for_an_encoder_that_learned_nothing(data, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "model.safetensors", tiny(0))  # the very weights of twin 0
    words = (checkpoint, "--require-better", "--seed", 0, "--linear")
    assert command.run(arguments(data, *words)) == 1
    assert "FAIL: the trained encoder does not beat its untrained twin (linear:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--require-better: random:0 has no twin"):
        command.run(arguments(data, "random", "--require-better"))


def probe_logmel(root: Path, *words: object) -> int:
    splits = [word for split in probe.SPLITS for word in (f"--{split}", str(root / f"{split}.jsonl"))]
    return main(["probe", "logmel", "--knn", "--quiet", *splits, *map(str, words)])


def test_what_is_replaced(data, tmp_path, capsys):
    """Its own JSON and picture of an earlier time, nobody else's, and never a manifest."""
    (tmp_path / "figures").mkdir()
    mine = tmp_path / "thesis.json", tmp_path / "figures" / "embeddings.png"
    for path in mine:
        path.write_text('{"rows": []}')
    assert probe_logmel(data, "--out", mine[0]) == 1
    assert f"{mine[0]} exists" in capsys.readouterr().err
    assert probe_logmel(data, "--out", tmp_path / "new.json", "--figures") == 1
    assert f"{mine[1]} exists" in (said := capsys.readouterr().err)
    assert "an --out in another folder, or --overwrite" in said
    assert not (tmp_path / "new.json").exists()
    assert all(path.read_text() == '{"rows": []}' for path in mine)

    before = (data / "valid.jsonl").read_bytes()
    assert probe_logmel(data, "--out", data / "valid.jsonl", "--overwrite") == 1
    assert "which this command reads; that is never done" in capsys.readouterr().err
    assert (data / "valid.jsonl").read_bytes() == before

    assert probe_logmel(data, "--out", tmp_path / "new.json", "--figures", "--overwrite") == 0
    assert probe_logmel(data, "--out", tmp_path / "new.json", "--figures") == 0  # now it is its own
    assert capsys.readouterr().err == ""


def test_probes_of_tokens_and_layers_beside_the_plain_ones(data, quick):
    encoder = tiny()
    encoders = {"trained": encoder, "twin": encoder.untrained_twin(1), "log-mel": LogMelStatistics()}
    report = probe.run_probe(encoders, manifests(data), probes=list(probe.TITLES), layers=(), prototypes=16)
    plain = probe.run_probe(encoders, manifests(data))
    for name in ("trained", "twin"):
        row = report.row(name)
        assert set(row.scores) == {"knn", "linear", "attention", "gated"}
        assert sorted(row.layers) == sorted(row.gates) == [0, 1, 2]
        assert sum(row.gates.values()) == pytest.approx(1)
        for simple in ("knn", "linear"):
            assert row.layers[2][simple] == row.results[simple]  # the last layer is the embedding
            assert row.scores[simple] == pytest.approx(plain.row(name).scores[simple], abs=0.1)
    assert set(report.row("log-mel").scores) == {"knn", "linear"}  # it has no layers
    assert report.row("log-mel").scores == plain.row("log-mel").scores
    assert set(report.row("chance").scores) == set(probe.TITLES)
    text = probe.format_report(report)
    assert "attention accuracy" in text
    best = max(report.row("trained").layers, key=lambda y: report.row("trained").layers[y]["knn"].valid_score)
    assert f"layers of trained (0: what the first block sees; best on valid: kNN {best}, linear" in text
    assert re.findall(r"^(\d)  ", text, re.MULTILINE) == ["0", "1", "2"] * 2


def test_the_sweep_takes_the_layers_that_are_asked_for(data, quick):
    report = probe.run_probe({"trained": tiny()}, manifests(data), probes=["attention"], layers=[1])
    row = report.row("trained")
    assert list(row.layers) == [1]
    assert list(row.layers[1]) == ["linear"]  # where neither kNN nor linear is asked for
    assert not row.gates
    assert "gate" not in probe.format_report(report)
    report = probe.run_probe({"trained": tiny()}, manifests(data), probes=["gated"], layers=[1], prototypes=16)
    assert (list(report.row("trained").layers), list(report.row("trained").gates)) == ([1], [0, 1, 2])


def test_cls_of_layer_0_is_the_same_for_all_clips_and_no_error(data):
    torch.manual_seed(0)
    encoder = CatEncoder(Encoder(TINY), FeatureConfig(frames=48), pooling="cls")
    report = probe.run_probe({"trained": encoder}, manifests(data), layers=[0])
    for result in report.row("trained").layers[0].values():
        assert result.score == pytest.approx(1 / 3)


@pytest.mark.parametrize("several", [False, True])
def test_several_labels_go_through_every_probe(several, data, quick):
    splits = manifests(data)
    if several:
        splits = {
            name: Manifest(
                tuple(Clip(c.path, labels=(*c.labels, "odd")[: 1 + i % 2]) for i, c in enumerate(m.clips)), data
            )
            for name, m in splits.items()
        }
    report = probe.run_probe({"trained": tiny()}, splits, probes=list(probe.TITLES), layers=(), prototypes=16)
    assert report.task.multi_label == several
    assert all(0 <= score <= 1 for score in report.row("trained").scores.values())


def test_silence_is_probed_like_any_sound(tmp_path, quick):
    """Every clip alike: no better than chance, and no error."""
    clips = []
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(8000), 16000)
        clips.append(Clip(f"{i}.wav", labels=("ab"[i % 2],)))
    silence = dict.fromkeys(probe.SPLITS, Manifest(tuple(clips), tmp_path))
    report = probe.run_probe({"trained": tiny()}, silence, probes=list(probe.TITLES), layers=(), prototypes=16)
    assert report.row("trained").scores == dict.fromkeys(probe.TITLES, 0.5)


def test_a_report_from_the_cache_is_the_same(data, tmp_path, quick):
    def report(cache):
        found = probe.run_probe(
            {"trained": tiny()}, manifests(data), probes=list(probe.TITLES), layers=(), prototypes=16, cache=cache
        )
        return probe.report_json(found)

    first, second = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache")
    assert report(None) == report(first) == report(second)
    assert (first.computed, second.found) == (3, 3)


BAD = {
    "a layer too many": ({"layers": [0, 3]}, "layer 3 is asked for; expected 0 .* to 2"),
    "a negative layer": ({"layers": [-1]}, "layer -1 is asked for; expected 0 .* to 2"),
    "a layer twice": ({"layers": [1, 1]}, "layers 1, 1: each one once"),
    "an unknown probe": (
        {"probes": ["knn", "svm"]},
        "'svm' is no probe; expected some of knn, linear, attention, gated",
    ),
    "no probe": ({"probes": []}, "no probe is asked for"),
    "no prototypes": ({"probes": ["gated"], "prototypes": 0}, "prototypes is 0; expected at least 1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_probed(bad, data, monkeypatch):
    """Said before any clip is heard."""
    options, message = BAD[bad]
    monkeypatch.setattr(FeatureCache, "features", lambda *_, **__: pytest.fail("a clip was heard"))
    with pytest.raises(ValueError, match=message):
        probe.run_probe({"trained": tiny()}, manifests(data), **options)


@pytest.mark.parametrize(
    ("options", "what"), [({"probes": ["knn", "gated"]}, "the gated probe"), ({"layers": ()}, "the sweep")]
)
def test_an_encoder_without_layers(options, what, data):
    with pytest.raises(
        ValueError, match=f"{what} reads the layers of a CAT checkpoint, and there is none among logmel"
    ):
        probe.run_probe({"trained": LogMelStatistics()}, manifests(data), **options)


def test_command_probes_layers_and_keeps_features(data, tmp_path, capsys, quick):
    checkpoint = save_checkpoint(tmp_path / "model.safetensors", tiny(5))
    words = (checkpoint, "--probe", "linear, gated", "--layers", "all", "--figures", "--quiet", "--prototypes", "16")
    assert command.run(arguments(data, *words)) == 0
    said = capsys.readouterr().out
    assert "features: 6 sets computed, 0 from the cache (" in said
    assert f"written: {tmp_path / 'figures' / 'layers.png'}" in said
    assert (tmp_path / "figures" / "layers.png").stat().st_size > 10_000
    first = json.loads((tmp_path / "probe.json").read_text())
    row = first["rows"][0]
    assert list(row["probes"]) == list(row["scores"]) == ["linear", "gated"]
    assert [layer["layer"] for layer in row["layers"]] == [0, 1, 2]
    assert [layer["gate"] for layer in row["layers"]] == row["probes"]["gated"]["gates"]
    assert set(row["layers"][0]["probes"]) == {"linear"}
    assert first["rows"][1]["layers"] == []

    (tmp_path / "moved.safetensors").write_bytes(checkpoint.read_bytes())  # another path, the same weights
    assert command.run(arguments(data, tmp_path / "moved.safetensors", *words[1:])) == 0
    assert "features: 0 sets computed, 6 from the cache" in capsys.readouterr().out
    assert json.loads((tmp_path / "probe.json").read_text())["rows"] == first["rows"]

    assert command.run(arguments(data, checkpoint, "--knn", "--no-cache", "--quiet")) == 0
    assert "features:" not in capsys.readouterr().out


def test_options_of_the_command(data):
    def asked(*words: str) -> list[str]:
        return command._probes(arguments(data, "random", *words))

    assert asked() == ["knn", "linear"]
    assert asked("--knn") == ["knn"]
    assert asked("--linear", "--knn") == ["knn", "linear"]
    assert asked("--probe", "gated,attention") == ["attention", "gated"]
    assert asked("--probe", "gated", "--knn") == ["knn", "gated"]
    assert asked("--probe", "all") == ["knn", "linear", "attention", "gated"]
    with pytest.raises(ValueError, match="--probe svm,knn: 'svm' is no probe; expected some of knn, linear"):
        asked("--probe", "svm,knn")
    for text in ("", "1,", "first", "0-4"):
        with pytest.raises(ValueError, match=f"--layers {text}: expected all, or the numbers of layers as in 0,4,8"):
            command.run(arguments(data, "random", "--layers", text))
    with pytest.raises(ValueError, match="--no-cache and --cache x were both given; expected one"):
        command.run(arguments(data, "random", "--no-cache", "--cache", "x"))
