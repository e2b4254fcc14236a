"""Metrics files that survive a kill, the collapse check, and progress with and without a terminal."""

from __future__ import annotations

import json
import math
import resource

import pytest

from cat.training.records import CollapseCheck, JsonLines, Metrics, read_rows, truncate_rows
from cat.training.sinks import TensorBoard


def test_rows_come_back_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "m.jsonl"
    file = JsonLines(path)
    file.write([{"kind": "train", "step": 1, "loss": 0.1 + 0.2}, {"kind": "valid", "step": 1, "loss": math.nan}])
    file.sync()
    file.close()
    assert read_rows(path) == [
        {"kind": "train", "step": 1, "loss": 0.30000000000000004},
        {"kind": "valid", "step": 1, "loss": None},
    ]
    assert [row["kind"] for row in read_rows(path, "valid")] == ["valid"]


def test_a_line_cut_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    assert truncate_rows(path, 1) == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'
    assert truncate_rows(tmp_path / "none.jsonl", 5) == []
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_rows(path)


def test_metrics_go_to_file_and_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, rows in ((0, [(1, 4.0), (2, 2.0), (3, 9.0)]), (2, [(3, 1.0), (4, 2.0)])):
        metrics = Metrics(tmp_path, start_step=start, config={"optim": {"lr": 0.001}})
        metrics.train([{"step": s, "loss": v} for s, v in rows], {"clips_per_s": 10.0, "seconds": 1.0})
        metrics.valid({"step": rows[-1][0], "loss": 7.0})
        metrics.sync()
        metrics.close()
    kinds = [(row["kind"], row["step"], row.get("loss")) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert kinds == [
        ("train", 1, 4.0), ("train", 2, 2.0), ("train", 3, 1.0), ("train", 4, 2.0),
        ("speed", 4, None), ("valid", 4, 7.0),
    ]  # fmt: skip
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 1.5)]  # step 3's event is purged
    assert {"train/clips_per_s", "valid/loss"} <= set(events.Tags()["scalars"])
    (text,) = events.Tensors("config/text_summary")[-1].tensor_proto.string_val
    assert text.decode() == "    optim:\n      lr: 0.001\n"


def test_a_write_that_does_not_fit_leaves_nothing_behind(tmp_path):
    path = tmp_path / "m.jsonl"
    file = JsonLines(path)
    file.write([{"step": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write([{"step": step} for step in range(2, 9)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_rows(path) == [{"step": 1}]
    file.write([{"step": 2}])
    file.close()
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_the_run_goes_on_without_tensorboard_when_its_files_cannot_be_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    said = []
    metrics = Metrics(tmp_path, warn=said.append)
    monkeypatch.setattr(TensorBoard, "scalars", broken)
    for step in (1, 2):
        metrics.train([{"step": step, "loss": 1.0}], {"clips_per_s": 10.0, "seconds": 1.0})
    metrics.sync()
    metrics.close()
    assert said == ["TensorBoard cannot be written (No space left on device): the run goes on without it"]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl", "train")] == [1, 2]


def broken(*args):
    raise OSError("No space left on device")


def rows(values, key="pred_std"):
    other = {"pred_std": "target_std", "target_std": "pred_std"}[key]
    return [{"step": i, key: value, other: 1.0} for i, value in enumerate(values, start=1)]


def test_collapse_warns_after_so_many_steps_in_a_row_and_again_after_recovery():
    check = CollapseCheck(pred_std=0.01, target_std=0.1, steps=3)
    assert check.update(rows([0.001, 0.001, 0.5, 0.001, 0.001])) == []
    (warning,) = check.update(rows([0.002, 0.001, 0.001]))
    assert "predictions may have collapsed" in warning
    assert "pred_std is 0.0020" in warning
    assert check.update(rows([0.001] * 10)) == []
    assert check.update(rows([0.5] + [0.001] * 2)) == []
    assert len(check.update(rows([0.001]))) == 1
    (warning,) = check.update(rows([0.05] * 3, "target_std"))
    assert "targets" in warning
    assert CollapseCheck(pred_std=1, target_std=1, steps=0).update(rows([0.0] * 9)) == []


def test_json_lines_are_plain_json(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.train([{"step": 1, "loss": 1.0}], {"clips_per_s": 1.235, "seconds": 2.0})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"kind": "speed", "step": 1, "clips_per_s": 1.235, "seconds": 2.0}
    assert not (tmp_path / "tensorboard").exists()
