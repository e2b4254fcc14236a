"""What a plan says of a run, from a step that is traced without data, and whether it would start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
pytest.importorskip("yaml")

from cat.commands import main
from cat.config import ConfigError, from_mapping
from cat.data.masks import inverse_block_masks
from cat.data.share import share_out
from cat.model import CAT
from cat.parts import part
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.plan import estimate, planning
from cat.training.plan import traced as traced_module
from cat.training.plan.estimate import Case
from cat.training.plan.hardware import GPUS, Machines, read_machines
from cat.training.plan.reading import Reading, read_some
from cat.training.plan.traced import Traced, TraceError, trace
from cat.training.plan.watch import Watch
from cat.training.recipe import PretrainConfig
from tests.lookalikes import folder_of_folders

ROOT = Path(__file__).parents[3]
MODEL = {"channels": [16, 16], "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_dim": 32, "decoder_layers": 1}
SMALL = {
    "data": {"batch_size": 4},
    "model": {**MODEL, "decoder_groups": 2},
    "masks": {"num_masks": 2},
    "features": {"frames": 64},
    "run": {"name": "small"},
}
GIB = 2**30


def config(**sections) -> PretrainConfig:
    """A small recipe with changes to its sections."""
    merged = {**SMALL, **{name: {**SMALL.get(name, {}), **values} for name, values in sections.items()}}
    return from_mapping(PretrainConfig, merged, source="a test")


# Of a made-up step, in round numbers.
STEP = Traced(
    trained=1_000_000,
    weights=10_000_000,
    checkpoint=8_000_000,
    peak=40 * GIB,
    at_peak={"blocks": 40 * GIB},
    flops={"forward": 6_000_000_000_000, "backward": 4_000_000_000_000},
    moved=30_000_000_000,
    operations=1000,
    gradients=4_000_000,
)


def case(update: int, machines: Machines, *, most: int = 4, traced: Traced = STEP, **changes) -> Case:
    share = share_out(update, most, processes=machines.processes)
    return Case(config(data={"batch_size": most, "num_workers": 3}), machines, share, traced, "bf16", **changes)


# ---------------------------------------------------------------- what it is told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpus=8", Machines(8)),
        ("gpus=8, nodes=2,gpu=H200,net=50", Machines(8, 2, "h200", net=50.0)),
        ("gpu=l4,step_ms=12.5,cores=32", Machines(gpu="l4", step_ms=12.5, cores=32)),
        ("", Machines()),
    ],
)
def test_machines_are_read(text: str, expected: Machines) -> None:
    assert read_machines(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8", "'8'; expected KEY=VALUE of gpus, nodes"),
        ("gpu=8", "gpu=8; expected one of b200, h200"),
        ("gups=8", "did you mean gpus?"),
        ("gpus=two", "gpus=two; expected a whole number"),
        ("gpus=0", "gpus=0; expected 1 or more"),
        ("gpus=8,gpus=4", "gpus is given twice"),
        ("gpu=l4,link=nvlink", "which has none; expected link=pcie"),
        ("net=nan", "net=nan; expected GB/s"),
        ("net=0", "net=0.0; expected GB/s"),
        ("link=rope", "expected one of nvlink, pcie"),
        ("step_ms=-1", "step_ms=-1.0; expected 0"),
    ],
)
def test_machines_that_cannot_be_are_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^--plan {text}: ") as caught:
        read_machines(text)
    assert said in str(caught.value)


# ---------------------------------------------------------------- the traced step


def test_memory_flops_and_bytes_of_a_step_are_counted() -> None:
    """Two products of float32: 64 and 32 rows-to-columns, the first result kept for the backward."""
    first, second = nn.Linear(256, 512, bias=False), nn.Linear(512, 128, bias=False)
    x, watch = torch.randn(1024, 256), Watch()
    with watch.watching():
        with part("forward"):
            hidden = first(x)
            result = second(hidden)
        del hidden
        kept = watch._live
        with part("backward"):
            result.backward(torch.ones_like(result))
    assert kept == 4 * (1024 * 512 + 1024 * 128)
    products = 2 * 1024 * (256 * 512 + 512 * 128)
    assert watch.flops["forward"] == products
    assert watch.flops["backward"] == products + 2 * 1024 * 512 * 128  # nothing learns from x
    # The worst moment: what is kept, the gradient that begins it, that of hidden, and one of a weight.
    assert watch.peak_bytes >= kept + 4 * (1024 * 512 + 1024 * 128)
    assert watch.bytes >= 4 * (1024 * 256 + 256 * 512 + 1024 * 512)


@pytest.fixture(scope="module")
def traced() -> Traced:
    """As `trace` finds it, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cat_kernels.backends.INTERPRETED", True)
        return traced_module._as_on_a_gpu(config(), 2, processes=2, precision="bf16", dims={})


