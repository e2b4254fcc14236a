"""Losses and gradients that are not finite: the update is skipped and its batch written down, a run with too many in a
row stops, and `--replay` says what it was. Every third batch here has a clip too loud for float32."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cat.checkpoints import store as checkpoints
from cat.commands import main
from cat.training import pretraining
from cat.training.descent import Descent
from cat.training.finetune import finetune
from cat.training.finetune_recipe import load_finetune_recipe
from cat.training.finiteness import Finder
from cat.training.loop import TrainingError
from cat.training.pretrain import pretrain, replay
from cat.training.recipe import load_recipe
from cat.training.records import read_rows
from cat.training.skipped import Skips

soundfile = pytest.importorskip("soundfile")

RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
masks: {num_masks: 2}
features: {frames: 32}
data: {batch_size: 3, num_workers: 0}
optim: {lr: 3e-3, warmup_steps: 2, steps: 9}
run:
  {threads: 1, log_every: 2, checkpoint_every: 3, keep_last: 9, device: cpu, tensorboard: false, figures: false}
"""
LOUD = 6  # of the clips


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    random = np.random.default_rng(0)
    for name in ("train", "quiet"):
        (folder / name).mkdir()
        for i in range(9):
            wave = random.standard_normal(6000) * (1e30 if (name, i) == ("train", LOUD) else 0.1)
            soundfile.write(folder / name / f"{i}.wav", wave, 16000, subtype="FLOAT")
    (folder / "minute.yaml").write_text(RECIPE.replace("data: {", f"data: {{train: {folder / 'train'}, "))
    return folder / "minute.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory, recipe) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    result = pretrain(load_recipe(recipe), run_dir, progress=False)
    assert (result.step, result.skipped) == (9, 3)
    assert math.isfinite(result.first_loss + result.last_loss)
    return run_dir


