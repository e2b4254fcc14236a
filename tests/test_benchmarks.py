"""The benchmarks: the arithmetic of results, parity that rejects, reports, and the GPU suite's path on the CPU."""

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cat_kernels
from benchmarks import (
    ahead,
    checkpoints,
    entries,
    fbank,
    finetune,
    inference,
    kernels,
    memory,
    operators,
    others,
    pieces,
    plots,
    predicted_stem,
    report,
    runner,
    sanitize,
    scaling,
    stem,
    tables,
    timing,
    usual,
)
from benchmarks.flops import multiply_adds
from benchmarks.results import Key, Parity, Results, load
from benchmarks.runner import DTYPES, FLOOR, Case, Settings, distance, run_case
from benchmarks.step_time import count
from benchmarks.timing import Quantiles, interleaved, ratio
from cat.training.parallel import gathering
from cat_kernels.mel.reference import FbankSettings, fbank_reference

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KEY = Key(benchmark="stem", mode="forward", dtype="fp32", shape={"clips": 2})


def settings(**changes):
    fixed = Settings(
        device=CPU, dtypes=["fp32"], preset="tiny", clips=1, masks=2, frames=64, threads=1, budget_s=0.0, min_rounds=3,
        compiled=False, compiler="inductor", memory=False, ceilings={}, out=None, check=False,
    )  # fmt: skip
    return dataclasses.replace(fixed, **changes)


# ---------------------------------------------------------------- timing


def test_ratio_is_taken_pair_by_pair():
    # Means and medians of each would give other numbers.
    found = ratio([10.0, 40.0, 90.0], [5.0, 10.0, 10.0])
    assert found == Quantiles(4.0, pytest.approx(2.8), pytest.approx(7.0))


def test_quantiles_of_few_values_are_their_range():
    assert Quantiles.of([3.0, 1.0]) == Quantiles(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        Quantiles.of([])


def test_every_candidate_is_called_once_a_round_in_rotating_order():
    calls: list[str] = []
    names = ("a", "b", "c")
    times = interleaved({n: lambda n=n: calls.append(n) for n in names}, CPU, warmup=1, min_rounds=3, budget_s=0)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == [names, names, ("b", "c", "a"), ("c", "a", "b")]
    assert {n: len(t) for n, t in times.items()} == dict.fromkeys(names, 3)


def test_interleaved_measures_time():
    times = interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, CPU, min_rounds=3, budget_s=0)
    assert min(times["slow"]) >= 20
    assert Quantiles.of(times["fast"]).median < 10


@pytest.mark.gpu
@pytest.mark.alone
def test_events_measure_the_device_not_the_host():
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    times = interleaved({"one": lambda: a @ a, "four": lambda: a @ a @ a @ a @ a}, device, min_rounds=5, budget_s=0)
    assert 3 < ratio(times["four"], times["one"]).median < 5


@pytest.mark.gpu
@pytest.mark.alone
def test_events_leave_out_what_the_host_takes_between_launches():
    a = torch.zeros(8, device="cuda")

    def call():
        a.add_(1)
        time.sleep(1e-3)
        a.add_(1)

    assert Quantiles.of(interleaved({"call": call}, a.device, min_rounds=5, budget_s=0)["call"]).median < 0.3