def test_a_step_is_traced_in_two_processes_that_are_not_there(traced: Traced) -> None:
    asked = config()
    model = CAT(asked.model, asked.objective)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert traced.trained == trained
    assert traced.gradients == 4 * trained  # in float32, once
    assert traced.checkpoint == sum(4 * t.numel() for t in model.state_dict().values() if t.dtype == torch.float32)
    assert traced.weights > 4 * sum(p.numel() for p in model.parameters())  # and the teacher's copy in bf16
    assert traced.peak == sum(traced.at_peak.values()) > 0
    assert {"teacher", "stem", "blocks", "decoder", "backward"} <= set(traced.flops)


def test_the_traced_products_are_those_of_the_formulas_in_pytorch(traced: Traced) -> None:
    """Of the same step on real numbers, by PyTorch's operations: the kernels' formulas are not their own judge."""
    asked = config(model={"kernels": "reference"})
    model, watch = CAT(asked.model, asked.objective).train(), Watch()
    clips = torch.arange(2)
    visible = inverse_block_masks(asked.masks, asked.grid, seed=0, step=0, clips=clips)
    rng = torch.zeros(2, dtype=torch.int64)
    with watch.watching():
        loss = model(torch.randn(2, 1, 64, 128), visible, rng=rng).loss
        with part("backward"):
            loss.backward()
    for name in ("teacher", "blocks", "decoder"):
        assert traced.flops[name] == pytest.approx(watch.flops[name], rel=0.01), name
    assert sum(traced.flops.values()) == pytest.approx(
        sum(watch.flops.values()), rel=0.07
    )  # the fused stem makes fc1 again


