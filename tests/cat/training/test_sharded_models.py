"""Several processes with a shard of the model each (run.parallel=fsdp) train what one process does."""

from __future__ import annotations

import json

import pytest
import torch

from cat.checkpoints import store as checkpoints
from cat.training.recipe import RunConfig
from tests.processes import together

for needed in ("soundfile", "yaml", "sklearn"):  # before what is skipped without them is imported
    pytest.importorskip(needed)
from tests.cat.training.test_distributed import (  # noqa: E402
    AT_A_PIECE,
    NOT_FINITE,
    assert_same_numbers,
    ended,
    group,
    rows,
)
from tests.cat.training.test_distributed import data as data  # noqa: E402 (a fixture)

FSDP = "run.parallel=fsdp"
COUNTED = """
import torch.distributed as dist
name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
scatter = getattr(dist, name)
def counted(*args, **more):
    if rank == 0:
        with open({!r}, "a") as file:
            file.write(".")
    return scatter(*args, **more)
setattr(dist, name, counted)
"""

# A checkpoint takes longer to write than the updates that follow it.
SLOW = """
import time
from cat.checkpoints import store
save = store.save_tensors
def slow(*args, **more):
    time.sleep(0.3)
    save(*args, **more)
store.save_tensors = slow
"""


def assert_same_checkpoints(run, other):
    ours, theirs = (checkpoints.load(checkpoints.newest(path)) for path in (run, other))
    assert ours.step == theirs.step
    for mine, its in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def test_pretraining_agrees_and_goes_on_in_any_way(data, tmp_path):
    """10 steps: one process, DDP, FSDP, FSDP in pieces; and FSDP, one process, DDP, FSDP in turn from checkpoints."""
    one, changed, count = tmp_path / "1", tmp_path / "changed", tmp_path / "count"
    often = ["run.checkpoint_every=4", "run.keep_last=9"]
    pieces = ["data.global_batch=4", "data.batch_size=1"]
    ends = together(
        tmp_path,
        group(data, 1, one, "run.stop_at=10"),
        group(data, 2, tmp_path / "ddp", "run.stop_at=10"),
        group(data, 2, tmp_path / "fsdp", "run.stop_at=10", FSDP, "run.eval_every=3", *often, before=SLOW),
        group(data, 2, tmp_path / "pieces", "run.stop_at=10", FSDP, *pieces, before=COUNTED.format(str(count))),
        group(data, 2, changed, "run.stop_at=3", FSDP),
        group(data, 1, changed, "run.stop_at=5", "--resume"),
        group(data, 2, changed, "run.stop_at=7", "--resume"),
        group(data, 2, changed, "run.stop_at=10", FSDP, "--resume"),
    )
    for end in ends:
        assert ended(end, *[0] * len(end))
        assert [(other["out"], other["err"]) for other in end[1:]] == [("", "")] * (len(end) - 1)
    assert "2 processes (cpu, FSDP), " in ends[2][0]["err"]
    assert "Warning" not in ends[2][0]["err"]
    assert "parallel was fsdp and is now None: losses will agree up to rounding" in ends[5][0]["err"]
    for name in ("ddp", "fsdp", "pieces", "changed"):
        assert len(rows(tmp_path / name)) == 10
        assert_same_numbers(tmp_path / name, one)
        assert_same_checkpoints(tmp_path / name, one)
    assert [row["step"] for row in rows(tmp_path / "fsdp", "valid")] == [3, 4, 6, 8, 9, 10]
    first = checkpoints.load(checkpoints.list_checkpoints(tmp_path / "fsdp" / "checkpoints")[0])
    assert {value.item() for name, value in first.optimizer.items() if name.startswith("step.")} == {4}
    assert len(count.read_text()) == 10 * 2  # gradients of the block and of the rest, once an update


