"""The process of a run killed at any moment, interrupted, unheard, its clock set: it goes on to the numbers of the run
that was left alone, bit for bit, and leaves no process and nothing half written behind."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cat
from cat.checkpoints import store
from cat.commands import main
from cat.training import loop
from cat.training.pretrain import pretrain
from cat.training.recipe import load_recipe
from cat.training.records import read_rows

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("yaml")

CAT = str(Path(cat.__file__).parent)
FORK = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import everything
RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
masks: {num_masks: 2}
features: {frames: 32}
data: {batch_size: 3, num_workers: 0}
optim: {lr: 3e-3, warmup_steps: 2, steps: 24}
run:
  {threads: 1, log_every: 1, checkpoint_every: 2, eval_every: 5, device: cpu, tensorboard: false, figures: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    noise = np.random.default_rng(0)
    for part, count in (("train", 8), ("valid", 3)):
        (folder / part).mkdir()
        for i in range(count):
            soundfile.write(folder / part / f"{i}.wav", 0.1 * noise.standard_normal(6000), 16000)
    names = f"train: {folder / 'train'}, valid: {folder / 'valid'}"
    (folder / "minute.yaml").write_text(RECIPE.replace("data: {", f"data: {{{names}, "))
    return folder / "minute.yaml"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recipe) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert pretrain(load_recipe(recipe), run_dir, progress=False).step == 24
    return run_dir


def train(recipe: Path, run_dir: Path, *changes: str) -> None:
    pretrain(load_recipe(recipe, changes), run_dir, resume=True, progress=False)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] != "speed"]


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert numbers(run_dir) == numbers(undisturbed)
    steps = [[path.name for path in store.list_checkpoints(run / "checkpoints")] for run in (run_dir, undisturbed)]
    assert steps[0] == steps[1]
    one, other = (store.load(store.newest(run)) for run in (run_dir, undisturbed))
    for mine, theirs in ((one.model, other.model), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    hidden = {path.name for folder in (run_dir, run_dir / "checkpoints") for path in folder.glob(".*")}
    assert hidden == set(), "left behind"


# ---------------------------------------------------------------- killed


def train_until(recipe: Path, run_dir: Path, line: int | None, lines: Any) -> None:
    """In a process of its own, which is killed at that line of `cat`, in whichever thread. Says how many there are."""
    me, counter = os.getpid(), itertools.count(1)

    def entered(frame: Any, event: str, argument: Any) -> Callable[..., Any] | None:
        return counted if frame.f_code.co_filename.startswith(CAT) else None

    def counted(frame: Any, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line" and next(counter) == line and os.getpid() == me:
            os.kill(me, signal.SIGKILL)
        return counted

    threading.settrace(entered)
    sys.settrace(entered)
    train(recipe, run_dir)
    sys.settrace(None)
    lines.value = next(counter)


def run_child(target: Callable[..., None], *arguments: Any) -> int:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


@pytest.mark.slow
def test_killed_twenty_times_at_any_line(tmp_path, recipe, undisturbed):
    lines = FORK.Value("q", 0)
    assert run_child(train_until, recipe, tmp_path / "counted", None, lines) == 0
    assert_same(tmp_path / "counted", undisturbed)
    total, moments = lines.value, random.Random(0)
    run, killed, reached = 0, 0, set()
    while killed < 20:
        run_dir = tmp_path / f"run{run}"
        code = run_child(train_until, recipe, run_dir, moments.randrange(1, total // 3), lines)
        if code == 0:  # it got to its end: another one
            assert_same(run_dir, undisturbed)
            run += 1
            continue
        assert code == -signal.SIGKILL
        killed += 1
        reached.add(store.newest(run_dir))
    assert len(reached) > 4, "at different places"
    assert run_child(train_until, recipe, run_dir, None, lines) == 0
    assert_same(run_dir, undisturbed)


def train_with_a_slow_disk(recipe: Path, run_dir: Path, reached: Any) -> None:
    save, update = store.save_tensors, loop.Trainer._update

    def saved(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == store.OPTIMIZER and "step-00000006" in str(path):
            time.sleep(600)
        save(path, *arguments, **options)

    def updated(self: loop.Trainer, batch: Any) -> None:
        update(self, batch)
        if self.step == 8:
            reached.set()

    store.save_tensors, loop.Trainer._update = saved, updated
    train(recipe, run_dir)


def test_killed_while_a_checkpoint_is_written_in_the_background(tmp_path, recipe, undisturbed):
    """Updates go on meanwhile; of the half of a checkpoint nothing is ever seen."""
    run_dir, reached = tmp_path / "run", FORK.Event()
    process = FORK.Process(target=train_with_a_slow_disk, args=(recipe, run_dir, reached))
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    assert [path.name for path in store.list_checkpoints(run_dir / "checkpoints")][-1] == "step-00000004"
    assert len(list((run_dir / "checkpoints").glob(".step-00000006.*.tmp"))) == 1
    train(recipe, run_dir)
    assert_same(run_dir, undisturbed)


def train_in_a_session(recipe: Path, run_dir: Path, action: Callable[[], None]) -> None:
    os.setsid()
    update = loop.Trainer._update

    def updated(self: loop.Trainer, batch: Any) -> None:
        update(self, batch)
        if self.step == 3:
            action()

    loop.Trainer._update = updated
    own = [f"run.dir={run_dir.parent}", f"run.name={run_dir.name}", "data.num_workers=2", "--quiet"]
    os._exit(main(["pretrain", str(recipe), *own]))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted_twice() -> None:
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)


def is_gone(group: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        return False
    return True


@pytest.mark.parametrize(("action", "code"), [(killed, -signal.SIGKILL), (interrupted_twice, 130)])
def test_no_process_is_left_behind(tmp_path, recipe, undisturbed, action, code):
    process = FORK.Process(target=train_in_a_session, args=(recipe, tmp_path / "run", action))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert is_gone(process.pid)
    train(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


# ---------------------------------------------------------------- interrupted


def test_a_second_ctrl_c_waits_for_the_checkpoint_that_is_being_written(
    tmp_path, recipe, undisturbed, monkeypatch, capsys
):
    save = store.save_tensors

    def interrupted(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == store.OPTIMIZER:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
        save(path, *arguments, **options)

    run = ["pretrain", str(recipe), f"run.dir={tmp_path}", "run.name=run"]
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_tensors", interrupted)
        assert main(run) == 130
    told = capsys.readouterr().err
    assert "waiting for the checkpoint that is being written" in told
    assert told.endswith("cat-audio: interrupted\n")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert store.load(saved).step == 2
    train(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


# ---------------------------------------------------------------- unheard, and in no time


def test_nobody_reads_what_it_says(tmp_path, recipe, undisturbed, monkeypatch):
    """``cat-audio pretrain ... | head -0`` and ``>&- 2>&-``."""
    run = ["pretrain", str(recipe), f"run.dir={tmp_path}"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main([*run, "run.name=head"]) == 141
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert main([*run, "run.name=closed"]) == 0
    for name in ("head", "closed"):
        assert_same(tmp_path / name, undisturbed)


def test_the_clock_may_jump(tmp_path, recipe, undisturbed, monkeypatch):
    """Durations are of a clock that nobody sets."""
    jumps = itertools.cycle([0.0, 1e6, -1e6, 5e8])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    train(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)
    speeds = read_rows(tmp_path / "run" / "metrics.jsonl", "speed")
    assert all(0 < row["seconds"] < 60 for row in speeds)
