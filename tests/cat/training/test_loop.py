"""Errors, signals and dying workers at any point of a run: nothing that was trained is lost, and a run that goes on has
the rows and weights of one that was not disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.checkpoints import store as checkpoints
from cat.checkpoints.background import BackgroundWriter
from cat.commands import main
from cat.config import ConfigError
from cat.data import EmbeddingError, EmbeddingWriter, load_manifest, write_manifest
from cat.data.dataset import PretrainDataset
from cat.data.loader import TooManyFailures
from cat.data.workers import WorkerDied
from cat.model import CAT
from cat.training import journal, loop, pretraining
from cat.training.loop import TrainingError
from cat.training.pretrain import pretrain
from cat.training.recipe import PretrainConfig, load_recipe
from cat.training.records import JsonLines, read_rows

soundfile = pytest.importorskip("soundfile")

REPOSITORY = Path(__file__).parents[3]
RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
masks: {num_masks: 2}
features: {frames: 32}
data: {batch_size: 3, num_workers: 0}
optim: {lr: 3e-3, warmup_steps: 2, steps: 9}
run:
  {threads: 1, log_every: 2, checkpoint_every: 3, eval_every: 4, device: cpu, tensorboard: false, figures: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("valid", 7), ("other", 7)):
        (folder / part).mkdir()
        for i in range(count):
            soundfile.write(folder / part / f"{part}{i}.wav", 0.1 * random.standard_normal(6000), 16000)
    names = f"train: {folder / 'train'}, valid: {folder / 'valid'}"
    (folder / "minute.yaml").write_text(RECIPE.replace("data: {", f"data: {{{names}, "))
    return folder / "minute.yaml"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recipe) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert pretrain(load_recipe(recipe), run_dir, progress=False).step == 9
    return run_dir


def numbers(run_dir: Path) -> list[dict]:
    """Everything in metrics.jsonl that has to be reproducible."""
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] != "speed"]


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints.list_checkpoints(run_dir / "checkpoints")]


def goes_on(run_dir: Path, recipe: Path, undisturbed: Path, *changes: str) -> bool:
    """Resumed, it is the run that was not disturbed, bit for bit."""
    pretrain(load_recipe(recipe, changes), run_dir, resume=True, progress=False)
    ours, theirs = (checkpoints.load(checkpoints.newest(run)) for run in (run_dir, undisturbed))
    assert numbers(run_dir) == numbers(undisturbed)
    for mine, other in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    return True


# ---------------------------------------------------------------- errors


class Trouble(RuntimeError):
    """A surprise."""


def after(calls, function, error=Trouble, *, once=False):
    """The function, which fails after so many calls."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls + 1 or (count > calls and not once):
            raise error("a surprise")
        return function(*args, **kwargs)

    return wrapped


def batches_until(count, function):
    def wrapped(*args, **kwargs):
        for number, batch in enumerate(function(*args, **kwargs)):
            if number == count:
                raise Trouble("a surprise")
            yield batch

    return wrapped


# what fails, and the update after which it does
POINTS = {
    "a batch": (pretraining, "pretrain_batches", lambda f: batches_until(5, f), 5),
    "the loss": (
        pretraining.PretrainStep,
        "losses",
        lambda f: after(11, f),
        5,
    ),  # six of them in the evaluations of steps 3 and 4
    "metrics": (JsonLines, "write", lambda f: after(3, f, OSError, once=True), 4),
    "validation": (pretraining, "eval_batches", lambda f: batches_until(1, f), 3),
    "progress": (journal.Progress, "advance", lambda f: after(2, f), 4),
    "pruning": (checkpoints, "prune", lambda f: after(2, f, OSError), 9),  # in the background, at the end
}


@pytest.mark.parametrize("point", POINTS)
def test_an_error_does_not_cost_what_was_trained(tmp_path, recipe, undisturbed, monkeypatch, point):
    owner, name, broken, step = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken(getattr(owner, name)))
        with pytest.raises((Trouble, OSError), match="a surprise") as error:
            pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    assert steps(tmp_path / "run")[-1] == step
    assert f"step {step} is saved; go on with: cat-audio pretrain --resume {tmp_path / 'run'}" in error.value.__notes__
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def test_a_command_tells_the_error_first_and_then_what_was_saved(tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "pretrain_batches", batches_until(2, pretraining.pretrain_batches))
    assert main(["pretrain", str(recipe), f"run.dir={tmp_path}", "run.name=run", "--quiet"]) == 1
    told = capsys.readouterr().err
    assert 0 < told.index("error: a surprise") < told.index("step 2 is saved")


