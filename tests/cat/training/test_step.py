"""One update: what compiles it, records it or rounds its teacher changes rounding at most, and it waits for nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from cat.data.masks import MaskConfig, inverse_block_masks
from cat.model import CAT, ModelConfig, ObjectiveConfig, Regularisation
from cat.training import step
from cat.training.optim import OptimConfig, optimizer_tensors
from cat.training.step import PretrainStep
from cat_kernels import _checks

CPU = torch.device("cpu")
MODEL = ModelConfig(
    channels=(16, 16), embed_dim=32, depth=2, num_heads=2, decoder_dim=32, decoder_layers=1, decoder_groups=2
)
# For Triton's interpreter.
MINUTE = dataclasses.replace(MODEL, resolutions=(8, 16), channels=(16,), embed_dim=16, depth=1, decoder_dim=16)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, steps=100)


def build(config=MODEL, device=CPU, seed=0, **objective):
    torch.manual_seed(seed)
    objective = ObjectiveConfig(global_loss_reduction="mean", regularisation_weight=0.1, **objective)
    return CAT(config, objective, embedding_dim=5).to(device).train()


def batch(number, device=CPU, clips=2, frames=32):
    """spec, visible, embedding, rng: other ones for every number."""
    g = torch.Generator().manual_seed(number)
    masks = MaskConfig(num_masks=2)
    visible = inverse_block_masks(masks, (frames // 16, 8), seed=0, step=number, clips=torch.arange(clips))
    tensors = torch.randn(clips, 1, frames, 128, generator=g), visible, torch.randn(clips, 5, generator=g)
    return *(t.to(device) for t in tensors), torch.tensor([0, number << 32], device=device)


def run(update, steps=3, device=CPU):
    """Losses and gradient norm of every update, (steps, 7)."""
    decays = [min(0.9 + 0.01 * i, 0.999) for i in range(steps)]
    rows = [update(*batch(i, device), lr=1e-3 * (i + 1) / steps, decay=decays[i]).clone() for i in range(steps)]
    return torch.stack(rows).cpu()


# ---------------------------------------------------------------- numbers


def test_a_rounded_teacher_gives_what_autocast_gives(monkeypatch):
    lowered = PretrainStep(build(), OPTIM, precision="bf16")
    teacher = lowered.model.acting_teacher
    assert teacher.blocks[0].fc1.weight.dtype == teacher.stem.proj.weight.dtype == torch.bfloat16
    assert teacher.norm.weight is lowered.model.teacher.norm.weight
    assert {t.dtype for t in lowered.model.state_dict().values()} == {torch.float32}
    found = run(lowered)
    monkeypatch.setattr(CAT, "lower_teacher", lambda *_: None)
    plain = PretrainStep(build(), OPTIM, precision="bf16")
    assert torch.equal(found, run(plain))
    for name, average in plain.model.state_dict().items():
        assert torch.equal(average, lowered.model.state_dict()[name]), name


def test_loaded_weights_reach_the_rounded_teacher():
    update, other = PretrainStep(build(), OPTIM, precision="bf16"), build(seed=1)
    update.model.load_state_dict(other.state_dict())
    for own, low in zip(other.teacher.parameters(), update.model.acting_teacher.parameters(), strict=True):
        assert torch.equal(own.to(low.dtype), low)


@pytest.mark.parametrize(("compile", "backend"), [("blocks", "aot_eager"), ("step", "eager")])
def test_compiled_steps_agree(monkeypatch, compile, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(step, "COMPILER", counter)
    found = run(PretrainStep(build(), OPTIM, precision="bf16", compile=compile))
    # blocks: decoder, and stem and block of student and teacher; the second block compiles nothing
    assert counter.frame_count == {"blocks": 5, "step": 1}[compile]
    torch.testing.assert_close(found, run(PretrainStep(build(), OPTIM, precision="bf16")), rtol=1e-3, atol=1e-4)


def test_kernels_agree_over_some_steps():
    losses = {}
    for kernels in ("reference", "triton"):
        losses[kernels] = run(PretrainStep(build(dataclasses.replace(MINUTE, kernels=kernels)), OPTIM), steps=2)
    torch.testing.assert_close(losses["triton"], losses["reference"], rtol=1e-4, atol=1e-6)


def test_a_recorded_step_reads_only_what_it_is_given(monkeypatch):
    """With a graph that runs its function: new batches, rates and decays must reach it through tensors that stay."""
    recorded = []
    monkeypatch.setattr(step, "record", lambda function, device: recorded.append(device) or function)
    monkeypatch.setattr(step.Replay, "_side_stream", lambda self: contextlib.nullcontext())
    update = PretrainStep(build(), OPTIM, cuda_graph=True)
    state = [update._decay, *(group["lr"] for group in update.optimizer.param_groups)]
    found = run(update, steps=6)
    assert recorded == [CPU]
    assert all(isinstance(value, torch.Tensor) for value in state)
    now = [update._decay, *(group["lr"] for group in update.optimizer.param_groups)]
    assert all(value is old for value, old in zip(now, state, strict=True))
    torch.testing.assert_close(found, run(PretrainStep(build(), OPTIM), steps=6), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs the same shapes: use run"):
        update(*batch(0, clips=1), lr=1e-3, decay=0.9)


SCHEDULED = {"regularisation_schedule": "decay", "regularisation_steps": 100}


def run_scheduled(update, weights, device=CPU):
    kwargs = {"lr": 1e-3, "decay": 0.9}
    rows = [update(*batch(i, device), **kwargs, weights={"": w}).clone() for i, w in enumerate(weights)]
    return torch.stack(rows).cpu()


def test_a_scheduled_weight_counts_as_the_recipe_s_own():
    """To the last bit; and at 0 the term adds nothing."""
    found = run_scheduled(PretrainStep(build(**SCHEDULED), OPTIM), [0.1, 0.1, 0.0])
    update = PretrainStep(build(), OPTIM)
    own = torch.stack([update(*batch(i), lr=1e-3, decay=0.9).clone() for i in range(2)])
    assert torch.equal(found[:2], own)
    loss, regression, global_ = found[2, :3]
    assert loss == regression + global_
    assert found[2, 3] > 0
    with pytest.raises(ValueError, match="weights has no ''; expected the value"):
        PretrainStep(build(**SCHEDULED), OPTIM)(*batch(0), lr=1e-3, decay=0.9)


def test_a_recorded_or_compiled_step_follows_the_schedule(monkeypatch):
    """With a graph that runs its function and a compiler that counts: the weight is no number in either."""
    monkeypatch.setattr(step, "record", lambda function, device: function)
    monkeypatch.setattr(step.Replay, "_side_stream", lambda self: contextlib.nullcontext())
    weights = [0.1, 0.08, 0.06, 0.04, 0.02, 0.0]
    eager = run_scheduled(PretrainStep(build(**SCHEDULED), OPTIM), weights)
    recorded = PretrainStep(build(**SCHEDULED), OPTIM, cuda_graph=True)
    held = recorded._weights[""]
    torch.testing.assert_close(run_scheduled(recorded, weights), eager, rtol=1e-5, atol=1e-6)
    assert recorded._weights[""] is held
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(step, "COMPILER", counter)
    compiled = PretrainStep(build(**SCHEDULED), OPTIM, compile="step")
    torch.testing.assert_close(run_scheduled(compiled, weights), eager, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


def test_several_guides_reach_a_recorded_or_compiled_step(monkeypatch):
    """Rows and the weights that have a schedule, as tensors; the other weight is a number."""
    monkeypatch.setattr(step, "record", lambda function, device: function)
    monkeypatch.setattr(step.Replay, "_side_stream", lambda self: contextlib.nullcontext())
    guides = {"a": (Regularisation(2.0, layer=1, schedule="stop", steps=2), 3), "b": (Regularisation(distance="kl"), 7)}

    def run_guided(**options):
        torch.manual_seed(0)
        model = CAT(MODEL, ObjectiveConfig(global_loss_reduction="mean", **SCHEDULED), guides=guides).train()
        update, rows = PretrainStep(model, OPTIM, **options), []
        for i in range(6):
            spec, visible, _, rng = batch(i)
            told = {
                name: torch.randn(2, dim, generator=torch.Generator().manual_seed(i))
                for name, (_, dim) in guides.items()
            }
            lr = {"lr": 1e-3, "decay": 0.9}
            rows.append(update(spec, visible, None, rng, told, **lr, weights={"a": 2.0 * (i < 2)}).clone())
        return torch.stack(rows)

    eager = run_guided()
    loss, regression, global_, flat, _, _, first, second, _ = eager.T
    torch.testing.assert_close(loss, regression + global_ + 2 * (torch.arange(6) < 2) * first + second)
    assert not flat.any()
    assert first[2:].all()
    torch.testing.assert_close(run_guided(cuda_graph=True), eager, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(step, "COMPILER", counter)
    torch.testing.assert_close(run_guided(compile="step"), eager, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


# ---------------------------------------------------------------- waiting

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")


class NothingIsRead(TorchDispatchMode):
    """Raises on operations that wait for a GPU. float64 scalars are the host's own, as is a decay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        hosts = name == "_local_scalar_dense" and args[0].dtype == torch.float64 and args[0].device.type == "cpu"
        if name in READS and not hosts:
            raise AssertionError(f"{name} reads values of a tensor")
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_values(monkeypatch):
    # Operators check the values of CPU tensors; on a GPU they do not.
    monkeypatch.setattr(_checks, "check_visible_values", lambda *args, **kwargs: None)
    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "numpy", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, _refuse(name))  # inside operators, where the mode does not see
    update = PretrainStep(build(), OPTIM, precision="bf16")
    inputs = batch(0)
    with NothingIsRead():
        update(*inputs, lr=1e-3, decay=0.9)
        with pytest.raises(AssertionError, match="item"):
            inputs[0].sum().item()


