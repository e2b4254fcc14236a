"""A whole pre-training step: student, decoder, teacher, losses, backward, clipping, AdamW, EMA.

    python -m benchmarks.step_time                   # two clips on a CPU, 96 on a GPU; base model, 4 masks
    python -m benchmarks.step_time --check           # fails below 1.9x on a CPU
    python -m benchmarks.step_time --clips 8 --masks 2 --out step.json --plot .

Candidates, by `model.kernels` of a recipe: "visible" is this package's step in plain PyTorch (reference), "triton" the
same in Triton kernels (auto; on a GPU). "dense" is the step as the paper's authors released it: the stem runs on all
positions of every clone, and once more without a mask, its result unused. Everything else is the same code. Where a
compiler runs the dense step ("dense compiled"), that unused pass is left out, as a compiler would drop it. Compiled is
what `run.compile: blocks` compiles; "CUDA graph" is `run.cuda_graph`, compared on a small batch, where launches count.

Shapes: B clips, M masks a clip, N = B * M, T frames, L patches, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, predicted_step
from benchmarks.flops import multiply_adds
from benchmarks.plots import plot
from benchmarks.results import Key, Results
from benchmarks.runner import (
    DTYPES,
    Case,
    Groups,
    Settings,
    arguments,
    autocast,
    finish,
    floor_ms,
    run_case,
    say,
    skipped_dtypes,
    speedup_line,
)
from benchmarks.stem import COMPILED, PROVIDERS, eager, inputs, largest_batch
from cat.model import CAT, PRESETS, ObjectiveConfig
from cat.training.optim import OptimConfig, build_optimizer, clip_gradients, trainable
from cat.training.step import EAGER_STEPS, Replay, compile_blocks

CPU_GOAL = 1.9  # fp32, two cores
COMPILED_FUSED = ("triton compiled",)  # on a GPU
GRAPH_CLIPS = 4
GRAPHS = ("triton, CUDA graph", "triton compiled, CUDA graph")
REFERENCE_CLIPS = 4
LOSS_SCALE = 2.0**12  # start of fp16's
# A batch may be cut into pieces for the reference, so the global loss is a mean here; the kernels are the same.
OBJECTIVE = ObjectiveConfig(global_loss_reduction="mean")
# So small a rate that a hundred steps on random numbers change nothing that is measured.
OPTIM = OptimConfig(lr=1e-7, warmup_steps=0)


KERNELS = {"dense": "dense", "visible": "reference", "triton": "auto"}


def kernels(name: str) -> str:
    """A candidate's `model.kernels`."""
    return KERNELS[name.replace(",", " ").split()[0]]


def build_model(preset: str, kernels: str, device: torch.device | None = None) -> CAT:
    """device: where its weights are made, for a large model on a GPU in seconds less (default: PyTorch's default)."""
    with torch.random.fork_rng(devices=[]), device or contextlib.nullcontext():
        torch.manual_seed(0)
        return CAT(dataclasses.replace(PRESETS[preset], kernels=kernels), OBJECTIVE).train()


def gradients(model: CAT) -> list[Tensor]:
    return [p.grad for p in trainable(model).values()]