def skipped(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl", "train") if row["grad_norm"] is None]


def test_a_batch_that_is_not_finite_is_skipped_and_written_down(run, recipe):
    steps = skipped(run)
    assert len(steps) == 3  # once an epoch
    files = [run / "skipped" / f"step-{step:08d}.json" for step in steps]
    assert sorted((run / "skipped").iterdir()) == files
    about = json.loads(files[0].read_text())
    assert (about["step"], about["values"]["grad_norm"], len(about["clips"])) == (steps[0], None, 3)
    assert {"index": LOUD, "path": str(recipe.parent / "train" / f"{LOUD}.wav")} in about["clips"]
    warnings = [row["text"] for row in read_rows(run / "metrics.jsonl", "warning")]
    assert f"--replay {files[0]}" in warnings[0]
    assert all(value.isfinite().all() for value in checkpoints.load(checkpoints.newest(run)).model.values())


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
def test_a_run_that_goes_on_skips_the_same(run, recipe, tmp_path, stop_at):
    pretrain(load_recipe(recipe, [f"run.stop_at={stop_at}"]), tmp_path / "run", progress=False)
    assert pretrain(load_recipe(recipe), tmp_path / "run", resume=True, progress=False).skipped == 3
    both = [checkpoints.load(checkpoints.newest(folder)) for folder in (run, tmp_path / "run")]
    for ours, theirs in zip(*((saved.model | saved.optimizer).items() for saved in both), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    assert skipped(run) == skipped(tmp_path / "run")
    names = [sorted(path.name for path in (folder / "skipped").iterdir()) for folder in (run, tmp_path / "run")]
    assert names[0] == names[1]


def test_replay_names_the_input_and_the_clip(run, capsys):
    step = skipped(run)[-1]
    before = sorted(path for path in run.rglob("*"))
    assert main(["pretrain", "--replay", str(run / "skipped" / f"step-{step:08d}.json"), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert f"step {step} of {run}, again, from {run}/checkpoints/step-" in told
    assert "not finite first: the model's input spec: " in told
    assert f"of the clip {Path(load_recipe(run / 'config.yaml').data.train) / f'{LOUD}.wav'}" in told
    assert sorted(path for path in run.rglob("*")) == before


def test_replay_comes_to_the_weights_of_then(run, recipe, tmp_path, monkeypatch):
    """From a checkpoint and from the seed, what it makes again is what the run made: its loss, had it been finite."""
    rows = {row["step"]: row for row in read_rows(run / "metrics.jsonl", "train")}
    for at in (min(rows.keys() - skipped(run)), max(rows.keys() - skipped(run))):
        with monkeypatch.context() as patch:
            patch.setattr(pretraining.CAT, "forward", exploding(pretraining.CAT.forward, at))
            config = load_recipe(recipe, [f"run.stop_at={at}"])
            run_dir = pretrain(config, tmp_path / str(at), progress=False).run_dir
        again = replay(run_dir / "skipped" / f"step-{at:08d}.json", progress=False)
        assert again.found is None
        assert again.values["loss"] == rows[at]["loss"]
        assert again.values["grad_norm"] == rows[at]["grad_norm"]
        assert "everything is finite this time" in again.told()
        assert (again.begun_from is None) == (at <= 3)


def test_replay_without_a_checkpoint_before_it_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    step = skipped(run)[1]
    for path in checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[:-1]:
        shutil.rmtree(path)
    again = replay(tmp_path / "run" / "skipped" / f"step-{step:08d}.json", progress=False)
    assert f"these weights are {10 - step} updates newer" in again.told()
    assert again.found.kind == "input"


def exploding(forward, *at):
    """What makes the loss of these updates infinite."""
    calls = 0

    def wrapped(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        output = forward(self, *args, **kwargs)
        return output._replace(loss=output.loss * math.inf) if calls in at else output

    return wrapped


def test_replay_refuses_what_is_no_batch(run, recipe, capsys):
    (run.parent / "other.json").write_text("{}")
    for path, message in (
        (run, f"{run} is a directory; expected the file of a skipped batch: {run}/skipped/step-"),
        (recipe, "is not the file of a skipped batch"),
        (run.parent / "other.json", "expected RUN/skipped/step-NUMBER.json"),
        (run.parent / "missing.json", "No such file or directory"),
    ):
        assert main(["pretrain", "--replay", str(path)]) == 1
        assert message in capsys.readouterr().err
    batch = next((run / "skipped").iterdir())
    assert main(["finetune", "--replay", str(batch)]) == 1
    assert "is a batch of cat-audio pretrain" in capsys.readouterr().err
    assert main(["pretrain", "--replay", str(batch), "--resume"]) == 1
    assert "leave out --resume" in capsys.readouterr().err


def test_too_many_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(tmp_path, recipe, monkeypatch):
    """It may be the weights: what is saved amid such updates takes the place of nothing."""
    forward = pretraining.CAT.forward
    monkeypatch.setattr(pretraining.CAT, "forward", exploding(forward, *range(4, 20)))
    quiet = f"data.train={recipe.parent / 'quiet'}"
    changes = [quiet, "optim.steps=40", "run.max_bad_steps=8", "run.keep_last=1", "run.keep_best=0"]
    with pytest.raises(TrainingError, match=r"in all of the 8 updates .*max_bad_steps.* checkpoint is .*step-0{7}3\."):
        pretrain(load_recipe(recipe, changes), tmp_path / "run", progress=False)
    good = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert checkpoints.load(good).step == 3
    monkeypatch.setattr(pretraining.CAT, "forward", exploding(forward, *range(1, 4)))
    config = load_recipe(recipe, [*changes, "run.stop_at=6"])
    assert pretrain(config, tmp_path / "run", resume=True, progress=False).skipped == 3
    assert sorted(path.name for path in good.parent.iterdir()) == ["step-00000003", "step-00000006"]
    monkeypatch.setattr(pretraining.CAT, "forward", exploding(forward, *range(1, 9)))
    with pytest.raises(TrainingError, match=r"at step 4 .*step-0{7}3\."):  # it counts on
        pretrain(load_recipe(recipe, changes), tmp_path / "run", resume=True, progress=False)


def test_a_step_whose_gradient_is_not_finite_moves_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    parameters = dict(layer.named_parameters())
    descent = Descent(torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True), parameters, 1.0, precision="fp32")

    def update(scale: float) -> float:
        descent.backward(layer(torch.ones(1, 3)).sum() * scale)
        return descent.step()[0].item()

    assert math.isfinite(update(1.0))
    before = {name: value.clone() for name, value in (layer.state_dict() | descent.tensors()).items()}
    for scale in (math.nan, math.inf, 3e38):
        assert not math.isfinite(update(scale))
        assert all(torch.equal(before[name], value) for name, value in (layer.state_dict() | descent.tensors()).items())
    update(1.0)
    assert not torch.equal(before["weight"], layer.weight)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is():
    layer = nn.Linear(3, 2)
    descent = Descent(
        torch.optim.AdamW(layer.parameters(), fused=True), dict(layer.named_parameters()), 1.0, precision="fp32"
    )
    before = layer.weight.clone()
    descent.backward(layer(torch.ones(1, 3)).sum() + math.inf)
    assert not descent.step()[0].isfinite()
    assert torch.equal(layer.weight, before)


def test_half_precision_scales_its_losses_and_goes_on_with_the_same_scale(tmp_path, recipe):
    large = "objective.global_weight=10"  # so that the first scale is too large
    changes = ["run.precision=fp16", "run.max_bad_steps=3", "optim.steps=12", large]
    for name, stops in (("whole", [12]), ("parts", [2, 7, 12])):
        for stop_at in stops:
            config = load_recipe(recipe, [*changes, f"run.stop_at={stop_at}"])
            result = pretrain(config, tmp_path / name, resume=stop_at > stops[0], progress=False)
    assert result.skipped == 4  # those of the clip; not those of a scale that was too large at first
    rows, others = (read_rows(tmp_path / name / "metrics.jsonl", "train") for name in ("whole", "parts"))
    assert rows == others
    assert rows[0]["scale"] == 65536
    assert rows[0]["loss"] is not None
    assert rows[0]["grad_norm"] is None
    good = [row for row in rows if row["grad_norm"] is not None]
    assert good
    assert all(row["scale"] < 65536 for row in good)
    fp32 = pretrain(load_recipe(recipe, [large]), tmp_path / "fp32", progress=False)
    assert result.last_loss == pytest.approx(fp32.last_loss, rel=0.2)


def test_fine_tuning_skips_and_replays_too(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, part in itertools.product(("train", "valid"), ("a", "b")):
        (tmp_path / split / part).mkdir(parents=True)
        for i in range(2):
            wave = random.standard_normal(6000) * (1e30 if (split, part, i) == ("train", "b", 0) else 0.1)
            soundfile.write(tmp_path / split / part / f"{part}{i}.wav", wave, 16000, subtype="FLOAT")
    (tmp_path / "tune.yaml").write_text(
        RECIPE.replace("masks: {num_masks: 2}\n", "encoder: none\n")
        .replace("data: {", f"data: {{train: {tmp_path / 'train'}, valid: {tmp_path / 'valid'}, ")
        .replace("steps: 9", "steps: 3")
    )
    config = load_finetune_recipe(tmp_path / "tune.yaml")
    run = finetune(config, tmp_path / "run", progress=False).run
    assert run.skipped
    batch = next((tmp_path / "run" / "skipped").iterdir())
    assert main(["finetune", "--replay", str(batch), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "not finite first: the model's input spec: " in told
    assert f"of the clip {tmp_path / 'train' / 'b' / 'b0.wav'}" in told


def test_skips_are_counted():
    def row(step, norm=1.0, loss=1.0, **more):
        return {"step": step, "loss": loss, "grad_norm": norm, **more}

    skips = Skips([row(1, None), row(2), row(3, None), row(4, None)])
    assert (skips.count, [r["step"] for r in skips.streak]) == (3, [3, 4])
    assert [r["step"] for r in skips.add([row(5, math.inf), row(6, math.nan), row(7)], 4)] == [5, 6]
    assert len(skips.streak) == 4  # enough, so 7 was not looked at
    skips = Skips([row(1, None, scale=8.0), row(2, None, None, scale=8.0), row(3, None, scale=1.0)])
    assert (skips.count, [r["step"] for r in skips.streak]) == (2, [2, 3])


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_the_first_module_is_found():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Root(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model[0].bias.zero_()

    def found(x):
        with Finder(model) as finder:
            model(torch.tensor([x])).sum().backward()
        return finder.first and (finder.first.kind, finder.first.name)

    assert found([1.0, 2.0]) is None
    assert found([1.0, 0.0]) == ("gradient", "1")  # of a root at 0
    assert found([math.nan, 0.0]) == ("input", "input")
    model[2].forward = lambda x: (x - 5).log()
    assert found([1.0, 9.0]) == ("output", "2")
    with torch.no_grad():
        model[3].weight[0, 0] = math.inf
    assert found([1.0, 2.0]) == ("weight", "3.weight")
    assert not any(module._forward_hooks for module in model.modules())
