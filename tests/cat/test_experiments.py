"""The first experiments, on a model and a data set small enough for a test."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from cat.commands import experiment, main
from cat.config import ConfigError
from cat.data import synth
from cat.experiments import failures, kernels, overfit, overhead
from cat.experiments.recipes import experiment_config

pytest.importorskip("soundfile")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

SMALL = (
    "model.channels=[8,16]",
    "model.embed_dim=192",
    "model.depth=2",
    "model.num_heads=3",
    "model.decoder_dim=64",
    "model.decoder_layers=1",
    "features.frames=32",
    "masks.num_masks=2",
    "data.num_workers=0",
    "run.threads=1",
)


def command(name, data, out, *overrides):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    words = [name, *SMALL, *overrides, "--data", str(data), "--out", str(out), "--quiet"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return experiment.run(parser.parse_args(words))
    finally:
        torch.set_num_threads(threads)


def test_overfit_falls_by_ninety_percent(two_sounds, tmp_path, capsys):
    assert command("overfit", two_sounds, tmp_path, "data.batch_size=2", "optim.lr=3e-3") == 0
    said = capsys.readouterr().out
    assert "PASS: the regression loss fell by 9" in said
    result = json.loads((tmp_path / "overfit" / "result.json").read_text())
    curve = [row["regression"] for row in result["values"]["curve"]]
    assert result["passed"]
    assert curve[-1] <= 0.1 * curve[0]
    assert (
        result["values"]["curve"][0]["target_std"] == result["values"]["curve"][-1]["target_std"]
    )  # targets stood still
    assert (tmp_path / "overfit" / "figures" / "loss.png").is_file()


def test_overfit_has_no_guides(two_sounds, tmp_path):
    with pytest.raises(ConfigError, match=r"guides\.g: overfit trains on one batch without guides"):
        command("overfit", two_sounds, tmp_path, "guides.g.encoder=random")


def test_overfit_fails_when_the_loss_does_not_fall_enough(two_sounds, tmp_path, capsys):
    assert command("overfit", two_sounds, tmp_path, "optim.steps=3", "optim.warmup_steps=0") == 1
    assert "FAIL: the regression loss fell by" in capsys.readouterr().out
    assert not json.loads((tmp_path / "overfit" / "result.json").read_text())["passed"]


def test_data_of_an_older_version_is_made_again_and_other_files_are_not_touched(tmp_path, monkeypatch):
    few = synth.SynthConfig(clips_per_class=1, eval_clips_per_class=1, classes=("rain", "bell"))
    monkeypatch.setattr(experiment, "SynthConfig", lambda **_: few)
    folder = experiment._made_data(tmp_path / "data")
    monkeypatch.setattr(synth, "VERSION", synth.VERSION + 1)
    before = (folder / "train.jsonl").stat().st_ino
    assert experiment._made_data(folder) == folder
    assert (folder / "train.jsonl").stat().st_ino != before
    assert experiment._made_data(folder) == folder  # made: left alone
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError):
        experiment._made_data(tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.txt").read_text() == "keep"


def test_recipe_of_an_experiment_can_be_overridden(tmp_path):
    config = experiment_config("overfit", tmp_path, ["optim.lr=0.5", "model.preset=small"])
    assert (config.optim.lr, config.model.embed_dim, config.data.batch_size) == (0.5, 384, 4)
    with pytest.raises(ValueError, match=r"unknown key .optim\.leer."):
        experiment_config("overfit", tmp_path, ["optim.leer=1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_agreement.py runs 300 steps")
def test_kernels_train_as_the_dense_formula_does(two_sounds, tmp_path, capsys):
    stem = ("model.resolutions=[8,16]", "model.channels=[16]", "model.embed_dim=16", "model.num_heads=1")
    rest = ("model.depth=1", "model.decoder_dim=16", "data.batch_size=1", "optim.warmup_steps=0", "optim.steps=2")
    assert command("kernels", two_sounds, tmp_path, *stem, *rest, "model.kernels=triton", "optim.lr=1e-3") == 0
    assert "PASS: the losses with triton differ from those of the dense formula by" in capsys.readouterr().out
    found = json.loads((tmp_path / "kernels" / "result.json").read_text())["values"]["found"]
    assert all(row["largest"] < 1e-4 * row["noise"] for row in found.values())
    assert (tmp_path / "kernels" / "figures" / "agreement.png").is_file()


def test_kernels_that_train_otherwise_fail(two_sounds, tmp_path, monkeypatch):
    """Reference kernels with a tenth more learning rate."""
    made = kernels._with_kernels
    slower = dataclasses.replace(
        experiment_config("kernels", two_sounds / "train.jsonl").optim, lr=3.3e-4, warmup_steps=0
    )

    def other(config, name, seed):
        config = made(config, name, seed)
        return dataclasses.replace(config, optim=slower) if name == "reference" else config

    steps = ("model.kernels=reference", "run.device=cpu", "data.batch_size=2", "optim.warmup_steps=0", "run.stop_at=6")
    assert command("kernels", two_sounds, tmp_path / "same", *steps) == 0
    monkeypatch.setattr(kernels, "_with_kernels", other)
    assert command("kernels", two_sounds, tmp_path / "other", *steps) == 1


def test_kernels_refuses_to_compare_the_formula_with_itself(two_sounds, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.kernels='dense' is what this experiment compares with; expected"):
        command("kernels", two_sounds, tmp_path, "model.kernels=dense")


def test_foreign_files_in_its_folder_are_left_alone(two_sounds, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cat.commands.experiment.overfit", None)  # before any work
    for name in ("result.json", "figures/loss.png"):
        path = tmp_path / name / "overfit" / name
        path.parent.mkdir(parents=True)
        path.write_text("years of work")
        assert main(["experiment", "overfit", "--data", str(two_sounds), "--out", str(tmp_path / name)]) == 1
        assert f"{path} exists" in capsys.readouterr().err
        assert path.read_text() == "years of work"


# ---------------------------------------------------------------- failures


class Any16:
    """An embedding of each clip's own."""

    name, sample_rate, dim = "any", 16000, 16

    def __call__(self, waveform, lengths=None):
        seeds = (1e6 * waveform.abs().sum(1)).long().tolist()
        return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def provoke(data, out, monkeypatch, cases, *overrides):
    monkeypatch.setattr(failures, "CASES", {name: failures.CASES[name] for name in cases})
    config = experiment_config(
        "failures", data / "train.jsonl", [*SMALL, "data.batch_size=3", "optim.warmup_steps=1", *overrides]
    )
    return failures.failures(config, out, encoder=Any16(), progress=False)