class StepProvider:
    """A step: ``name`` says which kernels run it, and whether it is compiled or recorded."""

    def __init__(
        self, name: str, shape: dict[str, Any], dtype: str, device: torch.device, compiler: str = "inductor"
    ) -> None:
        self.device, self.dtype = device, dtype
        graph = name.endswith("CUDA graph")
        if graph and dtype == "fp16":
            raise ValueError("a loss scale is looked at by the host in every step, so fp16 is not recorded")
        self.model = build_model(shape["preset"], kernels(name), device)
        if dtype != "fp32":
            self.model.lower_teacher(DTYPES[dtype])
        self.parameters = trainable(self.model)
        self.optimizer = build_optimizer(self.parameters, OPTIM, capturable=graph)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=dtype == "fp16")
        self.spec_B1TF, self.visible_NK = inputs(shape, device)
        self.rng = torch.tensor([0, 0], device=device)
        self.decay = torch.tensor(0.9998, dtype=torch.float64, device=device) if graph else 0.9998
        self.unused_pass = name == "dense"
        self._make_optimizer_state()
        if "compiled" in name:
            compile_blocks(self.model, compiler)
        self.replay = Replay(self._update, device) if graph else None

    def _make_optimizer_state(self) -> None:
        """So that it counts as what stays, not as what a step takes."""
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        with autocast(self.dtype, self.device):
            if self.unused_pass:
                self.model.student.stem(self.spec_B1TF)
            return self.model(self.spec_B1TF, self.visible_NK, rng=self.rng).loss

    def call(self) -> Tensor:
        return self.replay() if self.replay else self._update()

    def _update(self) -> Tensor:
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.parameters.values(), OPTIM.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_teacher(self.decay)
        return loss.detach()

    def check(self) -> Groups:
        replayed = [self.call() for _ in range(EAGER_STEPS + 2)][-1] if self.replay else None
        loss = self.loss()
        scale = LOSS_SCALE if self.dtype == "fp16" else 1.0
        (loss * scale).backward()
        found = {
            "loss": [loss.detach() if replayed is None else replayed.clone()],
            "gradients": [g / scale for g in gradients(self.model)],
        }
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def persistent_bytes(self) -> int:
        held = list(self.model.parameters()) + list(self.model.buffers())
        held += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)


def make_provider(name: str, shape: dict[str, Any], dtype: str) -> StepProvider:
    """For the process that measures memory on a CPU."""
    return StepProvider(name, shape, dtype, torch.device("cpu"))