def test_a_gpu_sleeps_while_the_host_launches(monkeypatch):
    """But not for a call that takes the host long: that is timed with its waiting."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            said.append("event")

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep" if cycles >= 1.5e6 else cycles))
    monkeypatch.setattr(timing, "_Sweep", lambda device: lambda: said.append("sweep"))
    calls = {
        "short": lambda: (time.sleep(5e-4), said.append("short")),
        "long": lambda: (time.sleep(timing.LONGEST_SLEEP_S), said.append("long")),
    }
    interleaved(calls, torch.device("cuda"), min_rounds=1, max_rounds=1)
    assert said[said.index("sweep") :] == [
        "sweep",
        "sleep",
        "event",
        "short",
        "event",
        "sweep",
        "event",
        "long",
        "event",
    ]


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_on_the_spot_and_in_the_background_are_the_models(tmp_path, monkeypatch):
    results = checkpoints.run(settings(min_rounds=1), tmp_path)
    assert [row["provider"] for row in results.rows] == ["on the spot", "in the background"]
    assert len(tables.checkpoints_table(results.as_dict(CPU)).rows) == 2
    found = {"on the spot": 100.0, "in the background": 90.0}
    for row in results.rows:
        row["median_ms"] = found[row["provider"]]
    assert checkpoints.missed(results) == ["a step waits 90 ms for a checkpoint in the background, goal 0.2 of 100 ms"]
    monkeypatch.setattr(checkpoints, "_differing", lambda folder, state: 1)
    assert len(checkpoints.run(settings(min_rounds=1), tmp_path / "other").rejected) == 2


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_resident_memory_counts_what_is_freed_again():
    # In a process of its own, as the benchmark does it: what other tests freed would serve this call.
    script = (
        "import torch; from benchmarks.memory import peak_resident; torch.ones(1 << 20); "
        "print(peak_resident(lambda: torch.ones(64 << 18)), peak_resident(lambda: None))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    with_64_mib, with_nothing = map(float, done.stdout.split())
    assert 60 < with_64_mib < 80
    assert with_nothing < 10


@pytest.mark.gpu
@pytest.mark.alone
def test_peak_cuda_memory_counts_what_is_freed_again():
    assert memory.peak_cuda(lambda: torch.ones(64 << 18, device="cuda"), torch.device("cuda")) == pytest.approx(64)


def test_memory_process_reports_its_error():
    with pytest.raises(RuntimeError, match="'nonsense'"):
        memory.peak_in_fresh_process("stem", {"name": "visible", "shape": {"preset": "nonsense"}, "dtype": "fp32",
                                              "mode": "forward"}, threads=1)  # fmt: skip


# ---------------------------------------------------------------- multiply-adds


def test_multiply_adds_of_a_grouped_convolution_with_backward():
    with torch.device("meta"):
        conv, x = nn.Conv2d(32, 64, 3, padding=1, groups=4), torch.empty(2, 32, 10, 12, requires_grad=True)
    forward = 2 * 64 * 10 * 12 * (32 // 4) * 9
    assert multiply_adds(lambda: conv(x)) == forward
    assert multiply_adds(lambda: conv(x).sum().backward()) == 3 * forward


def test_multiply_adds_of_the_base_step():
    # The paper's model on one clip: 229 G against 451 G, which allows a speed-up of 1.96.
    shape = {"preset": "base", "clips": 1, "masks": 4, "frames": 1024}
    visible, dense = count(shape, "visible"), count(shape, "dense")
    assert visible["student_stem"] / 1e9 == pytest.approx(16.6, rel=0.01)
    assert dense["student_stem"] / 1e9 == pytest.approx(83.5, rel=0.01)
    assert visible["step"] / 1e9 == pytest.approx(231, rel=0.02)
    assert dense["step"] / 1e9 == pytest.approx(453, rel=0.02)


# ---------------------------------------------------------------- operators


USUAL_SAMPLES = {"gather_tokens": "plain, select=False", "ema_update_": "plain, copies"}


@pytest.mark.parametrize(("operator", "name"), [(o, name) for o, found in usual.USUAL.items() for name in found])
def test_what_users_write_gives_what_the_operators_give(operator, name):
    spec = operators.spec_named(operator)
    wanted = USUAL_SAMPLES.get(operator, "plain")
    sample = next(s for s in spec.samples(CPU, torch.float32) if s.name == wanted)
    assert operators.apart(spec, sample, name) < 1e-5


# ---------------------------------------------------------------- results and parity


class Constant:
    """A candidate whose result is a number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def call(self):
        return self.value

    def check(self):
        return {"tokens": [torch.full((4,), self.value)]}

    def persistent_bytes(self):
        return 1 << 20


def constant_case(**values: float) -> Case:
    return Case(
        key=KEY,
        providers={name: lambda value=value: Constant(value) for name, value in values.items()},
        baseline="dense",
        reference=lambda: {"tokens": [torch.ones(4)]},
        work={"visible": {"floor_ms": 1e-9}},
    )


def test_a_row_counts_only_with_parity(tmp_path):
    results = Results()
    out = tmp_path / "result.json"
    run_case(constant_case(dense=1.0, visible=1.00001, wrong=1.1, nan=float("nan")), results, settings(out=out))
    assert [row["provider"] for row in results.rows] == ["dense", "visible"]
    assert [c["provider"] for c in results.comparisons] == ["visible"]
    assert {r["provider"]: r["reason"] for r in results.rejected} == {
        "wrong": "parity: error 0.1, allowed 0.0001",
        "nan": "parity: error nan, allowed 0.0001",
    }
    row = load(out)["rows"][1]
    assert row["rounds"] == 3
    assert row["persistent_MiB"] == 1
    assert row["share_of_floor"] == pytest.approx(1e-9 / row["median_ms"])
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_on_a_cpu_floors_are_at_the_rate_of_the_same_rounds(monkeypatch):
    """A machine that is slow while a case runs is slow for its floor too."""
    work = {"multiply_adds": 3 * runner.PRODUCT_SIDE**3, "floor_ms": 1e-9}  # 1e-9: by a rate measured earlier
    monkeypatch.setattr(runner, "square_product", lambda dtype: lambda: time.sleep(0.02))
    results = Results()
    run_case(dataclasses.replace(constant_case(dense=1.0), work={"dense": work}), results, settings())
    assert [row["provider"] for row in results.rows] == ["dense"]
    assert results.rows[0]["floor_ms"] == pytest.approx(3 * 20, rel=0.5)


def test_a_candidate_that_fails_costs_only_its_row():
    results, case = Results(), constant_case(dense=1.0, visible=1.0)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    case.providers["compiled"] = fail
    run_case(case, results, settings(), stages=[["dense", "visible"], ["compiled"]])
    assert [row["provider"] for row in results.rows] == ["dense", "visible"]  # once, though timed in two stages
    assert [(r["provider"], r["reason"]) for r in results.rejected] == [("compiled", "out of memory")]


def test_a_wrong_baseline_is_no_yardstick():
    results = Results()
    run_case(constant_case(dense=2.0, visible=1.5), results, settings())
    assert not results.rows
    assert {r["provider"] for r in results.rejected} == {"dense", "visible"}


def test_distance_is_the_worst_group_as_one_vector():
    reference = {"tokens": [torch.ones(4)], "gradients": [torch.full((3,), 100.0), torch.zeros(1)]}
    actual = {"tokens": [torch.ones(4)], "gradients": [torch.full((3,), 100.0), torch.ones(1)]}
    assert distance(actual, reference) == pytest.approx(1 / (3**0.5 * 100))
    actual["tokens"][0][0] = float("nan")
    assert math.isnan(distance(actual, reference))
    with pytest.raises(ValueError, match="tokens: shape"):
        distance({**actual, "tokens": [torch.ones(3)]}, reference)


