"""Pre-training runs of a minute model on noise bursts: exact resuming after SIGKILL, signals, errors, records."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from cat.checkpoints import load_encoder
from cat.checkpoints import store as checkpoints
from cat.commands import main
from cat.config import ConfigError, from_mapping, to_mapping
from cat.data import EmbeddingWriter, load_manifest, write_manifest
from cat.data.loader import TooManyFailures
from cat.experiments.failures import UnwiredCAT
from cat.files import sha256_of
from cat.model import CAT
from cat.training import directory, loop, pretraining
from cat.training.loop import TrainingError
from cat.training.pretrain import _task as make_task
from cat.training.pretrain import pretrain, profile
from cat.training.pretraining import Pretraining
from cat.training.recipe import PretrainConfig, RunConfig, load_recipe
from cat.training.records import read_rows

soundfile = pytest.importorskip("soundfile")

REPOSITORY = Path(__file__).parents[3]
RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 2, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
objective: {global_loss_reduction: mean}
masks: {num_masks: 2}
features: {frames: 32}
data: {batch_size: 3, num_workers: 0, gain: true}
optim: {lr: 3e-3, warmup_steps: 2, steps: 24}
ema: {start: 0.9, end: 0.99, steps: 20}
run:
  {threads: 1, log_every: 4, checkpoint_every: 5, eval_every: 4, device: cpu, tensorboard: false, figures: false}
"""


def make_audio(folder: Path, count: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        wave = random.standard_normal(int(random.integers(3000, 12000)))
        soundfile.write(folder / f"{i:02d}.wav", 0.1 * wave, 16000)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audio")
    make_audio(root / "train", 8, seed=0)
    make_audio(root / "valid", 4, seed=1)
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, audio) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "minute.yaml"
    text = RECIPE.replace("data: {", f"data: {{train: {audio / 'train'}, valid: {audio / 'valid'}, ")
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recipe) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = pretrain(load_recipe(recipe), run_dir, progress=False)
    assert (result.step, result.stopped_by, result.failed_clips) == (24, None, 0)
    return run_dir