def _refuse(name):
    def method(self, *args, **kwargs):
        raise AssertionError(f"Tensor.{name} reads values of a tensor")

    return method


def test_a_step_copies_nothing_to_the_host(monkeypatch):
    # Tensors without values: whatever would fetch one fails.
    meta = torch.device("meta")
    update = PretrainStep(build(device=meta), OPTIM)
    update.device = CPU  # autocast, though off, does not know the other
    monkeypatch.setattr(update.optimizer, "step", lambda: None)  # nor does the fused AdamW
    update(*(t.to(meta) for t in batch(0)), lr=1e-3, decay=0.9)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernels", "cuda_graph", "precision"),
    [("auto", False, "bf16"), ("reference", False, "bf16"), ("auto", True, "bf16"), ("auto", False, "fp16")],
)
def test_a_step_waits_for_nothing(kernels, cuda_graph, precision):
    cuda = torch.device("cuda")
    model = build(dataclasses.replace(MODEL, kernels=kernels), cuda)
    update = PretrainStep(model, OPTIM, precision=precision, cuda_graph=cuda_graph)
    inputs = batch(0, cuda)
    for _ in range(step.EAGER_STEPS + 2):  # compiles, allocates, records
        update(*inputs, lr=1e-3, decay=0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(*inputs, lr=2e-3, decay=0.91)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["none", "blocks"])