def test_a_result_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    results = Results()
    results.add(KEY, "dense", [1.0, 2.0, 3.0], Parity(0.0, 1.0))
    results.write(path, CPU)
    before = path.read_text()
    results.notes.append(object())  # no JSON
    with pytest.raises(TypeError):
        results.write(path, CPU)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("{}", "no result file of format 1")])
def test_other_files_are_no_results(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


# ---------------------------------------------------------------- log-mel features


def test_features_are_compared_and_their_share_of_a_step_is_taken(tmp_path):
    out = tmp_path / "result.json"
    fbank.run(settings(out=out, ceilings={"copy_GBps": 10.0})).write(out, CPU)
    data = load(out)
    assert not data["rejected"]
    here = [name for name in ("torchaudio", "torch", "native") if fbank.why_not(name, CPU) is None]
    foreign = [name for name in ("kaldi-native-fbank", "librosa") if fbank.why_not(name, CPU) is None]
    found = {mode: {r["provider"] for r in data["rows"] if r["mode"] == mode} for mode in ("log-mel", "model input")}
    assert found == {"log-mel": {*here, *foreign}, "model input": set(here)}
    for row in data["rows"]:
        assert row["parity_error"] <= row["parity_limit"] == 1
        if row["benchmark"] == "features":
            assert row["share_of_step"] == pytest.approx(row["median_ms"] / row["step_ms"])
        else:
            assert row["floor_ms"] == pytest.approx(row["bytes"] / 10e9 * 1e3)
    text = tables.summary(data)
    assert text.index("Log-mel features") < text.index("Features in a pre-training step")


def test_features_of_a_missing_package_are_a_note(monkeypatch):
    monkeypatch.setattr(others, "why_not", lambda package: f"{package} is not here")
    results = Results()
    fbank.measure("model input", "fp32", settings(), results)
    assert results.notes == ["fbank: torchaudio not measured: torchaudio is not here"]
    assert not results.rejected
    assert {c["baseline"] for c in results.comparisons} <= {"torch"}
    assert fbank.missed(results, settings()) == ["log-mel features, native against torchaudio's file: 0.00x, goal 3x"]


def log_mel():
    wave = fbank.waveforms(2, 64, CPU)
    return fbank_reference(wave, None, FbankSettings()), fbank_reference(wave.double(), None, FbankSettings())


def test_parity_of_features():
    actual, expected = log_mel()
    for good in (actual, list(actual), actual.bfloat16(), actual.half()):
        assert fbank.parity(good, expected).passed
    assert fbank.parity((actual + 4.268) / 9.138, (expected + 4.268) / 9.138, std=4.569).passed
    one_percent = actual + 0.01 * (torch.arange(actual.shape[1]) == 3)[:, None]
    for wrong in (one_percent, actual + 4e-4, torch.where(actual == actual[0, 0, 9], torch.nan, actual)):
        assert not fbank.parity(wrong, expected).passed
    with pytest.raises(ValueError, match=r"shape \(2, 62, 128\), expected \(2, 61, 128\)"):
        fbank.parity(torch.cat([actual, actual[:, :1]], dim=1), expected)


@pytest.mark.gpu
@pytest.mark.alone
def test_features_on_a_gpu():
    device = torch.device("cuda")
    results = fbank.run(settings(device=device, dtypes=["fp32", "bf16"], compiled=True, compiler="aot_eager"))
    assert not results.rejected
    here = {"torch", "torch compiled"} | ({"native", fbank.GRAPH} if fbank.why_not("native", device) is None else set())
    assert {r["provider"] for r in results.rows} - {"torchaudio"} == here


# ---------------------------------------------------------------- fine-tuning


def test_a_fine_tuning_step_is_compared(monkeypatch):
    monkeypatch.setitem(finetune.PRESETS, "tiny", dataclasses.replace(finetune.PRESETS["tiny"], depth=1))
    results = finetune.run(settings(clips=5, frames=32, min_rounds=1))  # more than one piece of the reference
    assert not results.rejected
    assert {r["provider"] for r in results.rows} == {"dense", "visible"}
    assert all(r["parity_error"] < 1e-4 for r in results.rows)
    assert len(tables.finetune_table(results.as_dict(CPU)).rows) == 2


# ---------------------------------------------------------------- inference


def embedded(tmp_path, monkeypatch, names, batches):
    monkeypatch.setitem(inference.PRESETS, "tiny", dataclasses.replace(inference.PRESETS["tiny"], depth=1))
    monkeypatch.setattr(inference, "other_models", lambda device: names)
    out = tmp_path / "result.json"
    inference.run(settings(out=out, frames=64, min_rounds=1), batches).write(out, CPU)
    data = load(out)
    assert not data["rejected"]
    for clips in batches:
        rows = [r for r in data["rows"] if r["shape"]["clips"] == clips]
        assert {r["provider"] for r in rows} == {"dense", "visible", "auto", *names}
        assert {r["audio_s"] for r in rows} == {clips * 0.625}
    return data


def test_embedding_of_clips_is_compared(tmp_path, monkeypatch):
    data = embedded(tmp_path, monkeypatch, [], (1, 2))
    table, first = tables.inference_table(data), data["rows"][0]
    assert len(table.rows) == 6
    assert table.rows[0][7] == f"{1e3 * first['audio_s'] / first['median_ms']:.3g}"


@pytest.mark.slow
def test_embedding_is_compared_with_other_models(tmp_path, monkeypatch):
    found = inference.other_models(CPU)
    if not found:
        pytest.skip("neither transformers nor onnxruntime is installed")
    embedded(tmp_path, monkeypatch, found, (2,))


def test_what_is_not_installed_is_a_note(monkeypatch):
    monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name: None)
    assert inference.other_models(CPU) == []
    assert [note.split(":")[1].split()[0] for note in inference.missing(CPU, [])] == ["AST", "onnx"]
    assert len(inference.missing(torch.device("cuda"), [])) == 1  # onnxruntime is the CPU's