def numbers(run_dir: Path) -> list[dict]:
    """Everything in metrics.jsonl that has to be reproducible."""
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] != "speed"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    found = checkpoints.load(path)
    return {f"model.{k}": v for k, v in found.model.items()} | {f"optimizer.{k}": v for k, v in found.optimizer.items()}


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert numbers(run_dir) == numbers(other)
    ours, theirs = weights(checkpoints.newest(run_dir)), weights(checkpoints.newest(other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# ---------------------------------------------------------------- a run


def test_run_directory(uninterrupted):
    assert sorted(p.name for p in uninterrupted.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    train = read_rows(uninterrupted / "metrics.jsonl", "train")
    assert [row["step"] for row in train] == list(range(1, 25))
    assert set(train[0]) == {
        "kind", "step", "loss", "regression", "global", "regularisation", "pred_std", "target_std", "grad_norm", "lr",
        "ema_decay",
    }  # fmt: skip
    assert train[0]["lr"] == pytest.approx(1e-3)
    assert train[0]["ema_decay"] == pytest.approx(0.9 + 0.09 / 20)
    assert train[-1]["ema_decay"] == 0.99
    # evaluated every 4 steps, and for the checkpoints at 5, 10, 15
    valid = read_rows(uninterrupted / "metrics.jsonl", "valid")
    assert [row["step"] for row in valid] == [4, 5, 8, 10, 12, 15, 16, 20, 24]
    assert valid[-1]["loss"] < valid[0]["loss"]
    assert np.mean([row["loss"] for row in train[-6:]]) < np.mean([row["loss"] for row in train[:6]])


def test_kept_checkpoints_are_the_newest_and_the_best(uninterrupted):
    scores = {row["step"]: row["loss"] for row in read_rows(uninterrupted / "metrics.jsonl", "valid")}
    best = min((5, 10, 15, 20, 24), key=scores.get)
    kept = [int(p.name[5:]) for p in checkpoints.list_checkpoints(uninterrupted / "checkpoints")]
    assert kept == sorted({best, 20, 24})
    assert checkpoints.best(uninterrupted).name == f"step-{best:08d}"
    state = checkpoints.read_state(checkpoints.newest(uninterrupted))
    assert state["score"] == scores[24]


def test_its_encoder_loads(uninterrupted, recipe):
    encoder, info = load_encoder(uninterrupted)
    config = load_recipe(recipe)
    assert (info.step, info.features, info.model) == (24, config.features, config.model)
    assert encoder(torch.randn(2, 1, 48, 128)).shape == (2, 1 + 3 * 8, 16)


def test_config_yaml_is_the_whole_recipe(uninterrupted, recipe):
    written = load_recipe(uninterrupted / "config.yaml")
    assert written == load_recipe(recipe)


def test_data_workers_change_nothing(tmp_path, recipe, uninterrupted):
    pretrain(load_recipe(recipe, ["data.num_workers=2", "run.stop_at=8"]), tmp_path / "run", progress=False)
    assert numbers(tmp_path / "run") == [row for row in numbers(uninterrupted) if row["step"] <= 8]


def test_features_in_the_training_process_change_rounding_only(tmp_path, recipe, uninterrupted):
    pretrain(load_recipe(recipe, ["data.features=gpu", "run.stop_at=6"]), tmp_path / "run", progress=False)
    found, expected = numbers(tmp_path / "run"), [row for row in numbers(uninterrupted) if row["step"] <= 6]
    found = [row for row in found if (row["kind"], row["step"]) != ("valid", 6)]  # for the checkpoint at 6
    assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.gpu
def test_a_step_with_features_on_the_gpu_waits_for_nothing(tmp_path, recipe, monkeypatch):
    update, mode = loop.Trainer._update, torch.cuda.get_sync_debug_mode()

    def watched(self, batch):
        # The first steps make tables, FFT plans and the optimiser's moments.
        torch.cuda.set_sync_debug_mode("error" if self.step >= 2 else mode)
        try:
            update(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(loop.Trainer, "_update", watched)
    config = load_recipe(recipe, ["run.device=cuda", "data.valid=null", "run.stop_at=6"])
    assert pretraining.Pretraining(config, load_manifest(config.data.train)).features == "gpu"
    assert pretrain(config, tmp_path / "run", progress=False).step == 6


def test_seed_changes_everything(tmp_path, recipe, uninterrupted):
    pretrain(load_recipe(recipe, ["run.seed=1", "run.stop_at=1"]), tmp_path / "run", progress=False)
    assert numbers(tmp_path / "run")[0]["loss"] != numbers(uninterrupted)[0]["loss"]


def test_bf16_autocast(tmp_path, recipe, uninterrupted):
    pretrain(load_recipe(recipe, ["run.precision=bf16", "run.stop_at=3"]), tmp_path / "run", progress=False)
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "train")]
    exact = [row["loss"] for row in read_rows(uninterrupted / "metrics.jsonl", "train")][:3]
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.02)
    with pytest.raises(ConfigError, match=r"was trained in bf16.*run\.precision=bf16"):
        pretrain(load_recipe(recipe, ["run.precision=fp32"]), tmp_path / "run", resume=True, progress=False)


@pytest.fixture
def embedded(tmp_path, audio) -> list[str]:
    """Changes of a recipe: clips with embeddings, and no validation."""
    manifest = load_manifest(audio / "train")
    rows = np.random.default_rng(0).standard_normal((len(manifest), 6)).astype(np.float32)
    with EmbeddingWriter(tmp_path / "e.npy", manifest, dim=6, encoder="test") as writer:
        writer.append(range(len(manifest)), rows)
    write_manifest(writer.manifest, tmp_path / "train.jsonl")
    return [f"data.train={tmp_path / 'train.jsonl'}", "data.valid=null"]


def test_regularisation_by_external_embeddings(tmp_path, recipe, embedded):
    changes = [*embedded, "run.stop_at=8"]
    runs = {}
    for weight in (0.0, 1.0):
        runs[weight] = tmp_path / f"run-{weight}"
        config = load_recipe(recipe, [*changes, f"objective.regularisation_weight={weight}"])
        pretrain(config, runs[weight], progress=False)
    terms = {w: [row["regularisation"] for row in read_rows(r / "metrics.jsonl", "train")] for w, r in runs.items()}
    assert set(terms[0.0]) == {0.0}
    assert min(terms[1.0]) > 0
    saved = checkpoints.load(checkpoints.newest(runs[1.0])).model
    assert saved["regulariser.weight"].shape == (6, 16)


def test_what_a_constant_would_get_of_it_is_recorded_and_warned_of(tmp_path, recipe, embedded, capsys):
    """Noise is no guide: what is learned of it is what a constant knows. The run that goes on says it again, and the
    records have it once."""
    changes = [*embedded, "objective.regularisation_weight=1e-4", "run.guidance_share=0.1", "optim.lr=1e-6"]
    for stop_at in (14, 18):
        pretrain(load_recipe(recipe, [*changes, f"run.stop_at={stop_at}"]), tmp_path / "run", resume=stop_at > 14)
    rows = np.load(tmp_path / "e.npy")
    constant = np.square(rows - rows.mean(0)).sum(1).mean() / np.sqrt(6)
    for row in read_rows(tmp_path / "run" / "metrics.jsonl", "train"):
        assert row["regularisation_explained"] == pytest.approx(1 - row["regularisation"] / constant, abs=1e-5)
    said = capsys.readouterr().err
    for text, times in (("warning: the student will hardly feel the guide", 2), ("does not follow the guide", 1)):
        assert said.count(text) == times
    told = read_rows(tmp_path / "run" / "metrics.jsonl", "warning")
    assert [(row["step"], row["text"][:25]) for row in told] == [
        (0, "the student will hardly f"),
        (10, "the student does not foll"),
    ]


def test_embeddings_without_a_weight_are_said_to_be_unused(tmp_path, recipe, embedded, capsys):
    pretrain(load_recipe(recipe, [*embedded, "run.stop_at=1"]), tmp_path / "run")
    assert "warning: the clips have external embeddings, but objective.regularisation_weight is 0" in (
        capsys.readouterr().err
    )
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert "regularisation_explained" not in row


def test_a_head_that_is_not_wired_to_the_student_is_named(tmp_path, recipe, embedded, monkeypatch, capsys):
    """And looking for it changes no number."""
    losses = {}
    for network, share in ((CAT, 0.5), (CAT, 0), (UnwiredCAT, 0.5)):
        monkeypatch.setattr(Pretraining, "network", network)
        changes = [f"run.guidance_share={share}", "objective.regularisation_weight=1", "run.stop_at=2"]
        run_dir = tmp_path / f"{network.__name__}-{share}"
        pretrain(load_recipe(recipe, [*embedded, *changes]), run_dir)
        said = "warning: L_r does not reach the student" in capsys.readouterr().err
        assert said == (network is UnwiredCAT)
        losses[network, share] = [row["loss"] for row in read_rows(run_dir / "metrics.jsonl", "train")]
    assert losses[CAT, 0] == losses[CAT, 0.5]


def test_looking_for_a_head_that_is_not_wired_compiles_nothing(tmp_path, recipe, embedded, monkeypatch):
    graphs = []
    monkeypatch.setattr("cat.training.step.COMPILER", lambda graph, inputs: graphs.append(graph) or graph.forward)
    changes = ["run.compile=blocks", "objective.regularisation_weight=1"]
    task = make_task(load_recipe(recipe, [*embedded, *changes]))
    (batch,) = next(task.batches(0, 1, print))
    assert task._look_for_unwired(task._inputs(batch, 0)) == []
    assert not graphs
    task.train([batch], 1)
    assert graphs


def test_a_schedule_of_the_regularisation_is_a_function_of_the_step(tmp_path, recipe, embedded):
    objective = ["regularisation_weight=2", "regularisation_schedule=decay", "regularisation_steps=4"]
    changes = [*embedded, *(f"objective.{value}" for value in objective)]
    for stop_at in (3, 6):
        pretrain(load_recipe(recipe, [*changes, f"run.stop_at={stop_at}"]), tmp_path / "run", resume=True)
    pretrain(load_recipe(recipe, [*changes, "run.stop_at=6"]), tmp_path / "whole", progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["regularisation_weight"] for row in rows] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    for other in ("regularisation_normalise=true", "regularisation_schedule=stop", "regularisation_steps=5"):
        with pytest.raises(ConfigError, match=rf"objective\.{other.split('=')[0]} was"):
            pretrain(load_recipe(recipe, [*changes, f"objective.{other}"]), tmp_path / "run", resume=True)


def test_a_run_of_before_the_schedules_goes_on(tmp_path, recipe, embedded):
    changes = [*embedded, "objective.regularisation_weight=1"]
    pretrain(load_recipe(recipe, [*changes, "run.stop_at=6"]), tmp_path / "whole", progress=False)
    pretrain(load_recipe(recipe, [*changes, "run.stop_at=3"]), tmp_path / "run", progress=False)
    state_path = checkpoints.newest(tmp_path / "run") / "state.json"
    state = json.loads(state_path.read_text())
    for new in ("normalise", "schedule", "steps"):
        del state["config"]["objective"][f"regularisation_{new}"]
    state_path.write_text(json.dumps(state))
    pretrain(load_recipe(recipe, [*changes, "run.stop_at=6"]), tmp_path / "run", resume=True, progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- profiling


def test_profile_names_every_part_and_leaves_the_run_alone(tmp_path, recipe, uninterrupted, capsys):
    run = ["pretrain", str(recipe), f"run.dir={tmp_path}", "run.name=run", "data.valid=null"]
    assert main([*run, "--profile"]) == 0
    table = capsys.readouterr().out
    for name in (
        "data wait", "input", "teacher", "targets", "stem", "blocks", "decoder", "loss", "backward", "optimiser", "EMA",
    ):  # fmt: skip
        assert re.search(rf"^{name} +\d+\.\d\d +\d", table, re.MULTILINE), name
    assert "mean of 10 steps of 3 clips, cpu in fp32" in table
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["profile"]
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    ranges = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert ranges.count("backward") == ranges.count("blocks") == 2
    assert pretrain(load_recipe(recipe, ["run.stop_at=1"]), tmp_path / "run", progress=False).step == 1
    assert (tmp_path / "run" / "profile" / "trace.json").exists()


def test_parts_add_up_to_the_step(tmp_path, recipe):
    started = time.perf_counter()
    found = profile(load_recipe(recipe, ["data.valid=null", "run.precision=bf16"]), tmp_path / "run", steps=3)
    assert 0 < 3 * found.step_ms < 1e3 * (time.perf_counter() - started)
    assert min(found.parts.values()) >= 0
    assert found.parts["rest"] < 0.5 * found.step_ms


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_profile_on_a_gpu(tmp_path, recipe, cuda_graph):
    changes = ["data.valid=null", "run.device=cuda", f"run.cuda_graph={str(cuda_graph).lower()}"]
    found = profile(load_recipe(recipe, changes), tmp_path / "run", steps=4)
    assert ("graph" in found.parts, "backward" in found.parts) == (cuda_graph, not cuda_graph)
    assert sum(found.parts.values()) > 0
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])