def test_fine_tuning_agrees_and_scores_its_average(data, tmp_path):
    runs = {"1": (1, []), "fsdp": (2, [FSDP])}
    ends = together(
        tmp_path, *(group(data, size, tmp_path / n, *more, command="finetune") for n, (size, more) in runs.items())
    )
    for end in ends:
        assert ended(end, *[0] * len(end))
    assert_same_numbers(tmp_path / "fsdp", tmp_path / "1")
    assert_same_checkpoints(tmp_path / "fsdp", tmp_path / "1")
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in runs]
    assert scores[1]["test"] == pytest.approx(scores[0]["test"], rel=1e-4)


def assert_agrees_in_bf16(run, other):
    for mine, its in zip(rows(run), rows(other), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((its["loss"], its["grad_norm"]), rel=2e-3)


def test_low_precision_and_ends(data, tmp_path):
    """bf16 with a teacher that is rounded when it is used; fp16 with scaled losses; an update that all skip, because
    the loss of one is not finite; an error in one or its death, which cost the updates since the last checkpoint; a
    signal to one, which costs nothing."""
    low, runs = ["run.stop_at=4", "run.precision=bf16"], {}
    runs["ddp"] = group(data, 2, tmp_path / "ddp", *low)
    runs["bf16"] = group(data, 2, tmp_path / "bf16", *low, FSDP)
    runs["fp16"] = group(data, 2, tmp_path / "fp16", "run.stop_at=4", "run.precision=fp16", FSDP)
    runs["skips"] = group(data, 2, tmp_path / "skips", "run.stop_at=4", FSDP, before=AT_A_PIECE.format(NOT_FINITE))
    error = AT_A_PIECE.format("raise RuntimeError('a surprise')")
    runs["raises"] = group(data, 2, tmp_path / "raises", FSDP, before=error)
    for name in ("SIGKILL", "SIGTERM"):
        sent = AT_A_PIECE.format(f"os.kill(os.getpid(), signal.{name})")
        runs[name] = group(data, 2, tmp_path / name, FSDP, before=sent)
    ends = dict(zip(runs, together(tmp_path, *runs.values()), strict=True))
    for name in ("ddp", "bf16", "fp16", "skips"):
        assert ended(ends[name], 0, 0)
    assert_agrees_in_bf16(tmp_path / "bf16", tmp_path / "ddp")
    assert {"scale", "grad_norm"} <= rows(tmp_path / "fp16")[-1].keys()
    assert [row["grad_norm"] is None for row in rows(tmp_path / "skips")] == [False, False, True, False]
    assert ended(ends["raises"], 1, 1)
    assert "error: a surprise" in ends["raises"][1]["err"]
    said = ends["raises"][0]["err"].splitlines()[-1]
    assert said.startswith("step 2 could not be saved (with run.parallel=fsdp its weights lie in all processes)")
    assert ended(ends["SIGKILL"], 1, -9)
    assert "of 2 (counted from 0) has ended without a word: killed" in ends["SIGKILL"][0]["err"]
    assert ended(ends["SIGTERM"], 143, 143)
    assert checkpoints.newest(tmp_path / "SIGTERM").name == "step-00000002"


@pytest.mark.slow
def test_compiled_blocks_agree(data, tmp_path):
    compiled = "import cat.training.step\ncat.training.step.COMPILER = 'aot_eager'"
    low = ["run.stop_at=4", "run.precision=bf16", FSDP]
    ends = together(
        tmp_path,
        group(data, 2, tmp_path / "eager", *low),
        group(data, 2, tmp_path / "blocks", *low, "run.compile=blocks", before=compiled),
    )
    for end in ends:
        assert ended(end, 0, 0)
    assert_agrees_in_bf16(tmp_path / "blocks", tmp_path / "eager")


@pytest.mark.parametrize("other", [{"compile": "step"}, {"cuda_graph": True}])
def test_what_does_not_go_together_is_refused(other):
    with pytest.raises(ValueError, match=r"parallel is 'fsdp' with .*; expected cuda_graph=false and compile"):
        RunConfig(parallel="fsdp", **other)