def reference(shape: dict[str, Any], device: torch.device) -> Groups:
    """Loss and gradients in float32, a few clips at a time (see `stem.reference`)."""
    model = build_model(shape["preset"], kernels("visible"), device)
    spec, visible = inputs(shape, device)
    B, M, P = shape["clips"], shape["masks"], model.config.patch_size
    noise_per_clip = M * (spec.shape[2] // P) * (spec.shape[3] // P) * model.config.embed_dim // 4  # Philox counters
    total = torch.zeros((), device=device)
    for first in range(0, B, REFERENCE_CLIPS):
        clips = spec[first : first + REFERENCE_CLIPS]
        clones = visible[first * M : (first + REFERENCE_CLIPS) * M]
        rng = torch.tensor([0, first * noise_per_clip], device=device)
        loss = model(clips, clones, rng=rng).loss * (len(clips) / B)
        loss.backward()
        total += loss.detach()
    return {"loss": [total], "gradients": gradients(model)}


def count(shape: dict[str, Any], name: str) -> dict[str, int]:
    """Multiply-adds of the parts of a step, forward, and of the whole with its backward, per clip."""
    with torch.device("meta"):
        model = build_model(shape["preset"], "dense" if kernels(name) == "dense" else "reference")
        rng = torch.empty(2, dtype=torch.int64)
    spec, visible = inputs({**shape, "clips": 1}, torch.device("cpu"))
    spec, visible = spec.to("meta"), visible.to("meta")
    grid = tuple(n // model.config.patch_size for n in spec.shape[2:])
    encoded = model.encode(spec, visible)[0]
    parts = {
        "student_stem": multiply_adds(lambda: model.student.stem(spec, visible)),
        "student": multiply_adds(lambda: model.encode(spec, visible)),
        "decoder": multiply_adds(lambda: model.decode(encoded, visible, grid, rng)),
        "teacher": multiply_adds(lambda: model.targets(spec)),
        "unused_pass": multiply_adds(lambda: model.student.stem(spec)) if name == "dense" else 0,
        "step": multiply_adds(lambda: model(spec, visible, rng=rng).loss.backward()),
    }
    parts["step"] += parts["unused_pass"]
    return parts


def case(
    shape: dict[str, Any], dtype: str, names: tuple[str, ...], s: Settings, counts: dict[str, dict[str, int]]
) -> Case:
    work = {}
    for name in names:
        total = counts[name]["step"] * shape["clips"]
        work[name] = {"multiply_adds": total, "floor_ms": floor_ms(total, dtype, s.ceilings)}
        if name == "triton" and (predicted := predicted_step.peak_MiB(shape, dtype)) is not None:
            work[name]["predicted_peak_MiB"] = predicted
    peak = None
    if s.device.type == "cpu" and s.memory:
        peak = lambda name: memory.peak_in_fresh_process(  # noqa: E731
            "step_time", {"name": name, "shape": shape, "dtype": dtype}, threads=s.threads
        )
    return Case(
        key=Key(benchmark="step", mode="step", dtype=dtype, shape=shape),
        providers={name: lambda name=name: StepProvider(name, shape, dtype, s.device, s.compiler) for name in names},
        baseline="dense" if "dense" in names else names[0],
        reference=lambda: reference(shape, s.device),
        work=work,
        peak=peak,
    )


def fits(shape: dict[str, Any], dtype: str, device: torch.device) -> bool:
    """Whether the eager dense candidate has the memory for this batch, with the others' weights beside it."""
    try:
        others = [StepProvider("visible", {**shape, "clips": 1}, dtype, device) for _ in range(5)]
        for provider in (*others, StepProvider("dense", shape, dtype, device)):
            provider.call()
    except RuntimeError:  # libraries that lack memory do not all raise OutOfMemoryError
        return False
    return True


CASES = ("eager", "graph", "compiled")


def run(s: Settings, cases: Sequence[str] = CASES) -> Results:
    """eager: the batch asked for, and with "compiled" also the compiled candidates on it; graph: a small batch, eager
    and as a CUDA graph. What is compiled needs ``s.compiled``, graphs a GPU."""
    results = Results()
    skipped_dtypes(s, results)
    plain, cuda = eager(s.device), s.device.type == "cuda"
    compiled = COMPILED + (COMPILED_FUSED if cuda else ())
    with_compiled = s.compiled and "compiled" in cases
    names, stages = (plain + compiled, [plain, compiled]) if with_compiled else (plain, None)
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    counts = {name: count(shape, name) for name in (*names, *(GRAPHS if cuda else ()))}
    results.multiply_adds[f"{s.preset}, one clip of {s.frames} frames, {s.masks} masks"] = counts
    for dtype in s.dtypes:
        if "eager" in cases or with_compiled:
            clips = largest_batch(shape, lambda sh, dtype=dtype: fits(sh, dtype, s.device), s.device)
            run_case(case({**shape, "clips": clips}, dtype, names, s, counts), results, s, stages=stages)
            if clips != s.clips:
                results.notes.append(
                    f"step {dtype}: the dense step has no memory for {s.clips} clips; compared at {clips}"
                )
                run_case(case(shape, dtype, plain[1:], s, counts), results, s)
        if cuda and dtype != "fp16" and "graph" in cases:
            few = plain + (GRAPHS if with_compiled else GRAPHS[:1])
            run_case(case({**shape, "clips": min(GRAPH_CLIPS, s.clips)}, dtype, few, s, counts), results, s)
    return results


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)} (default: all)")
    parser.add_argument("--plot", type=Path, help="directory for step.png")
    options = parser.parse_args()
    s = Settings.of(options, clips_cpu=2, clips_cuda=96)
    cases = options.cases.split(",")
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        raise SystemExit(f"--cases {options.cases}: unknown {unknown[0]!r}; expected some of {','.join(CASES)}")
    results = run(s, cases)
    if options.plot:
        plot(results.as_dict(s.device), options.plot)
    for counts in results.multiply_adds.values():
        dense, visible = (counts[name]["step"] / 1e9 for name in PROVIDERS)
        say(f"multiply-adds a clip: visible {visible:.0f} G, dense {dense:.0f} G, {dense / visible:.2f}x as many")
    for c in results.comparisons:
        say(speedup_line(c))
    goals = []
    if s.device.type == "cpu" and s.preset == "base":
        found = results.speedup("step", "step", "fp32", "dense", "visible")
        if found is None or found < CPU_GOAL:
            goals.append(f"step in fp32, visible against dense: {found or 0:.2f}x, goal {CPU_GOAL}x")
    return finish(results, s, goals)


if __name__ == "__main__":
    sys.exit(main())