def test_profile_goes_on_from_a_checkpoint_and_changes_nothing(tmp_path, recipe):
    config = load_recipe(recipe, ["run.stop_at=2", "data.valid=null"])
    pretrain(config, tmp_path / "run", progress=False)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    profile(config, tmp_path / "run", steps=1, resume=True)
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "trace.json"}
    assert after == before


# ---------------------------------------------------------------- resuming


def start(recipe: Path, run_dir: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable, "-m", "cat", "pretrain", str(recipe),
            f"run.dir={run_dir.parent}", f"run.name={run_dir.name}",
            *arguments,
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and any(row["step"] >= step for row in read_rows(path, "train")):
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no step {step}: {process.communicate()}")


def test_killed_twice_and_resumed_is_the_run_that_was_not(tmp_path, recipe, uninterrupted):
    run_dir = tmp_path / "run"
    # Slower checkpoints, so that there are rows after the last one; workers, because they are killed too.
    process = start(recipe, run_dir, "run.log_every=1", "data.num_workers=2", "--quiet")
    wait_for_step(process, run_dir, 7)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = max(row["step"] for row in read_rows(run_dir / "metrics.jsonl", "train"))
    assert 7 <= reached < 24
    assert checkpoints.newest(run_dir) is not None

    process = start(recipe, run_dir, "--resume", "run.log_every=1", "data.num_workers=2")
    wait_for_step(process, run_dir, reached + 1)
    os.killpg(process.pid, signal.SIGTERM)  # the workers get it as well
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM after step" in out
    assert f"cat-audio pretrain --resume {run_dir}" in out
    stopped = checkpoints.load(checkpoints.newest(run_dir))
    assert stopped.state["score"] is None
    assert reached < stopped.step < 24

    assert main(["pretrain", "--resume", str(run_dir), "run.log_every=4", "data.num_workers=0", "--quiet"]) == 0
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_write_a_checkpoint_first(tmp_path, recipe, uninterrupted, monkeypatch, capsys, number, code):
    update = loop.Trainer._update

    def interrupted(self, batch):
        update(self, batch)
        if self.step == 7:
            signal.raise_signal(number)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    run = ["pretrain", str(recipe), f"run.dir={tmp_path}", "run.name=run"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", interrupted)
        assert main(run) == code
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert f"stopped by {number.name} after step 7" in capsys.readouterr().out
    assert checkpoints.newest(tmp_path / "run").name == "step-00000007"
    assert main([*run, "--resume"]) == 0
    assert numbers(tmp_path / "run") == numbers(uninterrupted)


def test_stop_at_and_go_on(tmp_path, recipe, uninterrupted):
    run_dir = tmp_path / "run"
    assert pretrain(load_recipe(recipe, ["run.stop_at=11"]), run_dir, progress=False).step == 11
    with open(run_dir / "metrics.jsonl", "a") as file:  # rows of a future that the checkpoint has not seen
        file.write('{"kind": "train", "step": 12, "loss": 1e9}\n{"kind": "tra')
    pretrain(load_recipe(run_dir / "config.yaml", ["run.stop_at=null"]), run_dir, resume=True, progress=False)
    extra = {"kind": "valid", "step": 11}  # the checkpoint at 11 wanted a score
    rows = [row for row in numbers(run_dir) if {k: row[k] for k in extra} != extra]
    assert rows == numbers(uninterrupted)
    # and once more, when there is nothing left to do
    assert pretrain(load_recipe(recipe), run_dir, resume=True, progress=False).step == 24


def test_features_may_be_made_elsewhere_when_resuming(tmp_path, recipe, capsys):
    changes = ["data.valid=null", "optim.steps=6", "run.checkpoint_every=2"]
    runs = {name: load_recipe(recipe, [*changes, f"data.features={name}"]) for name in ("cpu", "gpu")}
    for stop_at in (3, None):  # a run that goes on where it was is the run that was not stopped, bit for bit
        config = dataclasses.replace(runs["gpu"], run=dataclasses.replace(runs["gpu"].run, stop_at=stop_at))
        pretrain(config, tmp_path / "gpu", resume=True)
    assert "features was" not in capsys.readouterr().err
    pretrain(runs["gpu"], tmp_path / "whole", progress=False)
    assert_same_run(tmp_path / "gpu", tmp_path / "whole")

    config = dataclasses.replace(runs["cpu"], run=dataclasses.replace(runs["cpu"].run, stop_at=3))
    pretrain(config, tmp_path / "cpu", progress=False)
    pretrain(runs["gpu"], tmp_path / "cpu", resume=True)
    assert "features was cpu and is now gpu: losses will agree up to rounding" in capsys.readouterr().err
    for row, other in zip(numbers(tmp_path / "cpu"), numbers(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_resuming_with_other_kernels(tmp_path, recipe, uninterrupted, capsys):
    pretrain(load_recipe(recipe, ["run.stop_at=4"]), tmp_path / "run", progress=False)
    pretrain(load_recipe(recipe, ["model.kernels=reference"]), tmp_path / "run", resume=True)
    assert "kernels was auto and is now reference: losses will agree up to rounding" in capsys.readouterr().err
    for resumed, whole in zip(numbers(tmp_path / "run"), numbers(uninterrupted), strict=True):
        assert resumed.pop("kind") == whole["kind"]
        assert resumed == pytest.approx({key: value for key, value in whole.items() if key != "kind"}, rel=1e-4)


def test_an_earlier_versions_recipe():
    assert from_mapping(RunConfig, {"compile": True}).compile == "step"
    assert from_mapping(RunConfig, {"compile": False}).compile == "none"


def test_resuming_without_a_checkpoint_starts(tmp_path, recipe, capsys):
    config = load_recipe(recipe, ["run.stop_at=1"])
    assert pretrain(config, tmp_path / "run", resume=True).step == 1
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().err


@pytest.fixture
def short(tmp_path, recipe) -> tuple[PretrainConfig, Path]:
    """A run of two steps."""
    config = load_recipe(recipe, ["run.stop_at=2", "data.valid=null"])
    pretrain(config, tmp_path / "run", progress=False)
    return config, tmp_path / "run"


def test_a_resumed_run_in_bf16_is_the_run_that_was_not(tmp_path, recipe):
    changes = ["data.valid=null", "run.precision=bf16"]
    for stop_at in (3, 6):
        pretrain(load_recipe(recipe, [*changes, f"run.stop_at={stop_at}"]), tmp_path / "run", resume=True)
    pretrain(load_recipe(recipe, [*changes, "run.stop_at=6"]), tmp_path / "whole", progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_other_settings_do_not_resume(short, recipe):
    _, run_dir = short
    before = (run_dir / "metrics.jsonl").read_bytes()
    changed = load_recipe(recipe, ["data.valid=null", "optim.steps=30", "masks.num_masks=3", "run.log_every=9"])
    with pytest.raises(ConfigError) as error:
        pretrain(changed, run_dir, resume=True, progress=False)
    for part in ("optim.steps was 24, now 30", "masks.num_masks was 2, now 3", "run.name=OTHER"):
        assert part in str(error.value)
    assert "log_every" not in str(error.value)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_other_data_does_not_resume(short, tmp_path):
    config, run_dir = short
    other = dataclasses.replace(config.data, train=str(make_audio(tmp_path / "more", 9, seed=0)))
    with pytest.raises(ConfigError, match=r"lists other clips \(9\) than when .* was started \(8\)"):
        pretrain(dataclasses.replace(config, data=other), run_dir, resume=True, progress=False)


def test_a_manifest_that_was_edited_does_not_resume(tmp_path, recipe, audio, uninterrupted, capsys):
    """A clip less, a clip more, other clips, another order; put right again, the run goes on."""
    manifest, run_dir = tmp_path / "list.jsonl", tmp_path / "run"

    def lists(*names: str) -> None:
        manifest.write_text("".join(f'{{"path": "{audio}/train/{name}.wav"}}\n' for name in names))

    names = [f"{number:02d}" for number in range(8)]
    lists(*names)
    run = ["pretrain", str(recipe), f"data.train={manifest}", f"run.dir={tmp_path}", "run.name=run", "--quiet"]
    assert main([*run, "run.stop_at=2"]) == 0
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    for edited in (names[:7], [*names, "../valid/00"], [*names[:7], "../valid/00"], names[::-1]):
        lists(*edited)
        assert main([*run, "--resume"]) == 1
        assert re.search(rf"list.jsonl lists other clips .*\({len(edited)}.*\(8\)", capsys.readouterr().err), edited
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    lists(*names)
    assert main([*run, "run.stop_at=4", "--resume"]) == 0
    losses = [[row["loss"] for row in read_rows(path / "metrics.jsonl", "train")] for path in (run_dir, uninterrupted)]
    assert losses[0] == losses[1][:4]


def test_a_weighted_run_goes_on_with_the_labels_that_it_began_with(tmp_path, recipe, audio):
    manifest = tmp_path / "labelled.jsonl"

    def label(*rare: int) -> None:
        paths = [str(audio / "train" / f"{i:02d}.wav") for i in range(8)]
        clips = [{"path": path, "labels": ["rare" if i in rare else "common"]} for i, path in enumerate(paths)]
        manifest.write_text("".join(f"{json.dumps(clip)}\n" for clip in clips))

    label(3)
    weighted = [f"data.train={manifest}", "data.valid=null", "data.sampler=weighted"]
    config = load_recipe(recipe, [*weighted, "data.epoch_clips=6", "run.stop_at=2"])
    pretrain(config, tmp_path / "run", progress=False)
    label(3, 4)
    with pytest.raises(ConfigError, match="have other labels than when"):
        pretrain(config, tmp_path / "run", resume=True, progress=False)
    label(5)
    with pytest.raises(ValueError, match="there are 8 clips with a weight above 0"):
        pretrain(load_recipe(recipe, [*weighted, "data.epoch_clips=9"]), tmp_path / "more", progress=False)
    assert not (tmp_path / "more").exists()
    pretrain(load_recipe(recipe, [*weighted, "run.stop_at=1"]), tmp_path / "all", progress=False)
    assert "balances nothing" in read_rows(tmp_path / "all" / "metrics.jsonl", "warning")[0]["text"]


def test_damaged_checkpoint_is_named(short):
    config, run_dir = short
    path = checkpoints.newest(run_dir) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(checkpoints.CheckpointError, match=r"optimizer\.safetensors \(1000 bytes\) is truncated"):
        pretrain(config, run_dir, resume=True, progress=False)


def test_what_is_said_of_a_damaged_checkpoint_helps(tmp_path, recipe, uninterrupted, capsys):
    """Typed as it is said, the run goes on from the one before; the damaged one is still there."""
    run_dir = tmp_path / "a run"
    run = ["pretrain", "--resume", str(run_dir), "--quiet"]
    pretrain(load_recipe(recipe, ["run.stop_at=10"]), run_dir, progress=False)
    newest = checkpoints.newest(run_dir)
    shape = checkpoints.read_tensors(newest / "model.safetensors")[0]
    shape["student.cls"] = torch.zeros(1, 1, 8)
    config = to_mapping(load_recipe(recipe))
    for damage in ("of another model", "cut"):
        if damage == "cut":
            os.truncate(newest / "model.safetensors", 1000)
        else:
            checkpoints.save_tensors(newest / "model.safetensors", shape, step=10, config=config)
            state = checkpoints.read_state(newest)
            state["sha256"]["model.safetensors"] = sha256_of(newest / "model.safetensors")
            (newest / "state.json").write_text(json.dumps(state))
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        assert main(run) == 1
        told = capsys.readouterr().err
        assert ("student.cls is (1, 1, 8), expected (1, 1, 16)" in told) == (damage != "cut")
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    aside = re.search("set it aside: (mv .*)\nand then: cat-audio (.*)\nNothing was changed", told)
    subprocess.run(["sh", "-c", aside[1]], check=True)
    assert main([*shlex.split(aside[2]), "run.stop_at=null", "--quiet"]) == 0
    assert_same_run(run_dir, uninterrupted)
    assert (run_dir / "checkpoints" / f"damaged-{newest.name}").is_dir()


def test_the_only_checkpoint_is_damaged(short, capsys):
    run_dir = short[1]
    os.truncate(checkpoints.newest(run_dir) / "state.json", 10)
    assert main(["pretrain", "--resume", str(run_dir)]) == 1
    assert "No other checkpoint of this run is whole. Nothing was changed or deleted." in capsys.readouterr().err


def test_an_existing_run_is_not_trodden_on(short):
    config, run_dir = short
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run; .*--resume.*--overwrite.*run\.name=OTHER"):
        pretrain(config, run_dir, progress=False)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    (run_dir / "mine.txt").write_text("x")
    assert pretrain(config, run_dir, overwrite=True, progress=False).step == 2
    assert (run_dir / "mine.txt").read_text() == "x"


def test_a_directory_that_is_no_run_is_never_deleted(tmp_path, recipe):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not a run directory"):
            pretrain(load_recipe(recipe), tmp_path / "thesis", overwrite=overwrite, progress=False)
    assert (tmp_path / "thesis" / "chapter1.txt").exists()


@pytest.mark.slow
def test_a_second_process_does_not_touch_a_run(tmp_path, recipe, capsys):
    run_dir = tmp_path / "run"
    # As many steps as are done before the others have been refused.
    process = start(recipe, run_dir, "data.valid=null", "optim.steps=100000", "run.log_every=1", "--quiet")
    try:
        wait_for_step(process, run_dir, 1)
        run = ["pretrain", str(recipe), f"run.dir={tmp_path}", "run.name=run"]
        for changes in (["--overwrite"], [], ["--resume"], ["--profile"]):
            assert main([*run, *changes]) == 1
            assert f"{run_dir} is in use by process {process.pid} on " in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143, err
    rows = read_rows(run_dir / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, checkpoints.load(checkpoints.newest(run_dir)).step + 1))
    assert not (run_dir / ".lock").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path, recipe, monkeypatch, capsys):
    save_file, calls = checkpoints.save_file, []

    def filling(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 4:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    run = ["pretrain", str(recipe), "data.valid=null", f"run.dir={tmp_path}", "run.name=run", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", filling)
        assert main(run) == 1
    told = capsys.readouterr().err
    assert "step-00000010: No space left on device: this checkpoint needs" in told
    assert "go on with --resume" in told
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    assert main([*run, "--resume", "run.stop_at=10"]) == 0


def test_what_is_known_at_the_start_is_said_at_the_start(tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.setattr(loop.Trainer, "run", lambda self: pytest.fail("it has started"))
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    for changes, message in (
        ([f"run.dir={tmp_path / 'file'}"], "file: is not a folder"),
        ([f"run.dir={tmp_path}", "run.name=file"], "file: is not a folder"),
        ([f"run.dir={tmp_path}", f"run.name={'x' * 300}"], "File name too long"),
        ([f"run.dir={tmp_path}", "run.name=../x"], "expected the name of a folder in run.dir"),
        ([f"run.dir={tmp_path}", "run.name=run"], "checkpoints: is not a folder"),
    ):
        assert main(["pretrain", str(recipe), *changes]) == 1
        told = capsys.readouterr().err
        assert message in told
        assert "unexpected" not in told
    monkeypatch.setattr(directory, "free_space", lambda path: 1000)
    assert main(["pretrain", str(recipe), f"run.dir={tmp_path}", "run.name=new"]) == 1
    assert "a checkpoint of this model needs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_resuming_with_an_empty_config(short, capsys):
    config, run_dir = short
    (run_dir / "config.yaml").write_bytes(b"")
    assert main(["pretrain", "--resume", str(run_dir), "run.stop_at=3"]) == 0
    note = f"note: {run_dir}/config.yaml is empty; the configuration is that of {run_dir}/checkpoints/step-00000002"
    assert note in capsys.readouterr().err
    assert load_recipe(run_dir / "config.yaml").data == config.data


def test_a_run_is_replaced_behind_a_link(short, tmp_path):
    config, run_dir = short
    (tmp_path / "link").symlink_to("run")
    assert pretrain(config, tmp_path / "link", overwrite=True, progress=False).step == 2
    assert ((tmp_path / "link").is_symlink(), len(numbers(run_dir))) == (True, 2)


def test_a_name_that_is_no_text(tmp_path, recipe):
    config = load_recipe(recipe, ["run.stop_at=1", "data.valid=null", f"run.dir={tmp_path}", "run.name=caf\udce9"])
    run_dir = pretrain(config, progress=False).run_dir
    assert load_recipe(run_dir / "config.yaml") == config
    assert load_encoder(run_dir)[1].step == 1


# ---------------------------------------------------------------- what goes wrong


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, recipe, monkeypatch):
    rate = pretraining.learning_rate
    monkeypatch.setattr(pretraining, "learning_rate", lambda config, step: 1e30 if step == 6 else rate(config, step))
    with pytest.raises(
        TrainingError, match=r"not finite at step 8 .*last good checkpoint is .*step-00000005.*optim\.lr"
    ):
        pretrain(load_recipe(recipe, ["data.valid=null", "run.max_bad_steps=1"]), tmp_path / "run", progress=False)
    good = weights(checkpoints.newest(tmp_path / "run"))
    assert all(tensor.isfinite().all() for tensor in good.values())
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] is None or rows[-1]["grad_norm"] is None


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path, recipe, monkeypatch):
    rate = pretraining.learning_rate
    monkeypatch.setattr(
        pretraining, "learning_rate", lambda config, step: float("nan") if step == 4 else rate(config, step)
    )
    with pytest.raises(TrainingError, match="weights are not finite after step 5; no checkpoint was written yet"):
        pretrain(load_recipe(recipe, ["data.valid=null"]), tmp_path / "run", progress=False)
    assert checkpoints.newest(tmp_path / "run") is None


def test_collapse_is_said(tmp_path, recipe, capsys):
    changes = ["data.valid=null", "run.stop_at=6", "run.collapse_pred_std=100", "run.collapse_steps=3"]
    pretrain(load_recipe(recipe, changes), tmp_path / "run")
    assert capsys.readouterr().err.count("warning: the predictions may have collapsed") == 1


def test_collapse_is_counted_on_by_a_run_that_goes_on(tmp_path, recipe, capsys):
    """Three updates below, of which two were before it was stopped; and not said again after that."""
    for stop_at in (2, 4, 6):
        changes = [f"run.stop_at={stop_at}", "run.collapse_pred_std=100", "run.collapse_steps=3", "data.valid=null"]
        pretrain(load_recipe(recipe, changes), tmp_path / "run", resume=stop_at > 2)
    assert capsys.readouterr().err.count("warning: the predictions may have collapsed") == 1


def test_unreadable_files_are_left_out_recorded_and_counted(tmp_path, recipe, capsys):
    folder = make_audio(tmp_path / "audio", 8, seed=0)
    (folder / "03.wav").write_bytes(b"not audio")
    run = ["pretrain", str(recipe), f"data.train={folder}", "data.valid=null", f"run.dir={tmp_path}", "run.name=run"]
    assert main([*run, "run.stop_at=4", "data.max_failed_share=0.2", "--quiet"]) == 0
    assert "1 clips could not be read and were left out; see" in capsys.readouterr().out
    (failure,) = read_rows(tmp_path / "run" / "failures.jsonl")
    assert failure["path"].endswith("03.wav")
    assert failure["reason"]
    assert failure["split"] == "train"
    # resumed, the count goes on and nothing is written twice
    assert main([*run, "run.stop_at=8", "data.max_failed_share=0.2", "--quiet", "--resume"]) == 0
    assert "1 clips could not be read" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "run" / "failures.jsonl")) == 1


def test_too_many_unreadable_files_stop_the_run(tmp_path, recipe):
    folder = make_audio(tmp_path / "audio", 8, seed=0)
    for i in (2, 5):
        (folder / f"{i:02d}.wav").write_bytes(b"")
    config = load_recipe(recipe, [f"data.train={folder}", "data.valid=null", "data.max_failed_share=0.2"])
    with pytest.raises(TooManyFailures, match=r"2 clips could not be read, more than .*=0\.2 of 8"):
        pretrain(config, tmp_path / "run", progress=False)
    assert len(read_rows(tmp_path / "run" / "failures.jsonl")) == 2


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "nothing.yaml: cannot read"),
        (["{recipe}", "optim.lrr=1"], "nearest known one is 'optim.lr'"),
        (["{recipe}", "data.train="], "data.train is missing"),
        (["{recipe}", "data.train=nowhere"], "nowhere: no such file or folder"),
        (["{recipe}", "--resume", "--overwrite"], "give one of them"),
        (["{recipe}", "--profile", "--overwrite"], "leave it out"),
        (["{recipe}", "run.compile=true"], "run.compile is true; expected one of none, blocks, step"),
        (["{recipe}", "run.cuda_graph=true"], "run.cuda_graph=true needs a GPU"),
        (["{recipe}", "model.kernels=fast"], "expected one of 'auto', 'triton', 'reference', 'dense'"),
        (["{folder}", "--resume"], "directory without config.yaml"),
        (["{recipe}", "objective.regularisation_weight=1"], "needs external embeddings"),
    ],
)
def test_command_errors(tmp_path, recipe, capsys, arguments, message):
    names = {"recipe": str(recipe), "folder": str(tmp_path)}
    arguments = [argument.format(**names) for argument in arguments]
    assert main(["pretrain", *arguments, f"run.dir={tmp_path}", "run.name=run"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_command_usage(capsys):
    assert main([]) == 2
    for arguments in (["nothing"], ["pretrain"], ["pretrain", "a.yaml", "--resumee"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "pretrain" in capsys.readouterr().out


def test_state_is_plain_json(uninterrupted):
    state = json.loads((checkpoints.newest(uninterrupted) / "state.json").read_text())
    assert set(state) == {"format", "step", "score", "made_with", "data", "sha256", "config"}
    assert state["data"]["clips"] == 8