def test_widths_that_the_kernels_do_not_take_are_traced_with_few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what grows with the clips is as much as of all of them, by kernels that take their widths."""
    asked = config(model={"kernels": "triton"})
    monkeypatch.setattr("cat_kernels.backends.INTERPRETED", True)
    exact = traced_module._as_on_a_gpu(asked, 8, processes=1, precision="fp32", dims={})
    monkeypatch.setattr(traced_module, "_is_fused", lambda _: False)
    found = traced_module._as_on_a_gpu(asked, 8, processes=1, precision="fp32", dims={})
    assert sum(found.flops.values()) == pytest.approx(sum(exact.flops.values()), rel=0.07)  # the same
    assert exact.peak < found.peak < 4 * exact.peak  # PyTorch's operations keep more
    assert (found.trained, found.checkpoint) == (exact.trained, exact.checkpoint)
    monkeypatch.undo()
    assert traced_module._is_fused(asked.model)
    assert not traced_module._is_fused(config(model={"channels": [8, 16]}).model)


def test_a_step_that_cannot_be_traced_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat.training.plan.traced.sys.executable", "/bin/false")
    with pytest.raises(TraceError, match="could not be traced: exit code 1"):
        trace(config(), clips=2, processes=1, precision="fp32", dims={})


# ---------------------------------------------------------------- the arithmetic


def test_memory_adds_up() -> None:
    found = estimate.memory(case(32, Machines(8)))
    assert found["weights"] == 10_000_000
    assert (found["AdamW"], found["gradients"]) == (8_000_000, 4_000_000)
    inputs = 2 * 4 * (2 * SMALL_SAMPLES + 4 * 64 * 128)
    assert found["inputs"] == inputs
    alive = 22_000_000 + 40 * GIB + inputs
    assert found["in all"] == int(1.08 * alive) + int(1.5 * GIB)


SMALL_SAMPLES = config().features.samples


def test_the_largest_batch_that_fits_is_one_that_fits() -> None:
    asked = case(32, Machines(8))
    most = estimate.most_clips(asked)
    assert most == 7  # 10 GiB a clip, 79.6 GiB less 1.5 and 8 %

    def needed(clips: int) -> float:
        grown = dataclasses.replace(STEP, peak=clips * 10 * GIB)
        return estimate.memory(case(8 * clips, Machines(8), most=clips, traced=grown))["in all"]

    assert needed(most) <= 79.6 * GIB < needed(most + 1)


def test_time_adds_up() -> None:
    """On an H100: 1.25 x (10 TFLOP / 791 + 30 GB / 3.015 TB/s); AdamW 58 MB; 4 MB of gradients round 8 GPUs."""
    asked = case(64, Machines(8), begun=40, clips=640, valid=800)
    found, told = estimate.times(asked), estimate.time(asked)
    assert found.piece == pytest.approx(1.25 * (10e12 / (0.8 * 989e12) + 30e9 / (0.9 * 3.35e12)))
    assert found.sent == pytest.approx(2 * 7 / 8 * 4e6 / 340e9)
    assert found.backward == pytest.approx(0.4 * found.piece)
    assert found.exposed == found.sent  # all of it is one bucket, and that is the last
    step = 2 * found.piece + found.exposed + 58e6 / (0.9 * 3.35e12)
    assert told["an update"] == pytest.approx(1e3 * step)
    assert told["rate"] == pytest.approx(64 / step)
    steps = asked.config.optim.steps - 40
    assert told["training"] == pytest.approx(steps * step / 3600)
    assert estimate.batch(asked)["epochs"] == pytest.approx(steps * 64 / 640)
    evaluations = steps // asked.config.run.eval_every
    assert told["evaluations"] == pytest.approx(evaluations * 800 / 8 * 0.6 * found.piece / 4 / 3600)
    assert told["GPU hours"] == pytest.approx(8 * (told["training"] + told["evaluations"]))


def test_gradients_that_no_backward_hides_are_counted() -> None:
    heavy = dataclasses.replace(STEP, gradients=8 * 10**9)
    found = estimate.times(case(64, Machines(8, 2, net=10.0), traced=heavy))
    assert found.sent == pytest.approx(2 * 15 / 16 * 8e9 / 10e9)  # by the network, the slower one
    assert found.exposed == pytest.approx(found.sent - found.backward)
    assert estimate.times(case(4, Machines(1), traced=heavy)).exposed == 0


def test_a_step_that_was_measured_replaces_the_estimate() -> None:
    found = estimate.times(case(64, Machines(8, step_ms=500.0)))
    assert (found.piece, found.update, found.measured) == (0.5, 0.0, True)
    lines = {line.name: line for line in estimate.time(case(64, Machines(8, step_ms=500.0))).lines}
    assert not lines["training"].guess
    assert lines["a piece"].how == "step_ms, as measured"


def test_a_step_is_not_shorter_than_its_operations() -> None:
    little = dataclasses.replace(STEP, flops={"backward": 1}, moved=1)
    assert estimate.times(case(4, Machines(1), traced=little)).piece == pytest.approx(1000 * 8e-6)


def test_loader_and_disk_add_up() -> None:
    reading = Reading(seconds=0.01, bytes=200_000, told="")
    asked = case(64, Machines(4, 2, step_ms=500.0), reading=reading)
    rate = 64 / estimate.times(asked).step(2) / 2
    found = estimate.loader(asked)
    assert found["cores"] == pytest.approx(rate * 0.01)
    assert found["read"] == pytest.approx(rate * 0.2)
    assert found["workers"] == 12
    assert found["waiting batches"] == 12 * 4 * 4 * 2 * SMALL_SAMPLES
    disk = estimate.disk(asked, free=None)
    assert disk["a checkpoint"] == 16_000_000
    assert disk["checkpoints"] == 4 * 16_000_000  # two newest, a best, and one that is being written
    run = dataclasses.replace(asked.config.run, keep_every=10_000)
    asked = dataclasses.replace(asked, config=dataclasses.replace(asked.config, run=run))
    assert estimate.disk(asked, None)["checkpoints"] == (4 + asked.config.optim.steps // 10_000) * 16_000_000
    assert disk["written"] == asked.config.optim.steps // 5000 * 16_000_000


# ---------------------------------------------------------------- whether it would start


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, with sounds; the step is not traced."""
    monkeypatch.setattr(planning, "trace", lambda *_, **__: STEP)
    monkeypatch.chdir(tmp_path)
    folder_of_folders(tmp_path / "audio")
    return tmp_path