def test_a_wrong_embedding_is_no_row():
    target = torch.randn(3, 8)
    yardstick = inference.parity("dense", lambda: target + 1e-4, target, "fp32", None)
    assert yardstick.passed
    assert inference.parity("auto", lambda: target + 1e-4, target, "fp32", yardstick).passed
    assert not inference.parity("auto", lambda: target + 1e-3, target, "fp32", yardstick).passed
    assert inference.parity("onnx int8", lambda: 1.01 * target, target, "fp32", yardstick).passed
    assert not inference.parity("onnx int8", lambda: 1.1 * target, target, "fp32", yardstick).passed


# ---------------------------------------------------------------- the stem and its kernels

TINY = {"preset": "tiny", "clips": 1, "masks": 1, "frames": 48}
BASE = {"preset": "base", "clips": 1, "masks": 4, "frames": 1024}


def test_the_teachers_pass_is_measured_without_masks():
    results = stem.run(settings())
    assert not results.rejected
    dense = [r for r in results.rows if r["mode"] == "dense forward"]
    assert {r["provider"] for r in dense} == {"dense", "visible"}
    assert {r["shape"]["masks"] for r in dense} == {0}
    # Every position once: masked, the dense formula does it for each of the two masks.
    masked = [r for r in results.rows if (r["mode"], r["provider"]) == ("forward", "dense")]
    assert 2 * dense[0]["multiply_adds"] == pytest.approx(masked[0]["multiply_adds"], rel=0.02)


def test_other_batches_and_resolutions_are_rows_with_their_shape():
    results = Results()
    shape = {"preset": "tiny", "masks": 1, "frames": 32}
    stem.run_others(settings(min_rounds=1), [{**shape, "clips": 2}], "stem sweep", results)
    sets = [{**shape, "clips": 1, "resolutions": r} for r in ("16", "4,8")]
    stem.run_others(settings(min_rounds=1), sets, "stem resolutions", results)
    assert not results.rejected
    found = {(r["benchmark"], r["shape"]["clips"], r["shape"].get("resolutions")) for r in results.rows}
    assert found == {("stem sweep", 2, None), ("stem resolutions", 1, "16"), ("stem resolutions", 1, "4,8")}
    table = tables.sweep_table(results.as_dict(CPU))
    assert [row[1:3] for row in table.rows[::2]] == [["tiny's", "2"], ["16", "1"], ["4,8", "1"]]
    assert tables.headline_table(results.as_dict(CPU)).rows == []


