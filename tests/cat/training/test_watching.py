"""What is said of a run's speed, and when that the device waits for data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cat.training import watching
from cat.training.finetune import _task as finetune_task
from cat.training.finetune_recipe import load_finetune_recipe
from cat.training.flops import PEAKS, flops, peak_rate
from cat.training.pretrain import _task as pretrain_task
from cat.training.pretrain import pretrain
from cat.training.recipe import load_recipe
from cat.training.records import read_rows
from cat.training.watching import Watch, told


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(watching.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(watching.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def watch_of(kind="cpu", end=100, peak=None):
    watch = Watch(torch.device("cpu"), "fp32", end=end, workers=4)
    watch._device, watch.peak = torch.device(kind), peak
    return watch


def interval(watch, clock, step, *, seconds, waited):
    watch.restart()
    with watch.waiting():
        clock.now += waited
    clock.now += seconds - waited
    watch.updated(96, int(5e12))
    return watch.measured(step)


def test_rate_wait_and_time_left(clock):
    watch = watch_of(end=110, peak=1e13)
    watch.begin(10)
    speed = interval(watch, clock, 30, seconds=20.0, waited=5.0)
    assert (speed["clips_per_s"], speed["data_wait"], speed["seconds"]) == (4.8, 0.25, 20.0)
    assert speed["left_s"] == 80.0  # a second a step
    assert (speed["flops_per_s"], speed["matrix_share"]) == (2.5e11, 0.025)
    clock.now += 100  # an evaluation
    assert interval(watch, clock, 50, seconds=20.0, waited=0.0)["left_s"] == pytest.approx(140 / 40 * 60)
    text = told({**speed, "memory_bytes": 2_340_000_000})
    assert text == "4.8 clips/s, 2 % of the matrix rate, data wait 25 %, 2.3 GB"
    assert told({"clips_per_s": 1.0, "data_wait": 0.001, "memory_bytes": 0}) == "1.0 clips/s, 0.0 GB"
    assert "matrix_share" not in interval(watch_of(), clock, 1, seconds=1.0, waited=0.0)


def test_a_device_that_waits_for_data_is_told_once(clock, monkeypatch):
    monkeypatch.setattr(watching, "peak_memory", lambda device: 0)
    watch = watch_of("cuda")
    found = []
    for step, waited in enumerate([30.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0], start=1):
        interval(watch, clock, step, seconds=30.0, waited=waited)
        found.append(watch.warnings())
    # The first interval does not count, the next two are good.
    assert [len(warnings) for warnings in found] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert "the cuda device waits for data: 30 % of the last 60 s" in found[4][0]
    assert "data.num_workers=4 now" in found[4][0]
    watch = watch_of("cpu")  # where reading and training share the cores
    for step in range(1, 9):
        interval(watch, clock, step, seconds=30.0, waited=20.0)
        assert watch.warnings() == []


def test_peaks_are_found_by_name(monkeypatch):
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_rate(torch.device("cuda"), "bf16") == peak
        assert peak_rate(torch.device("cuda"), "fp32") is None
    assert peak_rate(torch.device("cpu"), "bf16") is None
    names = list(PEAKS)  # a name that is a part of another comes after it
    assert all(names.index(long) < names.index(short) for long in names for short in names if short in long != short)


def test_flops_of_a_block_are_counted():
    D, S = 64, 33
    layer = torch.nn.Linear(D, 4 * D, device="meta")
    x = torch.empty(2, S, D, device="meta")
    assert flops(lambda: layer(x)) == 2 * 2 * S * D * 4 * D
    assert flops(lambda: layer(x).sum().backward()) == 2 * 2 * 2 * S * D * 4 * D  # nothing asks for x's gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp("watching")
    random = np.random.default_rng(0)
    for part in ("cat", "dog"):
        (folder / "sounds" / part).mkdir(parents=True)
        for i in range(3):
            soundfile.write(folder / "sounds" / part / f"{part}{i}.wav", 0.1 * random.standard_normal(9000), 16000)
    sections = "model: {preset: tiny, depth: 2}\nrun: {device: cpu, threads: 1, name: run}\nfeatures: {frames: 64}\n"
    data = f"data: {{train: {folder / 'sounds'}, batch_size: 3, num_workers: 0}}\n"
    (folder / "pretrain.yaml").write_text(sections + data + "masks: {num_masks: 2}\n")
    (folder / "finetune.yaml").write_text(sections + data + "encoder: none\ntask: single-label\n")
    return folder


def test_lines_come_as_often_as_asked_where_there_is_no_terminal(folder, tmp_path, capsys):
    for seconds, lines in ((0, 3), (1000, 2)):  # at the latest the first and the last
        run = ["run.log_every=1", "run.tensorboard=false", "run.figures=false", f"run.line_every={seconds}"]
        config = load_recipe(folder / "pretrain.yaml", [*run, "optim.steps=3", "optim.warmup_steps=0"])
        pretrain(config, tmp_path / str(seconds))
        told = [line for line in capsys.readouterr().err.splitlines() if "/3 steps, loss " in line]
        assert len(told) == lines
        assert "clips/s" in told[-1]
        assert " GB, " in told[-1]
    speed = read_rows(tmp_path / "0" / "metrics.jsonl", "speed")[-1]
    assert {"clips_per_s", "seconds", "data_wait", "memory_bytes", "left_s"} <= speed.keys()
    assert speed["left_s"] == 0


def test_flops_of_pre_training_are_those_of_its_model(folder):
    task = pretrain_task(load_recipe(folder / "pretrain.yaml"))
    (batch,) = next(task.batches(0, 1, print))
    inputs = [value.to("meta") for value in (batch.spec, batch.visible, task._rng)]
    model = task.model.to("meta")
    assert task.flops(batch) == flops(lambda: model(*inputs[:2], rng=inputs[2]).loss.backward())


def test_flops_of_fine_tuning_follow_the_clips_lengths(folder):
    task = finetune_task(load_finetune_recipe(folder / "finetune.yaml"))
    (batch,) = next(task.batches(0, 1, print))
    model = task.model.to("meta")

    def counted(rows):
        return flops(lambda: model(torch.empty(1, 1, 16 * rows, 128, device="meta")).clip.sum().backward())

    assert task.flops(dataclasses.replace(batch, rows=None)) == pytest.approx(3 * counted(4), rel=1e-6)
    lengths = dataclasses.replace(batch, rows=(4, 4, 3))
    assert task.flops(lengths) == pytest.approx(2 * counted(4) + counted(3), rel=0.02)
