"""A run for each fold and seed."""

from __future__ import annotations

import json
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest

from cat.checkpoints import store as checkpoints
from cat.commands import main
from cat.config import ConfigError
from cat.data import load_manifest
from cat.training import finetuning
from cat.training.finetune import finetune
from cat.training.finetune_recipe import load_finetune_recipe
from cat.training.records import read_rows
from cat.training.repeats import RepeatsResult, finetune_repeats

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("yaml")
pytest.importorskip("sklearn")

RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2}
augment: {mixup: 0.8}
data: {batch_size: 4, num_workers: 0}
optim: {lr: 5e-3, warmup_steps: 0, steps: 3}
run:
  {threads: 1, log_every: 1, checkpoint_every: 3, eval_every: 0, device: cpu, tensorboard: false, figures: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """24 clips of two classes in three folds."""
    folder = tmp_path_factory.mktemp("folds")
    random = np.random.default_rng(0)
    lines = []
    for i in range(24):
        soundfile.write(folder / f"{i}.wav", 0.1 * random.standard_normal(4000), 16_000)
        lines.append(json.dumps({"path": f"{i}.wav", "labels": ["ab"[i % 2]], "fold": 1 + i % 3}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    (folder / "folds.yaml").write_text(RECIPE.replace("data: {", f"data: {{train: {folder / 'list.jsonl'}, "))
    return folder / "folds.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe) -> tuple[Path, RepeatsResult]:
    run_dir = tmp_path_factory.mktemp("runs") / "folds"
    return run_dir, finetune_repeats(load_finetune_recipe(recipe), run_dir, by_fold=True, progress=False)


def test_each_fold_is_the_test_split_once(whole):
    run_dir, result = whole
    assert [(row["run"], row["fold"], row["seed"]) for row in result.scores] == [(f"fold{k}", k, 0) for k in (1, 2, 3)]
    for row in result.scores:
        assert (row["clips"], row["chosen_on"]) == ({"train": 14, "valid": 2, "test": 8}, "held-out")
        own = json.loads((run_dir / row["run"] / "scores.json").read_text())
        assert own == {key: value for key, value in row.items() if key not in ("run", "fold")}
    accuracies = [row["test"]["accuracy"] for row in result.scores]
    together = json.loads((run_dir / "scores.json").read_text())
    assert together["mean"] == pytest.approx(statistics.mean(accuracies))
    assert together["deviation"] == pytest.approx(statistics.stdev(accuracies))
    assert [row["run"] for row in together["runs"]] == ["fold1", "fold2", "fold3"]


def test_splits_share_no_clip(recipe):
    manifest = load_manifest(recipe.with_name("list.jsonl"))
    fold = {clip.path: clip.extra["fold"] for clip in manifest.clips}
    config = load_finetune_recipe(recipe, ["data.fold=2"])
    splits = finetuning.read_splits(config)
    parts = [{clip.path for clip in part.clips} for part in (splits.train, splits.valid, splits.test)]
    assert set.union(*parts) == fold.keys()
    assert sum(map(len, parts)) == len(fold)
    assert {fold[path] for path in parts[2]} == {2}
    assert {fold[path] for path in parts[0] | parts[1]} == {1, 3}
    assert {clip.labels for clip in splits.valid.clips} == {("a",), ("b",)}


def test_a_fold_is_the_run_that_data_fold_gives(tmp_path, recipe, whole):
    alone = finetune(load_finetune_recipe(recipe, ["data.fold=3"]), tmp_path / "run", progress=False)
    assert {"run": "fold3", "fold": 3, **alone.scores} == whole[1].scores[2]


def test_stopped_it_goes_on_and_what_has_ended_is_not_run_again(tmp_path, recipe, whole, monkeypatch):
    function, begun = finetuning.finetune_batches, []

    def stopping(manifest, labels, data, *args, **options):
        begun.append(data.fold)
        for number, batch in enumerate(function(manifest, labels, data, *args, **options)):
            if data.fold == 2 and number == 1 and begun == [1, 2]:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(finetuning, "finetune_batches", stopping)
    config = load_finetune_recipe(recipe)
    result = finetune_repeats(config, tmp_path / "run", by_fold=True, progress=False)
    assert (result.stopped_by, [row["fold"] for row in result.scores]) == (signal.SIGTERM, [1])
    assert not (tmp_path / "run" / "scores.json").exists()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "fold1" / "checkpoints").rglob("*")}
    again = finetune_repeats(config, tmp_path / "run", by_fold=True, resume=True, progress=False)
    assert again.scores == whole[1].scores
    assert first == {path: path.stat().st_mtime_ns for path in first}
    for fold in (1, 2, 3):
        ours, theirs = (
            read_rows(run / f"fold{fold}" / "metrics.jsonl", "train") for run in (tmp_path / "run", whole[0])
        )
        assert ours == theirs


def test_seeds(tmp_path, recipe, capsys):
    run = ["finetune", str(recipe), f"run.dir={tmp_path}", "run.name=run", "run.seed=5", "optim.steps=3", "--quiet"]
    assert main([*run, "--folds", "--seeds", "2"]) == 0
    told = capsys.readouterr().out
    together = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [row["run"] for row in together["runs"]] == [f"seed{s}/fold{k}" for s in (5, 6) for k in (1, 2, 3)]
    means = [statistics.mean(r["test"]["accuracy"] for r in together["runs"] if r["seed"] == seed) for seed in (5, 6)]
    assert together["mean"] == pytest.approx(statistics.mean(means))
    assert together["deviation"] == pytest.approx(statistics.stdev(means))
    assert f"mean         {together['mean']:.4f}" in told
    assert f"deviation    {together['deviation']:.4f}" in told
    assert "seed6/fold2" in told
    weights = [checkpoints.load(checkpoints.newest(tmp_path / "run" / f"seed{s}" / "fold1")).model for s in (5, 6)]
    assert not weights[0]["head.linear.weight"].equal(weights[1]["head.linear.weight"])
    assert main([*run, "--folds", "--seeds", "2"]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_what_cannot_be_asked_for(tmp_path, recipe, capsys):
    config = load_finetune_recipe(recipe)
    for changes, message in (
        (["data.fold=1"], r"data\.fold=1 and all folds"),
        ([f"data.test={recipe.with_name('list.jsonl')}"], r"data\.test=.* and all folds"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune_repeats(load_finetune_recipe(recipe, changes), tmp_path / "run", by_fold=True, progress=False)
    with pytest.raises(ConfigError, match="seeds is 0"):
        finetune_repeats(config, tmp_path / "run", by_fold=True, seeds=0, progress=False)
    finetune(config, tmp_path / "single", progress=False)
    with pytest.raises(ConfigError, match="holds a single run"):
        finetune_repeats(config, tmp_path / "single", by_fold=True, resume=True, progress=False)
    assert main(["finetune", str(recipe), "--folds", "--profile"]) == 1
    assert "--profile times one run" in capsys.readouterr().err


def test_the_deviation_is_over_folds_or_over_the_means_of_seeds():
    def row(seed, fold, value):
        return {"run": f"seed{seed}/fold{fold}", "seed": seed, "test": {"accuracy": value}, "valid": {"accuracy": 0}}

    values = {(0, 1): 0.4, (0, 2): 0.6, (1, 1): 0.8, (1, 2): 1.0}
    rows = [row(*key, value) for key, value in values.items()]
    assert RepeatsResult("accuracy", rows[:2], None).summary() == pytest.approx({"mean": 0.5, "deviation": 0.02**0.5})
    assert RepeatsResult("accuracy", rows, None).summary() == pytest.approx({"mean": 0.7, "deviation": 0.08**0.5})


def test_a_summary_of_one_run_has_no_deviation():
    row = {"run": "seed0", "seed": 0, "test": None, "valid": {"accuracy": 0.5}}
    result = RepeatsResult("accuracy", [row], None)
    assert result.summary() == {"mean": 0.5}
    assert "valid accuracy" in result.table()
