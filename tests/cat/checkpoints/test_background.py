"""Checkpoints in the background: the files of one written on the spot, one at a time, no error lost."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from cat.checkpoints import store
from cat.checkpoints.background import BackgroundWriter


@pytest.fixture
def gate(monkeypatch):
    """Writing stops before the optimiser's file until the gate is opened."""
    gate, save_tensors = threading.Event(), store.save_tensors

    def held(path, *args, **options):
        if path.name == store.OPTIMIZER:
            assert gate.wait(30)
        save_tensors(path, *args, **options)

    monkeypatch.setattr(store, "save_tensors", held)
    yield gate
    gate.set()


def state(value: float) -> dict:
    tensors = {"a": torch.full((3, 4), value).T, "b": torch.tensor(value, dtype=torch.bfloat16)}
    return {"model": tensors, "optimizer": {"step.a": torch.tensor(value)}, "config": {"x": 1}, "score": value}


def contents(path) -> dict:
    """All but the order of the names in a file's metadata, which is safetensors' whim."""
    found = {}
    for name in store.TENSORS:
        tensors, metadata = store.read_tensors(path / name)
        found[name] = {n: (t.dtype, t.tolist()) for n, t in tensors.items()}, metadata, (path / name).stat().st_size
    return found | {"state": {**store.read_state(path), "sha256": None}, "files": sorted(os.listdir(path))}


def test_what_is_trained_meanwhile_does_not_get_into_it(tmp_path, gate):
    writer = BackgroundWriter(tmp_path / "run", keep_last=1, keep_best=0)
    given = state(1.0)
    for step in (1, 2):  # the second time into the memory of the first
        writer.save(step=step, **given)
        for tensor in (*given["model"].values(), *given["optimizer"].values()):
            tensor += 1
        assert writer.busy
        assert store.newest(tmp_path) is None, "half written, it has no name"
        gate.set()
        writer.wait()
        gate.clear()
        assert not writer.busy
    gate.set()
    other = store.save(tmp_path / "other", step=2, **{**state(2.0), "score": 1.0})
    assert contents(writer.newest) == contents(other)
    assert store.list_checkpoints(tmp_path / "run") == [writer.newest], "and pruned"


def test_one_at_a_time(tmp_path, gate):
    writer = BackgroundWriter(tmp_path, keep_last=2, keep_best=0)
    writer.save(step=1, **state(1.0))
    threading.Timer(0.2, gate.set).start()
    writer.save(step=2, **state(2.0))
    assert store.list_checkpoints(tmp_path)[0].name == store.step_name(1)
    writer.wait()
    assert writer.newest.name == store.step_name(2)


def test_an_error_is_raised_by_what_comes_next_and_once(tmp_path, monkeypatch):
    writer = BackgroundWriter(tmp_path, keep_last=2, keep_best=0)
    writer.save(step=1, **state(1.0))
    writer.wait()
    good = writer.newest
    save = store.save_tensors

    def full(path, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for later in (writer.check, writer.wait, lambda: writer.save(step=9, **state(1.0))):
        monkeypatch.setattr(store, "save_tensors", full)
        writer.save(step=2, **state(2.0))
        writer.settle()
        with pytest.raises(OSError, match=r"this checkpoint needs .*step-00000002") as error:
            later()
        assert writer.error is error.value
        writer.check()
        monkeypatch.setattr(store, "save_tensors", save)
    assert (writer.newest, [path.name for path in tmp_path.iterdir()]) == (good, [store.step_name(1)])
    writer.save(step=3, **state(3.0))
    writer.wait()
    assert (writer.error, writer.newest.name) == (None, store.step_name(3))


@pytest.mark.parametrize("lacking", [MemoryError(), RuntimeError("can't start new thread")])
def test_without_memory_for_copies_or_a_thread_it_is_written_on_the_spot(tmp_path, monkeypatch, lacking):
    def refuse(*args, **options):
        raise lacking

    monkeypatch.setattr("cat.checkpoints.background.threading.Thread.start", refuse)
    writer = BackgroundWriter(tmp_path, keep_last=2, keep_best=0)
    writer.save(step=1, **state(1.0))
    assert not writer.busy
    assert torch.equal(store.load(writer.newest).model["a"], state(1.0)["model"]["a"])


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_nothing(tmp_path):
    writer = BackgroundWriter(tmp_path, keep_last=2, keep_best=0)
    model = {"a": torch.full((1 << 20,), 1.0, device="cuda")}
    mode = torch.cuda.get_sync_debug_mode()
    for step in (1, 2):
        torch.cuda.set_sync_debug_mode("error" if step == 2 else mode)  # the first makes pinned memory
        try:
            torch.cuda._sleep(10_000_000)
            writer.save(step=step, model=model, optimizer={}, config={})
            model["a"] += 1
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        writer.wait()
        assert set(store.load(writer.newest).model["a"].tolist()) == {float(step)}