def test_the_front_page_shows_the_largest_batch_of_each_comparison(tmp_path):
    results = Results()
    for clips, times in ((4, (10.0, 8.0, 5.0)), (48, (100.0, 20.0, 7.0))):
        key = Key(benchmark="stem", mode="forward", dtype="bf16", shape={**BASE, "clips": clips})
        found = dict(zip(("dense", "visible", "triton"), ([ms] * 3 for ms in times), strict=True))
        for name, ms in found.items():
            results.add(key, name, ms, Parity(0.0, 1.0), peak_MiB=512.0)
        for name in ("visible", "triton"):
            results.compare(key, "dense", name, found, dict.fromkeys(found))
    data = results.as_dict(CPU)
    (row,) = tables.headline_table(data).rows
    assert row == ["stem, forward, base, bf16, clips: 48", "100", "20", "7", "14.3x", "0.50 to 0.50"]
    plots.plot_headline([data], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.parametrize("resolutions", stem.RESOLUTIONS)
def test_every_resolution_set_has_its_width(resolutions):
    shape = {**BASE, "resolutions": resolutions}
    model = stem.sizes(shape)
    with torch.device("meta"):
        module = stem.build_stem(shape, "visible")
    assert module.resolutions == model.resolutions
    assert len(model.channels) == len(model.resolutions) - 1
    assert all(c % 16 == 0 for c in stem.sizes({**shape, "preset": "tiny"}).channels)


def test_multiply_adds_of_the_kernels_add_up_to_the_stem():
    listed = list(kernels.kernels(BASE, torch.device("meta"), torch.bfloat16))
    assert len({k.name for k in listed}) == len(listed)
    work = [k.work() for k in listed]
    forward = sum(k.forward * macs for k, (_, macs) in zip(listed, work, strict=True))
    backward = sum(k.backward * macs for k, (_, macs) in zip(listed, work, strict=True))
    assert forward == pytest.approx(stem.count(BASE, "visible", "forward"), rel=0.001)
    # Without what the backward computes again: fc1, the depthwise convolution and the pixels' embedding.
    plain = stem.count(BASE, "visible", "forward+backward") - forward
    assert plain < backward < 1.25 * plain
    by_name = dict(zip((k.name for k in listed), work, strict=True))
    R, c = 4 * 102 * 16, 256
    assert by_name["norm_linear c=256"] == (2 * R * c * 2 + (c * c) * 2 + 3 * c * 4, R * c * c)
    assert by_name["fc1, 256 to 1024: again"][1] == 4 * R * c * c
    # Four tensors of the hidden layer, and the sum of one's rows, which PyTorch's operations give in their precision.
    assert by_name["gelu_backward h=1024"] == (2 * 4 * R * 4 * c + 2 * 4 * c, 0)


def test_kernels_give_what_pytorchs_operations_give():
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tried = set()
    for kernel in kernels.kernels(TINY, device, torch.bfloat16):
        names = kernel.providers()
        tried |= set(names)
        if len(names) == 1:
            continue
        exact = kernels.reference(kernel)
        errors = {n: distance(kernels.KernelProvider(kernel, n, DTYPES["bf16"]).check(), exact) for n in names}
        assert all(error <= FLOOR["bf16"] for error in errors.values()), (kernel.name, errors)
    assert tried == set(kernels.PROVIDERS)


def test_kernels_on_a_cpu_are_pytorchs_operations():
    results = kernels.run(settings(ceilings={"copy_GBps": 10.0, "matmul_fp32_TFLOPS": 0.1}), only="norm_linear")
    assert not results.rejected
    assert [(r["mode"], r["provider"]) for r in results.rows] == [
        ("norm_linear c=48", "pytorch"), ("norm_linear c=96", "pytorch"),
    ]  # fmt: skip
    for row in results.rows:
        assert row["floor_ms"] == pytest.approx(max(row["bytes"] / 1e7, 2 * row["multiply_adds"] / 1e8))
    assert "interpreter" in results.notes[0]


@pytest.mark.gpu
@pytest.mark.alone
def test_kernels_on_a_gpu():
    results = kernels.run(settings(device=torch.device("cuda"), dtypes=["bf16", "fp32"], min_rounds=1))
    assert not results.rejected
    assert {r["provider"] for r in results.rows} == set(kernels.PROVIDERS)


def made_up(benchmark, mode, clips, provider, milliseconds, **shape):
    key = Key(benchmark=benchmark, mode=mode, dtype="bf16", shape={**BASE, "clips": clips, **shape})
    work = {"bytes": 2_000_000, "multiply_adds": 3_000_000_000, "floor_ms": milliseconds / 4}
    return key, provider, [milliseconds] * 3, Parity(0.0, 1.0), work


def add_made_up(results, *arguments, **shape):
    key, provider, times, parity, work = made_up(*arguments, **shape)
    results.add(key, provider, times, parity, peak_MiB=10.0, work=work)


def test_goals_on_an_h200():
    results = Results()
    assert len(stem.missed_on_h200(results)) == 3
    add_made_up(results, "stem", "forward+backward", 96, "triton", 23.0)
    add_made_up(results, "stem", "forward+backward", 96, "dense compiled", 130.0)
    add_made_up(results, "stem", "dense forward", 96, "triton", 9.0, masks=0)
    assert stem.missed_on_h200(results) == []
    # Where the compiled dense stem has no memory for the batch, both are compared at a smaller one.
    results.rows[1]["shape"]["clips"] = 48
    assert stem.missed_on_h200(results) == [
        "stem forward+backward, bf16, triton against dense compiled: 0.00x, goal 5.0x"
    ]
    add_made_up(results, "stem", "forward+backward", 48, "triton", 12.0)
    assert stem.missed_on_h200(results) == []
    results.rows[2]["median_ms"] = 10.5
    assert stem.missed_on_h200(results) == ["stem dense forward, triton, bf16, 96 clips: 10.5 ms, goal 10 ms"]


def test_tables_and_plots_of_kernels_and_batches(tmp_path):
    pytest.importorskip("matplotlib")
    results = Results()
    for provider, milliseconds in (("pytorch", 3.0), ("triton", 2.0), ("triton, cublas", 1.0)):
        add_made_up(results, "kernels", "norm_linear c=256", 96, provider, milliseconds)
    add_made_up(results, "kernels", "side 0, 4096 to 768", 96, "pytorch", 5.0)
    for clips in (1, 4):
        add_made_up(results, "stem sweep", "forward", clips, "triton", float(clips))
    add_made_up(results, "stem", "forward", 96, "triton", 50.0)
    add_made_up(results, "stem", "dense forward", 96, "triton", 50.0, masks=0)
    data = results.as_dict(CPU)
    first, second = tables.kernels_table(data).rows
    assert first == ["norm_linear c=256", "bf16", "2", "6", "0.5", "2", "25 %", "1", "3", "triton, cublas", "10", "10"]
    assert second[5:] == ["", "25 %", "", "5", "", "", "10"]
    results.rows = [r for r in results.rows if r["provider"] == "pytorch"]
    without = tables.kernels_table(results.as_dict(CPU))
    assert without.header[4:] == ["floor, ms", "of floor", "pytorch, ms", "pytorch, MiB"]
    assert {path.name for path in plots.plot(data, tmp_path)} == {"stem.png", "stem-sweep.png", "kernels.png"}
    assert [r["shape"]["clips"] for r in plots._swept(data)] == [1, 4, 96]
    assert {r["mode"] for r in plots._compared(data["rows"][:4])} == {"norm_linear c=256"}


# ---------------------------------------------------------------- prediction


def test_programs_that_a_multiprocessor_holds():
    a = predicted_stem.Assumptions()

    def held(warps, registers, shared_kib):
        return predicted_stem.resident(
            predicted_stem.Resources("stem", "k", 90, warps, registers, shared_kib << 10, 0), a
        )

    assert held(8, 200, 20) == 1  # registers
    assert held(8, 128, 20) == 2
    assert held(8, 122, 20) == 2  # given out by eights
    assert held(4, 32, 100) == 2  # shared memory
    assert held(8, 32, 0) == 8  # warps


def test_prediction_takes_the_slowest_and_adds_up_a_lone_programs_work():
    pytest.importorskip("triton")
    a = predicted_stem.Assumptions(launch_us=0.0)
    listed = {k.name: k for k in predicted_stem.stem(4)}
    kernel = listed["norm_mlp_residual c=256"]
    sizes = {"c": 256, "h": 1024, "KEEP": False, "BLOCK_R": 128, "BLOCK_H": 32}

    def predicted(registers):
        resources = predicted_stem.Resources("stem", kernel.name, 90, 8, registers, 20 << 10, 0)
        return predicted_stem.predict(kernel, {kernel.name: (resources, sizes)}, a)

    alone, two = predicted(250), predicted(128)
    assert alone.bound == "products + instructions"
    assert alone.ms == pytest.approx(two.needs["products"] + two.needs["instructions"])
    assert two.ms == max(two.needs.values()) >= two.floor_ms
    assert two.floor_ms == pytest.approx(2 * 8 * 256**2 * 96 * 4 * 102 * 16 / 790e9)
    library = predicted_stem.predict(listed["side 0, 4096 to 768"], {}, a)
    assert library.resident is None
    assert library.ms == pytest.approx(library.floor_ms / a.library_share)
    for table in (predicted_stem.kernel_table([alone, library]), predicted_stem.pass_table([alone], [library])):
        assert table.title.startswith("PREDICTION, not measured")


def test_every_predicted_kernel_is_compiled_ahead():
    pytest.importorskip("triton")

    modules = [importlib.import_module(m) for m in ahead.modules() if m.startswith("cat_kernels.stem.")]
    listed = {a.name for module in modules for a in module.ahead("bf16", predicted_stem.ARCHITECTURE)}
    assert predicted_stem.compiled_names(predicted_stem.stem(4)) <= listed
    assert predicted_stem.compiled_names(predicted_stem.stem(0)) <= listed


def test_predictions_stay_out_of_result_files():
    """But for the fields beside what was measured."""
    for path in report.RESULTS.glob("*.json"):
        assert "predict" not in path.read_text().lower().replace('"predicted_', "").replace("predicted for an h200", "")
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    shown = readme.split("<!-- predict:begin -->")[1].split("<!-- predict:end -->")[0]
    titles = [line for line in shown.splitlines() if line.startswith("**")]
    assert titles
    assert all(title.startswith("**PREDICTION, not measured") for title in titles)


# ---------------------------------------------------------------- sanitizers


def test_sanitized_calls_are_calls_that_work():
    calls = list(sanitize.calls())
    assert len(calls) >= 10
    for wave, options in calls:
        assert cat_kernels.fbank(wave, backend="torch", **options).isfinite().all()


@pytest.mark.parametrize(
    ("code", "printed", "clean"),
    [
        (0, "14 calls\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True),
        (0, "14 calls\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", False),
        (9, "14 calls\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n", False),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", False),  # no call was made
        (0, "14 calls\n", False),
    ],
)
def test_verdict_on_hazards(code, printed, clean):
    assert sanitize.verdict("racecheck", code, printed, {"fbank"})[0] is clean


def report_of(kernel):
    return (
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        f"=========     at {kernel}+0x1f0\n=========     by thread (0,0,0) in block (0,0,0)\n"
    )


@pytest.mark.parametrize(
    ("code", "printed", "told"),
    [
        (0, "14 calls\n========= ERROR SUMMARY: 0 errors\n", "0 errors of our kernels, 0 of others, in 14 calls"),
        (
            0,
            report_of("void cublas_split") + "3 calls\n========= ERROR SUMMARY: 1 error\n",
            "0 errors.*1 of others, in 3 calls",
        ),
        (0, report_of("_embed") + "3 calls\n========= ERROR SUMMARY: 1 error\n", "1 errors.*first: Uninit.*at _embed"),
        (1, "========= ERROR SUMMARY: 0 errors\n", "exit code 1, 0 errors"),  # a wrong result, or a crash
        (0, "========= ERROR SUMMARY: 0 errors\n", "exit code 0, 0 errors"),  # not one call was made
        (0, "14 calls\n", "without a summary"),
    ],
)
def test_verdict_on_memory_is_about_our_kernels(code, printed, told):
    clean, found = sanitize.verdict("initcheck", code, printed, {"_embed", "fbank"})
    assert re.search(told, found)
    assert clean is told.endswith(" calls")


def test_the_sanitizer_knows_our_kernels():
    pytest.importorskip("triton")
    assert {"fbank", "_embed", "_average", "_restore"} <= sanitize.our_names()


def test_sanitizer_of_the_toolkit_is_found(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find() == str(tool)


# ---------------------------------------------------------------- reports


def measured(directory: Path, name: str, date: str, gpu: str | None, milliseconds: float) -> None:
    results = Results()
    for provider, factor in (("dense", 5.0), ("visible", 1.0)):
        results.add(KEY, provider, [factor * milliseconds] * 3, Parity(0.0, 1.0), peak_MiB=512.0)
    results.compare(KEY, "dense", "visible", {"dense": [5.0], "visible": [1.0]}, {})
    data = results.as_dict(CPU) | {"date": date, "commit": "abc"}
    data["machine"]["gpu"] = gpu
    (directory / name).write_text(json.dumps(data))


def test_report_takes_every_machines_newest_file(tmp_path):
    measured(tmp_path, "z.json", "2030-01-01T00:00:00Z", None, 11.0)
    measured(tmp_path, "a.json", "2030-01-02T00:00:00Z", None, 22.0)
    measured(tmp_path, "g.json", "2029-01-01T00:00:00Z", "Some GPU", 3.0)
    document = "before\n<!-- benchmark:begin stem -->\nold\n<!-- benchmark:end -->\nafter\n"
    made = report.filled(document, report.newest(tmp_path))
    assert made.startswith("before\n<!-- benchmark:begin stem -->\n**Stem**\n")
    assert made.endswith("<!-- benchmark:end -->\nafter\n")
    assert "old" not in made
    assert "| visible | forward | fp32 | 2 | 22 | 22 to 22 | 5.00x dense | 0.50 |" in made
    assert "| 11 |" not in made
    assert made.index("Some GPU") < made.index("2030-01-02")
    assert report.filled(made, report.newest(tmp_path)) == made


def test_a_part_that_was_measured_later_leaves_the_other_tables(tmp_path):
    measured(tmp_path, "all.json", "2030-01-01T00:00:00Z", None, 11.0)
    measured(tmp_path, "part.json", "2030-01-02T00:00:00Z", None, 22.0)
    part = json.loads((tmp_path / "part.json").read_text())
    part["rows"], part["comparisons"] = [], []
    (tmp_path / "part.json").write_text(json.dumps(part))
    assert "| 11 |" in report.section("stem", report.newest(tmp_path))


def test_report_takes_the_table_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RECORDS", tmp_path)
    machine = {"gpu": None, "cpu": "An abacus", "threads": 2, "driver": None}
    made = {"machine": machine, "versions": {"torch": "2.13.0", "triton": None}, "date": "2026-11-26T", "commit": "abc"}
    scores = {"a": dict.fromkeys(("linear mean", "linear cls", "knn mean", "knn cls"), 0.5)}
    record = {
        **{"format": 1, "experiment": "cost", "tasks": {"a": {"test": 9}}, "guides": {}, "bounds": {}, "made": made},
        **{
            "arms": {"cost 5": {"runs": [{"rows": [{"seconds": 90.0, "test": scores}]}]}},
            "seconds": {"training": 7200.0},
        },
    }
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost" / "record.json").write_text(json.dumps(record))
    found = report.filled("<!-- benchmark:begin record cost -->\n<!-- benchmark:end -->", [])
    assert "| a | cost 5 | 50.0 | 50.0 | 50.0 | 50.0 | 90 |\n" in found
    assert "2.0 h of training in 1 runs.\n\nAn abacus, 2 threads, torch 2.13.0, 2026-11-26, commit abc.\n" in found
    with pytest.raises(ValueError, match="none holds no record"):
        report.filled("<!-- benchmark:begin record none -->\n<!-- benchmark:end -->", [])


def test_report_names_an_unknown_table():
    with pytest.raises(ValueError, match="unknown table; expected one of headline, stem, step"):
        report.filled("<!-- benchmark:begin speed -->\n<!-- benchmark:end -->", [])


def test_documented_tables_are_those_of_the_result_files():
    results = report.newest()
    stale = [path for path in report.documents() if report.filled(path.read_text(), results) != path.read_text()]
    assert not stale, "run python -m benchmarks.report"


def test_downstream_reads_what_was_done_and_says_mean_and_deviation(tmp_path, monkeypatch):
    """Of a folder with splits, and of a manifest with folds; what is there is not run again."""
    pytest.importorskip("soundfile")
    from benchmarks import downstream
    from cat.data import load_manifest

    clips = [{"path": f"{number}.wav", "labels": ["ab"[number % 2]], "fold": 1 + number // 20} for number in range(40)]
    header = '{"format": "cat-audio manifest", "version": 1}'
    (tmp_path / "folds.jsonl").write_text("\n".join([header, *map(json.dumps, clips)]) + "\n")
    (tmp_path / "words").mkdir()
    tasks = [downstream.Task("words", tmp_path / "words"), downstream.Task("bells", tmp_path / "folds.jsonl")]
    assert (tasks[0].folds, tasks[1].folds) == ([], [1, 2])
    folder = tmp_path / "runs"
    for seed in (0, 1):
        done = {
            f"pool-{seed}/done.json": {},
            f"words-{seed}-scratch/scores.json": {"test": {"accuracy": 0.2 + 0.1 * seed}},
            f"words-{seed}-tuned/scores.json": {"test": {"accuracy": 0.5}},
            **{f"bells-{seed}-{kind}/scores.json": {"runs": [{"test": {"accuracy": a}} for a in (0.4, 0.6)]}
               for kind in ("scratch", "tuned")},
            **{f"probes/{name}.json": {"rows": [
                {"features": "trained", "scores": {"linear": 0.75}},
                {"features": "log-mel mean + std", "scores": {"linear": 0.25}},
            ]} for name in (f"words-{seed}", f"bells-{seed}-fold1", f"bells-{seed}-fold2")},
        }  # fmt: skip
        for name, content in done.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr(downstream.subprocess, "run", lambda *a, **k: pytest.fail(f"was run: {a}"))
    runs = downstream.Runs(folder, [])
    found = {task.name: {"accuracy": downstream.measure(task, tmp_path, [0, 1], runs)} for task in tasks}
    rows = {row[0]: row[1:] for row in downstream.table({"tasks": found}).rows}
    assert rows["from scratch"] == ["25.0 ± 7.1", "50.0 ± 0.0"]
    assert rows["fine-tuned"] == ["50.0 ± 0.0", "50.0 ± 0.0"]
    assert rows["linear probe"] == ["75.0 ± 0.0", "75.0 ± 0.0"]
    assert rows["log-mel"] == ["25.0 ± 0.0", "25.0 ± 0.0"]
    splits = dict(tasks[1].splits(folder, 0))
    names = {split: {clip.path.rpartition("/")[2] for clip in load_manifest(path).clips}
             for split, path in splits["-fold1"].items()}  # fmt: skip
    assert names["test"] == {f"{number}.wav" for number in range(20)}
    assert names["train"] | names["valid"] == {f"{number}.wav" for number in range(20, 40)}
    assert not names["train"] & names["valid"]


# ---------------------------------------------------------------- loader


def test_the_loader_reads_the_same_samples_from_files_and_shards(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    from benchmarks import loader

    monkeypatch.setattr(loader, "HANDED", 2)
    monkeypatch.setenv("CAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    found = Results()
    loader.measure("WAV, 16 kHz", 2, 1, tmp_path / "data", None, found)
    assert [row["provider"] for row in found.rows] == ["files", "shards", "files, worker"]
    assert not found.rejected
    assert all(row["parity_error"] == 0 and row["bytes_a_clip"] == 320_044 for row in found.rows)
    table = tables.loader_table({"rows": found.rows})
    assert [row[:3] for row in table.rows] == [["WAV, 16 kHz", row["provider"], "320"] for row in found.rows]
    assert 100 < loader.demand() < 10_000


# ---------------------------------------------------------------- training in several processes


def test_training_in_one_process_and_in_two_is_measured(tmp_path, monkeypatch):
    """What torchrun would start, in this process: the same run whatever the processes, so that its losses agree."""
    pytest.importorskip("soundfile")
    pytest.importorskip("yaml")

    def start(case, argv, said, *, every_other=False):
        said.mkdir()
        settings = {"argv": [*argv, "data.batch_size=2"], "said": said, "every_other": every_other, "began": 0.0}
        assert scaling.child(settings) == 0
        return [json.loads(path.read_text()) for path in said.iterdir()]

    monkeypatch.setattr(scaling, "start", start)
    monkeypatch.setattr("cat.training.step.gathering", gathering)  # which the child changes
    s = settings(clips=2, frames=32, min_rounds=1)
    wanted = [*scaling.cases(s, [1, 2]), scaling.Case(1, 1, "shards", 2, 0)]
    monkeypatch.setattr(scaling, "cases", lambda *args: wanted)
    found = scaling.run(s, [1, 2], 4)
    assert [row["provider"] for row in found.rows] == ["1 process", "2 processes", "1 process, 2 threads", "1 process"]
    assert not found.rejected
    for row in found.rows:
        assert row["rounds"] == 2  # of 4 updates
        assert row["parity_error"] < 1e-4
        assert 0 <= row["data_wait"] < 1
        assert row["start_s"] > 1
    assert "exchange_share" in found.rows[1]
    table = tables.scaling_table({"rows": found.rows})
    assert [row[:5] for row in table.rows] == [
        [row["provider"], row["mode"], "tiny", "fp32", "2"] for row in found.rows
    ]
    assert "of matrix rate" not in table.header
    assert table.rows[0][table.header.index("of one process")] == "1.00x"


def test_losses_that_differ_or_are_none_give_no_row():
    cpu, gpu = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    one = scaling.Found(losses=[1.0, 2.0])
    assert scaling.parity(cpu, scaling.Found(losses=[1.0, 2.001]), one).passed
    assert not scaling.parity(cpu, scaling.Found(losses=[1.0, 2.01]), one).passed
    assert scaling.parity(gpu, scaling.Found(losses=[1.0, 3.0]), one).passed
    assert not scaling.parity(gpu, scaling.Found(losses=[1.0, None]), one).passed
    assert not scaling.parity(gpu, scaling.Found(losses=[1.0], failed=1), one).passed


def test_every_gpu_has_a_batch_and_every_process_its_workers(monkeypatch):
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda pid: range(16))
    s = SimpleNamespace(device=torch.device("cuda"), clips=96)
    found = [(case.name, case.reads, case.clips, case.workers) for case in scaling.cases(s, [1, 4])]
    assert found == [
        ("1 process", "files", 96, 12), ("1 process", "shards", 96, 12),
        ("4 processes", "files", 384, 4), ("4 processes", "shards", 384, 4),
    ]  # fmt: skip


def test_where_no_audio_can_be_read_the_suite_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "NEEDED", ("json", "no_such_soundfile"))
    monkeypatch.setattr(scaling.sys, "argv", ["scaling", "--device", "cpu"])
    assert scaling.main() == pieces.SKIPPED
    assert capsys.readouterr().out.startswith("not run: no_such_soundfile not installed here")


# ---------------------------------------------------------------- the start on a manifest


def test_a_start_on_a_manifest_is_measured_with_its_data_workers(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, expected = entries.write(tmp_path, 300)
    found = entries.child(str(path), "fine-tuning")
    assert found["fingerprint"] == expected
    assert len(found["clips"]) == 48
    assert 1 < found["worker_MiB"] < found["peak_MiB"]
    results = Results()
    key = Key(benchmark="entries", mode="fine-tuning", dtype="fp32", shape={"clips": 300})
    parts = {name: found[name] for name in ("import_s", "read_s", "rest_s", "worker_MiB")}
    results.add(key, "first", [2000.0], Parity(0.0, 0.0), peak_MiB=100.0, work=parts)
    (row,) = tables.entries_table(results.as_dict(CPU)).rows
    assert (row[0], row[1], row[5], row[6]) == ("fine-tuning, first", "300", "2.0", "100")