def test_a_cuda_graph_is_the_eager_step(compile):
    cuda = torch.device("cuda")
    eager = run(PretrainStep(build(device=cuda), OPTIM, precision="bf16"), steps=8, device=cuda)
    update = PretrainStep(build(device=cuda), OPTIM, precision="bf16", compile=compile, cuda_graph=True)
    torch.testing.assert_close(run(update, steps=8, device=cuda), eager, rtol=0.02, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(cuda_graph, precision):
    cuda = torch.device("cuda")
    update = PretrainStep(build(device=cuda), OPTIM, precision=precision, cuda_graph=cuda_graph)
    for i in range(40):  # fp16's scale comes down meanwhile
        update(*batch(i, cuda), lr=1e-3, decay=0.9)
    moved = {**update.parameters, **optimizer_tensors(update.optimizer, update.parameters)}
    before = {name: value.clone() for name, value in moved.items()}
    spec, *rest = batch(0, cuda)
    assert not update(spec * math.inf, *rest, lr=1e-3, decay=0.9)[6].isfinite()
    assert all(torch.equal(value, before[name]) for name, value in moved.items())
    assert update(spec, *rest, lr=1e-3, decay=0.9)[6].isfinite()
    assert not torch.equal(moved["student.cls"], before["student.cls"])


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_schedule():
    cuda, weights = torch.device("cuda"), [0.1 * (1 - i / 8) for i in range(8)]
    eager = run_scheduled(PretrainStep(build(device=cuda, **SCHEDULED), OPTIM, precision="bf16"), weights, cuda)
    update = PretrainStep(build(device=cuda, **SCHEDULED), OPTIM, precision="bf16", cuda_graph=True)
    torch.testing.assert_close(run_scheduled(update, weights, cuda), eager, rtol=0.02, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.slow
def test_loss_curves_of_kernels_differ_less_than_those_of_seeds():
    cuda = torch.device("cuda")

    def curve(kernels, seed):
        model = build(dataclasses.replace(MODEL, kernels=kernels), cuda, seed)
        return run(PretrainStep(model, OPTIM, precision="bf16"), steps=300, device=cuda)[:, 0]

    reference, ours, reseeded = curve("reference", 0), curve("auto", 0), curve("reference", 1)
    assert (ours - reference).abs().mean() < 0.2 * (reseeded - reference).abs().mean()