def test_failures_that_show_at_the_start_are_all_named(two_sounds, tmp_path, monkeypatch):
    cases = [name for name, case in failures.CASES.items() if name == "control" or not case.whole]
    verdict = provoke(two_sounds, tmp_path, monkeypatch, cases, "optim.steps=2")
    assert verdict.passed, verdict.format()
    assert "the trainer named all 7 failures and warned of nothing in the control" in verdict.text
    assert [row[0] for row in verdict.rows] == cases
    assert verdict.rows[0][2] == "nothing, as it should be"
    assert (tmp_path / "figures" / "loss.png").is_file()
    told = verdict.values["warnings"]
    assert all(len(told[name]) == 1 for name in cases[1:])  # and nothing else


def test_failures_that_are_not_named_and_false_alarms_fail(two_sounds, tmp_path, monkeypatch):
    limits = ("run.collapse_pred_std=100", "run.collapse_steps=3", "optim.steps=4")
    cases = ("control", "projector on the teacher too")
    verdict = provoke(two_sounds, tmp_path / "alarm", monkeypatch, cases, *limits)
    assert verdict.text.startswith("it warned of the control: the predictions may have collapsed")
    assert verdict.rows[1][1] == "4"  # where rows were written last
    monkeypatch.setitem(failures.CASES, "embeddings of other clips", failures.Case("nobody says this"))
    verdict = provoke(
        two_sounds, tmp_path / "missed", monkeypatch, ("control", "embeddings of other clips"), "optim.steps=2"
    )
    assert not verdict.passed
    assert verdict.text == "the trainer did not name: embeddings of other clips"


def test_failures_need_a_constant_prediction_to_compare_with(two_sounds, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"regularisation_projection='external'.* expected 'student'"):
        provoke(two_sounds, tmp_path, monkeypatch, ["control"], "objective.regularisation_projection=external")


def test_a_student_that_does_not_follow_its_guide_is_named(two_sounds, tmp_path, monkeypatch):
    """With a rate at which nothing is learned."""
    cases = ("control", "embeddings of other clips")
    verdict = provoke(
        two_sounds, tmp_path, monkeypatch, cases, "optim.lr=1e-9", "optim.steps=4", "optim.warmup_steps=0"
    )
    assert verdict.rows[1][2] == "... does not follow the guide ..."
    assert verdict.text.startswith("it warned of the control: the student does not follow the guide: L_r is")


def test_a_projector_on_both_sides_collapses(two_sounds):
    """Which `overfit`'s model, with the teacher held still, does not."""
    config = experiment_config("overfit", two_sounds / "train.jsonl", [*SMALL, "data.batch_size=2"])
    (batch,) = (overfit._first_batch(config),)
    torch.manual_seed(0)
    model = failures.CollapsingCAT(config.model, config.objective)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    deviations = []
    for _ in range(25):
        output = model(batch.spec, batch.visible, rng=torch.zeros(2, dtype=torch.int64))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        deviations.append(output.target_std.item())
    assert deviations[-1] < 0.5 * max(deviations)
    assert output.loss.item() < 1


# ---------------------------------------------------------------- what a guide costs


def test_the_cost_of_the_regularisation(two_sounds, tmp_path, monkeypatch):
    """In this process, for the test: the losses of live and cached guides decide."""
    config = experiment_config("kernels", two_sounds / "train.jsonl", [*SMALL, "data.batch_size=2"])

    def here(other):
        def run(config, steps):
            guides = {name: dataclasses.replace(guide, **other(guide)) for name, guide in config.guides.items()}
            found = overhead._train(dataclasses.replace(config, guides=guides), steps)
            return {**found, "memory": 2**20 * (3 if guides else 1)}

        return run

    def measured(other):
        monkeypatch.setattr(overhead, "_in_a_process", here(other))
        options = {"encoder": "random", "steps": 1, "rounds": 1, "progress": False}
        return overhead.overhead(config, tmp_path / "out", **options)

    verdict = measured(lambda guide: {})
    assert verdict.passed
    assert [row[0] for row in verdict.rows] == ["without", "cached", "live, data workers", "live, training process"]
    assert [row[5:7] for row in verdict.rows] == [("1", "0"), *[("3", "2")] * 3]
    assert verdict.rows[0][2] == "1.00"
    assert verdict.rows[0][-1] != verdict.rows[1][-1]
    json.dumps(verdict.values)
    assert "FAIL" in measured(lambda guide: {"encoder": "random:1"} if guide.where == "device" else {}).format()


def test_memory_is_that_of_a_process_and_those_below_it():
    own = overhead._memory(os.getpid())
    if own is None:
        pytest.skip("no smaps_rollup here")
    holding = "held = bytearray(b'x' * 10**8); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert overhead._memory(os.getpid()) > own + 9 * 10**7
        child.stdin.close()
