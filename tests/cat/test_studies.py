"""Studies: arms and seeds, trained and probed by legs, read, drawn, recorded, compared."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.commands import experiment
from cat.data import load_manifest
from cat.experiments import claims, paper, readings, records, study, trial
from cat.experiments.recipes import experiment_config
from cat.files import write_json
from cat.model.encoder import Encoder
from cat.training.pretrain import pretrain
from cat.training.recipe import load_recipe
from cat.training.records import read_rows

pytest.importorskip("soundfile")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

SMALL = (
    *("model.channels=[8,16]", "model.embed_dim=192", "model.depth=1", "model.num_heads=3", "model.decoder_dim=64"),
    *("model.decoder_layers=1", "features.frames=32", "masks.num_masks=2", "data.batch_size=4", "run.threads=1"),
    *("optim.steps=4", "optim.warmup_steps=1", "ema.steps=4"),
)


def parsed(*words):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    return parser.parse_args([*words])


def command(name, data, out, *words, overrides=()):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return experiment.run(
            parsed(name, *SMALL, *overrides, "--data", str(data), "--out", str(out), "--quiet", *words)
        )
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def convergence(two_sounds, tmp_path_factory):
    """A study of two arms and two seeds, and its record."""
    out = tmp_path_factory.mktemp("studies")
    words = ("--seeds", "0,1", "--probes", "2", "--guide", "noise=random:3", "--record", str(out / "record"))
    assert command("convergence", two_sounds, out, *words) in (0, 1)
    return out, words[:-2]


def test_a_record_holds_all_scores_and_what_they_were_made_with(convergence, two_sounds):
    out, _ = convergence
    record = records.read_record(out / "record")
    assert list(record["arms"]) == ["none", "noise"]
    assert record["arms"]["none"]["weight"] == 0
    assert record["tasks"] == {two_sounds.name: {"train": 12, "valid": 6, "test": 6}}
    for arm in record["arms"].values():
        for run in arm["runs"]:
            assert [row["step"] for row in run["rows"]] == [2, 4]
            assert ["test" in row for row in run["rows"]] == [False, True]
            probes = {"knn cls", "linear cls", "knn mean", "linear mean"}
            assert set(run["rows"][-1]["test"][two_sounds.name]) == probes
    assert set(record["bounds"]) == {"log-mel statistics", "untrained", "noise"}
    assert record["bounds"]["log-mel statistics"]["test"][two_sounds.name]["linear"] == 1
    assert {"date", "commit", "machine", "versions"} <= set(record["made"])
    log = [json.loads(line) for line in (out / "record" / "log.jsonl").read_text().splitlines()]
    assert {(row["arm"], row["seed"]) for row in log} == {(arm, seed) for arm in ("none", "noise") for seed in (0, 1)}
    assert len(log) == 4 * 4
    assert "model:" in (out / "record" / "recipe.yaml").read_text()
    assert "| noise |" in paper.judged(record).markdown()
    assert (out / "convergence" / "figures" / "scores.png").is_file()


def test_what_is_there_is_not_trained_again(convergence, two_sounds, monkeypatch):
    out, words = convergence
    monkeypatch.setattr(trial, "pretrain", None)
    monkeypatch.setattr(study, "write_embeddings", None)
    assert command("convergence", two_sounds, out, *words, "--compare", str(out / "record")) == 0
    with pytest.raises(TypeError):  # another length is another run
        command("convergence", two_sounds, out, *words, overrides=["optim.steps=5"])


def test_a_run_is_found_under_another_arms_name(two_sounds, tmp_path):
    config = experiment_config("layer", two_sounds / "train.jsonl", SMALL)
    tasks = (trial.Task("sounds", two_sounds),)
    given = study.Study(config, two_sounds / "train.jsonl", tasks, (), {}, (0,), (1.0,))
    _, made = study._configured(given, study.Arm("output", ("objective.regularisation_layer=0",)), {})
    first = study._trial(given, study.Arm("output"), made, 0, tmp_path).directory
    assert first.name.startswith("output-0-")
    first.mkdir(parents=True)
    assert study._trial(given, study.Arm("cost 5"), config, 0, tmp_path).directory == first
    assert study._trial(given, study.Arm("cost 5"), config, 1, tmp_path).directory.name.startswith("cost-5-1-")


def test_legs_train_what_one_run_trains(convergence, two_sounds, tmp_path):
    out, _ = convergence
    run = next((out / "studies" / "runs").glob("none-1-*"))
    config = experiment_config("convergence", two_sounds / "train.jsonl", [*SMALL, "run.seed=1"])
    pretrain(config, tmp_path / "whole", progress=False)
    assert read_rows(run / "metrics.jsonl", "train") == read_rows(tmp_path / "whole" / "metrics.jsonl", "train")


def test_a_run_that_was_stopped_between_two_probes_goes_on(convergence, two_sounds, tmp_path):
    out, words = convergence
    shutil.copytree(out / "studies", tmp_path / "studies")
    run = next((tmp_path / "studies" / "runs").glob("noise-0-*"))
    scores = run / trial.SCORES
    whole = json.loads(scores.read_text())
    write_json(scores, whole[:1])
    command("convergence", two_sounds, tmp_path, *words)
    again = json.loads(scores.read_text())
    assert [row["valid"] for row in again] == [row["valid"] for row in whole]


def test_several_jobs_find_the_same(convergence, two_sounds, tmp_path):
    out, words = convergence
    assert command("convergence", two_sounds, tmp_path, *words, "--jobs", "2", "--compare", str(out / "record")) == 0
    known = {path.name: json.loads(path.read_text())[-1]["losses"] for path in (out / "studies").rglob("probes.json")}
    new = {
        path.name: json.loads(path.read_text())[-1]["losses"] for path in (tmp_path / "studies").rglob("probes.json")
    }
    assert new == known


def test_a_weight_costs_the_same_whatever_the_guide(convergence, two_sounds):
    """Predicting the mean of the unit embeddings costs COST, for L_r as a mean and, over all clip-clones, as a sum."""
    out, _ = convergence
    record = records.read_record(out / "record")
    rows = np.load(next((out / "studies" / "guides").glob("noise-*.whole.npy")), allow_pickle=False)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows -= rows.mean(0)
    constant = study.RMS**2 * rows.shape[1] ** 0.5
    made = np.load(next(p for p in (out / "studies" / "guides").glob("noise-*.npy") if "whole" not in p.name))
    np.testing.assert_allclose(made, study.RMS * rows / np.sqrt((rows**2).mean()), rtol=1e-4, atol=1e-5)
    assert record["arms"]["noise"]["weight"] * constant == pytest.approx(study.COST, rel=1e-3)
    config = experiment_config("cost", two_sounds / "train.jsonl", SMALL)
    tasks = (trial.Task("sounds", two_sounds),)
    given = study.Study(config, two_sounds / "train.jsonl", tasks, (), {"noise": "random:3"}, (0,), (1.0,))
    guides = {"noise": study._Guide.made("noise", "random:3", given, out / "studies", False)}
    summed = study.Arm("sums", ("objective.global_loss_reduction=sum",), guide="noise")
    weight, made = study._configured(given, summed, guides)
    assert weight * 4 * 2 * constant == pytest.approx(study.COST, rel=1e-3)
    assert made.objective.regularisation_weight == weight


def test_a_record_that_differs_is_told(convergence, two_sounds, tmp_path, capsys):
    out, words = convergence
    shutil.copytree(out / "record", tmp_path / "record")
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    for arm in record["arms"].values():
        for run in arm["runs"]:
            run["rows"][-1]["test"][two_sounds.name] = dict.fromkeys(readings.SHOWN, -3.0)
    write_json(tmp_path / "record" / "record.json", record)
    assert command("convergence", two_sounds, out, *words, "--compare", str(tmp_path / "record")) == 1
    assert "FAIL: 0 of 8 scores agree with the record; off: none on" in capsys.readouterr().out


def test_a_record_of_something_else_is_refused(convergence, two_sounds, tmp_path):
    out, words = convergence
    record = records.read_record(out / "record")
    with pytest.raises(ValueError, match="the record is of 'convergence', this is 'cost'"):
        records.compare(record, {**record, "experiment": "cost"})
    with pytest.raises(ValueError, match="nothing to compare: the record has arms"):
        records.compare(record, {**record, "tasks": {"other": {"test": 3}}})
    with pytest.raises(ValueError, match=r"holds no record of an experiment .*; expected what --record wrote"):
        command("convergence", two_sounds, out, *words, "--compare", str(tmp_path))


def test_a_record_of_the_users_is_left_alone(convergence, two_sounds, tmp_path):
    out, words = convergence
    (tmp_path / "log.jsonl").write_text("years of work")
    with pytest.raises(ValueError, match=r"log\.jsonl exists, .* Give another --record, or --overwrite"):
        command("convergence", two_sounds, out, *words, "--record", str(tmp_path))
    assert (tmp_path / "log.jsonl").read_text() == "years of work"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("convergence", "--task", "x=/nowhere"), r"no train\.jsonl in /nowhere\); expected NAME=FOLDER"),
        (("convergence", "--guide", "random"), r"--guide 'random'; expected NAME=ENCODER"),
        (("convergence", "--seeds", "0,-1"), "--seeds 0,-1; expected whole numbers"),
        (("convergence", "--jobs", "0"), "--jobs 0; expected at least 1"),
        (("overfit", "--guide", "a=random"), "--guide belongs to studies .*; overfit has none"),
    ],
)
def test_options_that_cannot_be(two_sounds, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        experiment.run(parsed(*words, "--data", str(two_sounds), "--out", str(tmp_path)))
    assert not (tmp_path / "studies").exists()


# ---------------------------------------------------------------- arms and readings


def test_stems_with_equal_parameters(two_sounds):
    config = experiment_config("resolutions", two_sounds / "train.jsonl")
    arms = {
        arm.name: study._overridden(config, arm.overrides).model
        for arm in claims.CLAIMS["resolutions"].arms((), config)
    }
    sizes = {name: sum(p.numel() for p in Encoder(model).parameters()) for name, model in arms.items()}
    unit = config.model.depth * (2 * config.model.embed_dim + 1)
    equal = {name: size for name, size in sizes.items() if name.endswith("equal parameters")}
    assert len(arms) == 9 + 7 + 2  # two of the stems have nearly the same
    assert all(abs(size - max(sizes.values())) <= 1.5 * unit for size in equal.values())
    assert all(abs(sizes[name.split(", equal")[0]] - max(sizes.values())) > unit for name in equal)


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_arm_has_a_recipe(name, two_sounds):
    config = experiment_config(name, two_sounds / "train.jsonl")
    arms = list(claims.CLAIMS[name].arms(["yamnet", "speech"], config))
    assert len({arm.name for arm in arms}) == len(arms) > 2
    for arm in arms:
        assert (
            study._overridden(config, arm.overrides) != config
            or not arm.overrides
            or arm.name in ("4 masks", "l2", "output", "{4,8,16}", "800 updates")
        )


def test_the_recipe_of_lengths_is_the_quickstarts():
    given = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    own = experiment_config("length", Path(given.data.train))
    for section in ("model", "objective", "masks", "features", "optim", "ema"):
        assert getattr(own, section) == getattr(given, section), section
    assert own.data.batch_size == given.data.batch_size


def test_runs_of_several_lengths(two_sounds, tmp_path, capsys):
    """Each is probed at its own steps, and its schedules end with it."""
    out = tmp_path / "out"
    words = ("--seeds", "0", "--probes", "2", "--record", str(tmp_path / "record"))
    assert command("length", two_sounds, out, *words) == 0
    record = records.read_record(tmp_path / "record")
    steps = {name: [row["step"] for row in arm["runs"][0]["rows"]] for name, arm in record["arms"].items()}
    assert steps == {f"{n} updates": [n // 2, n][n == 1 :] for n in (1, 2, 4)}
    for arm in record["arms"].values():
        (run,) = arm["runs"]
        rows = read_rows(out / "studies" / "runs" / run["directory"] / "metrics.jsonl", "train")
        assert rows[-1]["step"] == run["rows"][-1]["step"]
        assert rows[-1]["ema_decay"] == pytest.approx(0.9995)
    assert re.search(r": (\d+ updates|no run) passes the log-mel statistics \(100.0\)", capsys.readouterr().out)
    table = paper.judged(record).markdown()
    assert re.search(r"\| 4 updates \|.*\| \d+ \|$", table, re.MULTILINE)


def test_probes_keep_to_the_threads_of_their_run(two_sounds, tmp_path, monkeypatch):
    """Beside other jobs, BLAS and OpenMP that take all cores each take several times as long."""
    from threadpoolctl import threadpool_info

    found = []

    def seen(*args, **kwargs):
        found.extend(pool["num_threads"] for pool in threadpool_info())
        return {"valid": {}, "test": {}}

    monkeypatch.setattr(trial, "probed", seen)
    config = experiment_config("masks", two_sounds / "train.jsonl", [*SMALL, f"run.dir={tmp_path}", "run.name=x"])
    threads = torch.get_num_threads()
    try:
        trial.run_trial(trial.Trial(config, tmp_path / "x", (trial.Task("sounds", two_sounds),), (4,)))
    finally:
        torch.set_num_threads(threads)
    assert set(found) == {1}


def test_when_a_run_is_probed():
    def steps(probes, updates):
        config = experiment_config("masks", Path("clips.jsonl"), [f"optim.steps={updates}", "optim.warmup_steps=1"])
        return study.Study(config, Path("clips.jsonl"), (), (), {}, (0,), probes).steps(config)

    assert steps(study.evenly(4), 10) == (2, 5, 7, 10)
    assert steps(study.evenly(6), 3) == (1, 2, 3)
    assert steps(claims.CLAIMS["resolutions"].probes, 400) == (100, 400)


def test_reached():
    assert readings.reached([100, 200, 300], [0.1, 0.3, 0.5], 0.4) == pytest.approx(250)
    assert readings.reached([100, 200], [0.5, 0.6], 0.4) == 100
    assert readings.reached([100, 200], [0.1, 0.2], 0.4) is None


def test_a_table_of_scores_has_mean_and_deviation():
    assert readings.percent([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert readings.percent([0.5]) == "50.0"


def test_a_probe_of_pooling_both_is_of_each_half(two_sounds):
    """The halves are those of the encoder with that pooling alone."""
    from cat.encoders import CatEncoder
    from cat.model import ModelConfig

    config = experiment_config("convergence", two_sounds / "train.jsonl", SMALL)
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(channels=(8, 16), embed_dim=64, depth=1, num_heads=2))
    task = trial.Task("sounds", two_sounds)
    both = trial.probed(CatEncoder(encoder, config.features, pooling="both"), task, test=True)
    for pooling in ("cls", "mean"):
        alone = trial.probed(CatEncoder(encoder, config.features, pooling=pooling), task, test=True)
        for split in ("valid", "test"):
            assert {k: both[split][f"{k} {pooling}"] for k in ("knn", "linear")} == alone[split]
    assert len(load_manifest(two_sounds / "test.jsonl")) == 6


def found(*seeds, guide="", parameters=1_000_000):
    """An arm of a record: its scores at every probe of every seed, the same for every kind of probe; the last one is of
    test too, a tenth lower. A probe every 100 updates and 10 seconds."""
    runs = []
    for seed, scores in enumerate(seeds):
        rows = [
            {"step": 100 * i, "seconds": 10.0 * i, "valid": {"a": dict.fromkeys(readings.SHOWN, score)}}
            for i, score in enumerate(scores, start=1)
        ]
        rows[-1]["test"] = {"a": dict.fromkeys(readings.SHOWN, scores[-1] - 0.1)}
        runs.append({"seed": seed, "rows": rows})
    return {"guide": guide, "parameters": parameters, "runs": runs}


def record_of(arms, **bounds):
    """Of one task, with the bounds' scores."""
    both = {name: {"valid": {"a": s}, "test": {"a": s}} for name, s in bounds.items()}
    guides = {arm["guide"]: {} for arm in arms.values() if arm["guide"]}
    return {"tasks": {"a": {"test": 100}}, "steps": [100, 200], "guides": guides, "arms": arms, "bounds": both}


