"""The traced step: what is counted, whose part it is, what is alive; and what is predicted of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import predicted_step, start, step_parts, step_time, tables
from benchmarks.runner import Settings, arguments
from benchmarks.trace import Trace, _list_launches, counts
from cat.parts import part

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
COUNTS = ROOT / "tests" / "step_counts.json"
RENEW = "python -m benchmarks.traced_step --renew"
STANDIN_WORKS = not list((Path(torch.__file__).parent / "lib").glob("libtorch_cuda*"))


def traced(call):
    trace = Trace(CPU)
    with trace.tracing():
        call()
    return {o.name: o for o in trace.operations}


# --- a guard ----------------------------------------------------------------------------------------------------------


def grown(before, after):
    """What differs, in words."""
    told = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = (found.get(name, dict.fromkeys(("launches", "bytes", "flops"), 0)) for found in (before, after))
        told += [f"{name}: {old[what]:,} {what} before, {new[what]:,} now" for what in old if old[what] != new[what]]
    return told


@pytest.mark.skipif(not STANDIN_WORKS, reason="takes the place of CUDA in a PyTorch built without it")
def test_launches_and_bytes_of_a_step_are_those_that_were_meant():
    pytest.importorskip("triton")
    expected = json.loads(COUNTS.read_text())
    if not torch.__version__.startswith(expected["torch"] + "."):
        pytest.skip(f"counted with PyTorch {expected['torch']}; others cut some of their operations another way")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.traced_step", "--counts"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = grown(expected["parts"], json.loads(done.stdout)["parts"])
    assert not told, "\n".join(["the step has changed:", *told, f"where that is meant: {RENEW}"])


def test_what_has_grown_is_told():
    before = {"decoder": {"launches": 2, "bytes": 4096, "flops": 0}}
    after = {"decoder": {"launches": 3, "bytes": 4096, "flops": 0}, "loss": {"launches": 1, "bytes": 8, "flops": 0}}
    told = ["decoder: 2 launches before, 3 now", "loss: 0 launches before, 1 now", "loss: 0 bytes before, 8 now"]
    assert grown(before, after) == told


# --- counting ---------------------------------------------------------------------------------------------------------


def test_each_argument_and_result_counts_once():
    x, y, row = torch.zeros(8, 16), torch.zeros(8, 16), torch.zeros(1, 16)
    found = traced(lambda: (x + y, x.add_(1), x @ x.t(), x.view(16, 8).t(), x * row.expand(8, 16)))
    assert {name: (o.launches, o.bytes) for name, o in found.items()} == {
        "add": (1, 3 * 512), "add_": (1, 2 * 512), "mm": (1, 512 + 256), "mul": (1, 2 * 512 + 64),
    }  # fmt: skip
    assert found["mm"].flops == 2 * 8 * 16 * 8


def test_what_is_only_written_is_not_read():
    x, table, index = torch.zeros(8, 16), torch.zeros(1000, 16), torch.zeros(8, dtype=torch.int64)
    found = traced(lambda: (torch.empty_like(x).copy_(x), table.index_select(0, index)))
    assert {name: o.bytes for name, o in found.items()} == {"copy_": 2 * 512, "index_select": 2 * 512 + 64}


def test_lists_of_tensors_go_in_chunks():
    assert _list_launches([[torch.zeros(3)] * 110]) == 1
    assert _list_launches([[torch.zeros(3)] * 111]) == 2
    assert _list_launches([[torch.zeros(3)] * 40] * 4) == 2
    assert _list_launches([[torch.empty(65536 * 320 + 1, device="meta")]]) == 2


def test_the_backward_belongs_to_the_part_of_its_forward():
    layers, trace = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), Trace(CPU)
    trace.watch(layers[0], "first")
    trace.watch(layers[2], "last")
    with trace.tracing():
        hidden = layers[0](torch.zeros(4, 8, requires_grad=True))
        with part("between"):
            hidden = layers[1](hidden)
        loss = layers[2](hidden).sum()
        with part("backward"):
            loss.backward()
    found = counts(trace.operations)
    products = 2 * 4 * 8 * 8
    for name in ("first", "between", "last"):
        assert found[name]["flops"] == products
        assert found[f"{name}, backward"]["flops"] == 2 * products


def test_the_worst_moment_is_the_profilers():
    """Of a whole step: what the libraries allocate for themselves is not seen."""
    shape = {"preset": "tiny", "clips": 2, "masks": 4, "frames": 128}
    for name, allowed in (("dense", 0.01), ("visible", 0.05)):
        provider = step_time.make_provider(name, shape, "fp32")
        provider.call()
        trace = Trace(CPU)
        with trace.tracing():
            provider.call()
        live = peak = 0
        with torch.profiler.profile(profile_memory=True) as profiler:
            provider.call()
        events = profiler.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        assert trace.peak_bytes == pytest.approx(peak, rel=allowed)
        assert sum(trace.at_peak.values()) == trace.peak_bytes


# --- predicting -------------------------------------------------------------------------------------------------------


class Bytes:
    """A model in which a byte takes a millisecond."""

    a = predicted_step.Assumptions(memory_TBps=1e-9, memory_share=1.0, launch_us=0.0)

    def cost(self, o):
        return predicted_step.Cost(o["part"], False, "other", 1, 0, 0, 0, 0.0, 1.0)


def operation(name, reads, writes, part="blocks"):
    pairs = [[[number, 10] for number in numbers] for numbers in (reads, writes)]
    return {"name": name, "part": part, "backward": False, "elements": 5, "reads": pairs[0], "writes": pairs[1]}


def test_a_run_between_products_reads_what_was_there_and_writes_what_is_read_later():
    operations = [
        operation("mm", [0], [1]), operation("add", [1, 2], [3]), operation("gelu", [3], [4]),
        operation("mm", [4], [5]), operation("add", [3, 5], [6]), operation("add", [6], [7], part="loss"),
    ]  # fmt: skip
    found = predicted_step.fused(operations, Bytes())
    assert [c.bytes for c in found] == [0, 40, 0, 30, 0]  # reads 1, 2, writes 3 and 4; reads 3, 5, writes 6
    assert [c.launches for c in found] == [1, 1, 1, 1, 1]


def test_documented_predictions_are_those_that_were_saved():
    before, after = (predicted_step.load(path) for path in (predicted_step.BEFORE, predicted_step.AFTER))
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert predicted_step.comparison_table(before, after).markdown() in text
    assert predicted_step.step_table(after).markdown() in text
    assert predicted_step.memory_table(after).markdown() in text
    assert predicted_step.kept_table(after).markdown() in (ROOT / "cat_kernels" / "stem" / "README.md").read_text()
    for p in (before, after):
        parts = {name: c["ms"] for name, c in p["parts"].items()}
        assert sum(ms for name, ms in parts.items() if name != "step") == pytest.approx(parts["step"])


def test_parts_are_measured_beside_the_prediction(monkeypatch):
    options = ["--device", "cpu", "--preset", "tiny", "--clips", "1", "--masks", "2", "--frames", "64"]
    s = Settings.of(arguments("").parse_args([*options, "--dtypes", "fp32"]), clips_cpu=1, clips_cuda=1)
    predicted = {"forward_ms": 1.0, "backward_ms": 2.0, "ms": 3.0}
    parts = dict.fromkeys([*predicted_step.GOALS_MS], predicted)
    monkeypatch.setattr(predicted_step, "of", lambda *_: {"parts": parts, "memory": {"peak_MiB": 5.0}})
    results = step_parts.run(s)
    (found,) = results.parts.values()
    named = {name.removesuffix(", backward") for name in found["parts"]}
    assert named == set(predicted_step.GOALS_MS) - {"features"}
    assert found["parts"]["decoder, backward"]["predicted_ms"] == 2.0
    assert len(results.notes) == len(found["parts"]) - 1  # the step, less its features, has nothing predicted
    assert any(
        f"{name}: decoder: 1 ms predicted for an H200" in note for name in results.parts for note in results.notes
    )
    table = tables.parts_table(results.as_dict(CPU))
    assert len(table.rows) == len(found["parts"])


def test_a_start_is_timed(monkeypatch):
    from cat.training import step

    monkeypatch.setattr(step, "COMPILER", step.COMPILER)
    shape = {"preset": "tiny", "clips": 1, "masks": 2, "frames": 32}
    given = {"shape": shape, "dtype": "fp32", "device": "cpu", "compiler": "eager", "threads": 1, "mode": "eager"}
    found = start.child({**given, "began": 0.0})
    assert 0 < found["imports_s"] < found["first_update_s"] == found["ready_s"]


def test_a_warm_start_finds_the_caches_of_the_cold_one(monkeypatch):
    seen = []

    def started(settings, caches):
        seen.append((settings["mode"], caches.name))
        if settings["mode"] == "eager":
            raise RuntimeError("eager did not start: out of memory")
        return {"imports_s": 1.0, "first_update_s": 2.0, "ready_s": 61.0}

    monkeypatch.setattr(start, "start", started)
    options = arguments("").parse_args(["--device", "cpu", "--preset", "tiny", "--dtypes", "fp32"])
    results = start.run(Settings.of(options, clips_cpu=1, clips_cuda=1))
    assert seen == [("eager", "none")] * 2 + [("blocks", "blocks")] * 2
    assert list(results.starts) == ["blocks, cold, tiny, 1 clips, fp32", "blocks, warm, tiny, 1 clips, fp32"]
    assert results.notes[2:] == ["goal missed: start of blocks, warm: 61 s, goal 60 s"]
    assert tables.starts_table(results.as_dict(CPU)).rows[0][-1] == "61.0"