def test_weights_in_the_middle_of_an_update_are_not_saved(tmp_path, recipe, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CAT, "update_teacher", after(4, CAT.update_teacher))
        with pytest.raises(Trouble) as error:
            pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    (note,) = error.value.__notes__
    assert "step 4 could not be saved (the error came in the middle of an update); the last checkpoint: " in note
    assert note.endswith("step-00000003")
    assert steps(tmp_path / "run") == [3]
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def test_when_saving_fails_the_error_stays_the_first(tmp_path, recipe, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(pretraining, "pretrain_batches", batches_until(2, pretraining.pretrain_batches))
    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.raises(Trouble, match="a surprise") as error:
        pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    assert error.value.__notes__ == ["step 2 could not be saved (no space left); the last checkpoint: none"]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "save", after(0, full, OSError))
    with pytest.raises(OSError, match="a surprise") as error:  # of saving itself, which is not tried again
        pretrain(load_recipe(recipe), tmp_path / "other", progress=False)
    go_on = f"go on with: cat-audio pretrain --resume {tmp_path / 'other'}"
    assert error.value.__notes__ == [f"the last good checkpoint: none; {go_on}"]


def test_bad_weights_are_not_saved(tmp_path, recipe, monkeypatch):
    rate = pretraining.learning_rate
    monkeypatch.setattr(
        pretraining, "learning_rate", lambda config, step: float("nan") if step == 3 else rate(config, step)
    )
    monkeypatch.setattr(pretraining, "pretrain_batches", batches_until(4, pretraining.pretrain_batches))
    with pytest.raises((Trouble, TrainingError)):
        pretrain(load_recipe(recipe, ["run.log_every=9"]), tmp_path / "run", progress=False)
    assert steps(tmp_path / "run") == [3]


def test_too_many_failures_after_updates(tmp_path, recipe, undisturbed):
    """With data.max_failed_share raised, or the files mended, the run goes on where it stopped."""
    train = Path(load_recipe(recipe).data.train)
    config = load_recipe(recipe)
    order = [path.name for path in sorted(train.iterdir())]
    first = {order[i] for batch in taken(config, 2) for i in batch.clips.tolist()}
    bad = train / next(name for name in order if name not in first)
    good = bad.read_bytes()
    try:
        bad.write_bytes(b"")
        with pytest.raises(TooManyFailures) as error:
            pretrain(load_recipe(recipe, ["data.max_failed_share=0"]), tmp_path / "run", progress=False)
    finally:
        bad.write_bytes(good)
    assert "step 2 is saved" in error.value.__notes__[0]
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def taken(config: PretrainConfig, count: int):
    options = {"patch_size": config.model.patch_size, "seed": config.run.seed, "num_steps": count}
    return pretraining.pretrain_batches(config.data, config.features, config.masks, **options)


def test_a_killed_worker_ends_the_run_with_a_checkpoint(tmp_path, recipe, undisturbed, monkeypatch):
    get = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(get, "__defaults__", (0.2,))  # seconds between two looks at the workers, of 5
    update = loop.Trainer._update

    def killing(self, batch):
        if self.step == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
        update(self, batch)

    changes = ["data.num_workers=1", "data.prefetch=1"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", killing)
        with pytest.raises(WorkerDied, match=r"was killed \(SIGKILL\)") as error:
            pretrain(load_recipe(recipe, changes), tmp_path / "run", progress=False)
    assert "step 2 is saved" in error.value.__notes__[0]
    assert goes_on(tmp_path / "run", recipe, undisturbed, *changes)


# ---------------------------------------------------------------- signals


def signalling(count, function, number=signal.SIGTERM):
    """Batches that a signal comes with."""

    def wrapped(*args, **kwargs):
        for i, batch in enumerate(function(*args, **kwargs)):
            if i == count:
                signal.raise_signal(number)
            yield batch

    return wrapped


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "name", "count", "step"),
    [
        ("the first batch", "pretrain_batches", 0, 0),
        ("a batch", "pretrain_batches", 5, 5),
        ("validation", "eval_batches", 1, 3),
    ],
)
def test_a_signal_wherever_it_comes(tmp_path, recipe, undisturbed, monkeypatch, where, name, count, step, number):
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, name, signalling(count, getattr(pretraining, name), number))
        result = pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    assert (result.stopped_by, result.step) == (number, step)
    assert steps(tmp_path / "run")[-1] == step
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def test_a_signal_while_saving_lets_it_finish(tmp_path, recipe, undisturbed, monkeypatch):
    save = BackgroundWriter.save
    with monkeypatch.context() as patch:
        patch.setattr(
            BackgroundWriter, "save", lambda *args, **options: signal.raise_signal(15) or save(*args, **options)
        )
        result = pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    assert (result.stopped_by, steps(tmp_path / "run")) == (signal.SIGTERM, [3])
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def test_a_signal_ends_waiting_for_a_batch(tmp_path, recipe, monkeypatch):
    """As with a file system that hangs."""
    monkeypatch.setattr(PretrainDataset, "__getitem__", lambda self, step: time.sleep(60))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGHUP)).start()
    started = time.monotonic()
    result = pretrain(load_recipe(recipe, ["data.num_workers=1"]), tmp_path / "run", progress=False)
    assert (result.stopped_by, result.step) == (signal.SIGHUP, 0)
    assert time.monotonic() - started < 15