def test_no_steps_are_saved_on_the_way_to_what_needs_no_training():
    arms = {"none": found([0.3, 0.4]), "guide": found([0.4, 0.5], guide="guide")}
    several = {"none": arms["none"], "guide": found([0.4, 0.5], [0.3, 0.35], guide="guide"), "x": found([0.1, 0.2])}
    read = readings.read_convergence(record_of(several, untrained=dict.fromkeys(readings.SHOWN, 0.1)))
    assert [row[-1] for row in read.rows] == ["1.0x", "2.0x, 1 of 2", "never", ""]
    for untrained, told in ((0.35, "2.0x"), (0.45, "untrained is there")):
        read = readings.read_convergence(record_of(arms, untrained=dict.fromkeys(readings.SHOWN, untrained)))
        assert read.rows[1][-1] == told
        table = read.markdown().splitlines()
        assert table[0].startswith("| task | arm | linear mean | linear cls | knn mean | knn cls | ")
        assert table[1].startswith("| --- | --- | ---: | ---: | ---: | ---: |")
        assert [row[:3] for row in read.rows] == [
            ["a", "none", "30.0"],
            ["a", "guide", "40.0"],
            ["a", "untrained", f"{100 * untrained:.1f}"],
        ]


def test_a_student_beats_its_guide():
    arms = {
        "none": found([0.3, 0.4], [0.3, 0.4]),
        "weak": found([0.3, 0.5], [0.3, 0.6], guide="weak"),
        "strong": found([0.3, 0.7], [0.3, 0.7], guide="strong"),
        "weak, first half": found([0.3, 0.4], [0.3, 0.5], guide="weak"),
    }
    read = readings.read_distillation(record_of(arms, weak={"linear": 0.4}, strong={"linear": 0.65}))
    assert read.text == (
        "the student of weak beats it on a; a 45.0 against 40.0. the student of strong beats it on no task; a 60.0 "
        "against 65.0. weak, first half against weak: a -10.0 ± 7.1 points."
    )
    assert ["a", "weak, itself", "40.0", "", "", ""] in read.rows