def plan(machines: str, run_dir: str = "runs/small", **sections):
    return planning.make_plan(config(**sections), read_machines(machines), run_dir)


def test_a_plan_reads_some_clips_and_writes_nothing(quick: Path) -> None:
    pytest.importorskip("soundfile")
    found = plan("gpus=1,cores=64", data={"train": "audio"})
    assert found.problems == ()
    lines = {line.name: line for line in found["loader of a node"].lines}
    assert not lines["a clip"].guess
    assert "7 clips of data.train read on this machine" in lines["a clip"].how
    assert found["batch"]["epochs"] == pytest.approx(config().optim.steps * 4 / 8)
    assert not (quick / "runs").exists()


def test_a_number_of_processes_that_does_not_fit_is_an_error_that_names_those_that_do(quick: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 clips of an update .* fit: 1, 2, 4\."):
        plan("gpus=3")


def test_what_would_stop_a_run_is_told(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("soundfile")
    (quick / "runs/small").mkdir(parents=True)
    (quick / "runs/small/notes.txt").write_text("mine")
    for path in (quick / "audio").rglob("*.wav"):
        path.write_bytes(b"RIFF")
    monkeypatch.setattr(planning, "free_space", lambda _: 1_000_000)
    found = plan(
        "gpus=2,gpu=a100-40",
        data={"train": "audio"},
        objective={"regularisation_weight": 1.0},
        run={"cuda_graph": True},
    )
    told = "\n".join(found.problems)
    for problem in (
        "is not a run directory (it holds 'notes.txt')",
        "audio names none; make them with cat-audio embed",
        "run.cuda_graph=true records a step of one process",
        "a100-40 has 39.6 GiB: data.batch_size=1 fits",
        "a checkpoint has 0.01 GiB, and 0.00 GiB are free",
        "none of the clips that were looked at can be read; the first:",
    ):
        assert problem in told
    assert len(found.problems) == 6
    assert told in found.text().replace("  - ", "")


def test_what_is_worth_a_look_is_told(quick: Path) -> None:
    odd = {"data": {"num_workers": 1}, "model": {"kernels": "dense"}, "run": {"parallel": "fsdp"}}
    notes = "\n".join(plan("gpus=4,step_ms=0.01,cores=2", **odd).notes)
    for note in (
        "a GPU computes 1 clips at once, of data.batch_size=4; data.global_batch=16 fills them",
        "cores of a node, of 2 (given): GPUs would wait for data",
        "4 data workers cannot feed the GPUs of a node; data.num_workers=",
        "data.train is not given",
        "model.kernels=dense takes more memory and time",
        "run.parallel=fsdp takes less memory and sends more",
    ):
        assert note in notes


def test_the_steps_that_are_left_are_planned(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.checkpoints, "newest", lambda _: quick)
    monkeypatch.setattr(planning.checkpoints, "read_state", lambda _: {"step": 40})
    asked = config()
    found = planning.make_plan(asked, Machines(), "runs/small", resume=True)
    assert found["batch"]["steps"] == asked.optim.steps - 40
    asked = config(run={"stop_at": 40})
    found = planning.make_plan(asked, Machines(), "runs/small", resume=True)
    assert found.problems == ("there is nothing left to train: step 40 of 40",)


def test_one_clip_that_cannot_be_read_is_only_worth_a_look(quick: Path) -> None:
    pytest.importorskip("soundfile")
    next((quick / "audio").rglob("*.wav")).write_bytes(b"RIFF")
    found = plan("gpus=1,cores=64", data={"train": "audio"})
    assert found.problems == ()
    assert any("1 of the clips that were looked at cannot be read" in note for note in found.notes)


def test_reading_on_the_cpu_counts_the_features(quick: Path) -> None:
    pytest.importorskip("soundfile")
    from cat.data import load_manifest

    manifest, features = load_manifest("audio"), config().features
    on_gpu = read_some(manifest, features, crop="random", on_gpu=True)
    found = read_some(manifest, features, crop="random", on_gpu=False)
    assert "log-mel" in found.told
    assert on_gpu.bytes == found.bytes == pytest.approx(18_044)  # 9,000 samples of 16 bits and a header


# ---------------------------------------------------------------- the command


def test_the_command_plans_a_pretraining(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "base.yaml")
    assert main(["pretrain", recipe, "data.global_batch=768", "--plan", "gpus=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"]["a GPU"] == {
        "value": 96, "unit": "clips", "how": "768 / 8 processes", "guess": False,
    }  # fmt: skip
    assert found["problems"] == []
    assert main(["pretrain", recipe, "--plan", "gpus=1,gpu=a100-40"]) == 1
    out = capsys.readouterr().out
    assert "what would stop it\n  - a GPU needs" in out
    assert "guess: 1.25 x (10.0 TFLOP / 250 a second + 30 GB / 1.40 TB/s)" in out
    assert main(["pretrain", recipe, "--plan", "gpus=1", "--profile"]) == 1


def test_the_command_plans_a_fine_tuning_traced_for_real(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    folder_of_folders(tmp_path / "audio")
    small = [f"model.{name}={json.dumps(value)}" for name, value in MODEL.items()]
    words = ["data.train=audio", "encoder=none", "features.frames=64", "data.batch_size=2", "data.num_workers=0"]
    recipe = str(ROOT / "recipes" / "finetune.yaml")
    assert main(["finetune", recipe, *words, *small, "--plan", "gpus=1,cores=64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory of a GPU"]["activations"]["value"] > 2 * 4 * 64 * 128
    assert "gradients" not in found["time"]  # that one process would send
    assert not (tmp_path / "runs").exists()
    assert main(["finetune", recipe, *words, *small, "--plan", "gpus=1", "--seeds", "2"]) == 1


def test_every_gpu_has_numbers_that_can_be() -> None:
    for name, gpu in GPUS.items():
        assert Machines(8, gpu=name).ring_GBps > 0
        assert 20 < gpu.memory_GiB < 300
        assert 0.2 < gpu.bandwidth_TBps < 10
        assert 50 < gpu.matrix_TFLOPS < 3000


def test_finetuning_is_planned_by_pairs(quick: Path) -> None:
    """Mixup mixes clips of a batch in pairs, which stay in one process."""
    mapping = {"data": {"train": "audio", "batch_size": 6}, "model": SMALL["model"], "features": {"frames": 64}}
    mapped = from_mapping(FinetuneConfig, {**mapping, "augment": {"mixup": 0.5}}, source="a test")
    with pytest.raises(ConfigError, match=r"in the pairs that augment\.mixup mixes"):
        planning.make_plan(mapped, Machines(2), "runs/small")