def test_sigusr1_asks_for_a_checkpoint(tmp_path, recipe, undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "pretrain_batches", signalling(3, pretraining.pretrain_batches, signal.SIGUSR1))
    saved = []
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args, **options: saved.append(options) or save(*args, **options))
    assert pretrain(load_recipe(recipe), tmp_path / "run").step == 9
    assert [options["step"] for options in saved] == [3, 4, 6, 9]
    assert [options["score"] is None for options in saved] == [False, True, False, False]
    assert "step 4: saved" in capsys.readouterr().err
    assert numbers(tmp_path / "run") == numbers(undisturbed)


# ---------------------------------------------------------------- nobody listens


def start(recipe: Path, run_dir: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "cat", "pretrain", str(recipe), f"run.dir={run_dir.parent}", "run.name=run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*command, *arguments], cwd=REPOSITORY, text=True, start_new_session=True, **pipes)


@pytest.mark.parametrize("stderr", ["closed", "read no more"])
def test_the_run_goes_on_when_stderr_is_gone(tmp_path, recipe, undisturbed, stderr):
    read, write = os.pipe()
    options = {"preexec_fn": lambda: os.close(2)} if stderr == "closed" else {"stderr": write}
    process = start(recipe, tmp_path / "run", "data.num_workers=1", **options)
    os.close(read)
    os.close(write)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "trained 9 steps" in out
    assert numbers(tmp_path / "run") == numbers(undisturbed)


# ---------------------------------------------------------------- the data of then


def test_other_validation_data_does_not_resume(tmp_path, recipe):
    pretrain(load_recipe(recipe, ["run.stop_at=2"]), tmp_path / "run", progress=False)
    other = recipe.parent / "other"
    with pytest.raises(
        ConfigError, match=r"data\.valid=.*other lists other clips \(7\) than when .* \(7\).*valid=null"
    ):
        pretrain(load_recipe(recipe, [f"data.valid={other}"]), tmp_path / "run", resume=True, progress=False)


def scores(run_dir: Path) -> dict[int, float | None]:
    return {
        step: checkpoints.read_state(run_dir / "checkpoints" / checkpoints.step_name(step))["score"]
        for step in steps(run_dir)
    }


def test_scores_of_a_run_are_of_one_kind(tmp_path, recipe, capsys):
    keep = ["run.keep_last=9"]
    run_dir = tmp_path / "left out"
    pretrain(load_recipe(recipe, [*keep, "run.stop_at=3"]), run_dir, progress=False)
    pretrain(load_recipe(recipe, [*keep, "run.stop_at=6", "data.valid=null"]), run_dir, resume=True)
    assert "data.valid is left out" in capsys.readouterr().err
    assert scores(run_dir)[6] is None
    pretrain(load_recipe(recipe, keep), run_dir, resume=True, progress=False)
    losses = {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl", "valid")}
    assert scores(run_dir) == {step: losses[step] for step in (3, 6, 9)}  # 6: made up for

    run_dir = tmp_path / "new"
    pretrain(load_recipe(recipe, [*keep, "run.stop_at=3", "data.valid=null"]), run_dir, progress=False)
    pretrain(load_recipe(recipe, keep), run_dir, resume=True)
    assert "data.valid is new to this run" in capsys.readouterr().err
    losses = {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl", "train")}
    assert scores(run_dir)[9] == pytest.approx(np.mean([losses[step] for step in (7, 8, 9)]))


def test_a_checkpoint_gets_the_score_that_a_signal_kept_from_it(tmp_path, recipe, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "eval_batches", signalling(1, pretraining.eval_batches))
        pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    assert scores(tmp_path / "run") == {3: None}
    with monkeypatch.context() as patch:  # killed between the evaluation that makes up for it and the score
        patch.setattr(checkpoints, "add_score", after(0, checkpoints.add_score))
        with pytest.raises(Trouble):
            pretrain(load_recipe(recipe), tmp_path / "run", resume=True, progress=False)
    assert scores(tmp_path / "run") == {3: None}
    pretrain(load_recipe(recipe, ["run.keep_last=9"]), tmp_path / "run", resume=True, progress=False)
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    losses = {row["step"]: row["loss"] for row in read_rows(undisturbed / "metrics.jsonl", "valid")}
    assert scores(tmp_path / "run") == {step: losses[step] for step in (3, 6, 9)}


def test_other_embeddings_do_not_resume(tmp_path, recipe):
    manifest = load_manifest(load_recipe(recipe).data.train)

    def embed(encoder, seed):
        rows = np.random.default_rng(seed).standard_normal((len(manifest), 5)).astype(np.float32)
        with EmbeddingWriter(tmp_path / "e.npy", manifest, dim=5, encoder=encoder) as writer:
            writer.append(range(len(manifest)), rows)
        write_manifest(writer.manifest, tmp_path / "e.jsonl")

    changes = [f"data.train={tmp_path / 'e.jsonl'}", "data.valid=null", "objective.regularisation_weight=1"]
    config = load_recipe(recipe, changes)
    embed("random:0", 0)
    pretrain(load_recipe(recipe, [*changes, "run.stop_at=2"]), tmp_path / "run", progress=False)
    reasons = {("random:0", 1): "the rows are others", ("random:99", 0): "the encoder was random:0, now random:99"}
    for (encoder, seed), reason in reasons.items():
        embed(encoder, seed)
        differ = rf"embeddings \(encoder {encoder}, 8 x 5\) than when .* random:0, 8 x 5\): .* \({reason}\)"
        with pytest.raises(ConfigError, match=differ):
            pretrain(config, tmp_path / "run", resume=True, progress=False)
    embed("random:0", 0)
    assert pretrain(config, tmp_path / "run", resume=True, progress=False).step == 9


def test_damaged_embeddings_do_not_train(tmp_path, recipe):
    manifest = load_manifest(load_recipe(recipe).data.train)
    with EmbeddingWriter(tmp_path / "e.npy", manifest, dim=2, encoder="x") as writer:
        writer.append(range(len(manifest)), np.ones((len(manifest), 2)))
    write_manifest(writer.manifest, tmp_path / "e.jsonl")
    content = bytearray((tmp_path / "e.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "e.npy").write_bytes(content)
    changes = [f"data.train={tmp_path / 'e.jsonl'}", "data.valid=null", "objective.regularisation_weight=1"]
    with pytest.raises(EmbeddingError, match=r"e\.npy: damaged"):
        pretrain(load_recipe(recipe, changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    changes[-1] = "run.stop_at=2"  # it learns nothing of them
    pretrain(load_recipe(recipe, changes), tmp_path / "run", progress=False)


def test_embeddings_that_the_run_does_not_use_may_change(tmp_path, recipe):
    pretrain(load_recipe(recipe, ["run.stop_at=2"]), tmp_path / "run", progress=False)
    manifest = load_manifest(load_recipe(recipe).data.train)
    with EmbeddingWriter(tmp_path / "e.npy", manifest, dim=2, encoder="x") as writer:
        writer.append(range(len(manifest)), np.ones((len(manifest), 2)))
    write_manifest(writer.manifest, manifest.root / "with.jsonl")
    changes = [f"data.train={manifest.root / 'with.jsonl'}", "run.stop_at=3"]
    assert pretrain(load_recipe(recipe, changes), tmp_path / "run", resume=True, progress=False).step == 3


def test_checkpoints_of_earlier_versions_go_on(tmp_path, recipe, undisturbed, capsys):
    pretrain(load_recipe(recipe, ["run.stop_at=3"]), tmp_path / "run", progress=False)
    path = checkpoints.newest(tmp_path / "run") / "state.json"
    state = json.loads(path.read_text())
    del state["data"]["valid"], state["data"]["embeddings"]
    path.write_text(json.dumps(state))
    pretrain(load_recipe(recipe, ["run.stop_at=4"]), tmp_path / "run", resume=True)
    assert "does not say which validation data the run began with" in capsys.readouterr().err
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def test_data_that_cannot_be_told_apart_fails_at_once(tmp_path, recipe, monkeypatch):
    def surrogate(self):
        raise UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(type(load_manifest(load_recipe(recipe).data.train)), "fingerprint", property(surrogate))
    with pytest.raises(UnicodeEncodeError):
        pretrain(load_recipe(recipe), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