def test_resolutions_are_compared_at_equal_time():
    slow = found([0.2, 0.4, 0.6, 0.8], parameters=2_345_678)  # 40 s, the other 20 s
    read = readings.read_resolutions(record_of({"{4}": found([0.3, 0.5]), "{4,8}": slow}))
    assert read.columns[-3:] == ["valid, at equal time", "parameters", "seconds"]
    assert [row[-3:] for row in read.rows] == [["50.0", "1.00 M", "20"], ["40.0", "2.35 M", "40"]]
    assert read.text == "at equal steps, mean over tasks: {4,8} 70.0, {4} 40.0."
    assert "equal time: 20 s of training, what the fastest arm takes for all steps" in read.notes


def test_a_run_that_was_held_up_does_not_count_at_equal_time():
    slow = found(*[[0.2, 0.4, 0.6, 0.8]] * 3)
    for row in slow["runs"][1]["rows"]:
        row["seconds"] *= 10
    quick = found(*[[0.3, 0.5]] * 3)
    read = readings.read_resolutions(record_of({"{4}": quick, "{4,8}": slow}))
    assert [row[-3] for row in read.rows] == ["50.0 ± 0.0", "40.0 ± 0.0"]
    late = found([0.8])  # probed once, after 100 updates and 10 s; of 40 s, then
    late["runs"][0]["rows"][0]["seconds"] = 40.0
    read = readings.read_resolutions(record_of({"{4}": quick, "{4,8}": late}))
    assert read.rows[1][-3] == "not probed by then"


def test_arms_of_fewer_seeds_are_told_from_the_others():
    several, one = found([0.3, 0.5], [0.3, 0.6]), found([0.3, 0.5])
    said = {1: "of one seed", 2: "mean and deviation of 2 seeds"}
    assert readings.read_ends(record_of({"x": one})).notes[0].endswith(f"; {said[1]}")
    assert readings.read_ends(record_of({"x": several})).notes[0].endswith(f"; {said[2]}")
    read = readings.read_ends(record_of({"x": one, "y": several}))
    assert read.notes[0].endswith(f"; {said[2]}, one seed where there is no deviation")
    assert [row[2] for row in read.rows] == ["40.0", "45.0 ± 7.1"]


def test_the_best_arms_of_every_task():
    arms = {"x": found([0.5], [0.7]), "y": found([0.6], [0.5]), "z": found([0.2], [0.22])}
    best = "a x 50.0 ± 14.1 (by chance before y)"
    assert readings.read_ends(record_of(arms)).text == f"best by linear mean: {best}; best by linear cls: {best}."
    del arms["y"]
    assert "chance" not in readings.read_ends(record_of(arms)).text


def test_what_chance_allows():
    record = record_of({})
    assert readings.by_chance(record, "a", [0.5, 0.6, 0.7], [0.1, 0.1, 0.1]) == pytest.approx(0.2 * (2 / 3) ** 0.5)
    assert readings.by_chance(record, "a", [0.5, 0.5], [0.5]) == pytest.approx(0.02 * 1.5**0.5)  # a clip of 100
