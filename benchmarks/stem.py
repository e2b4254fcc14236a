"""The stem alone: visible-only against dense, forward and forward + backward.

    python -m benchmarks.stem            # one clip on a CPU, 96 on a GPU; base width, 4 masks
    python -m benchmarks.stem --check    # fails below 4.5x on a CPU

Shapes: B clips, M masks a clip, T frames, L patches, K visible patches, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.flops import multiply_adds
from benchmarks.results import Key, Results
from benchmarks.runner import (
    Case,
    Groups,
    Settings,
    arguments,
    autocast,
    finish,
    floor_ms,
    release,
    run_case,
    say,
    skipped_dtypes,
    speedup_line,
)
from cat.masks import MaskConfig, inverse_block_masks
from cat.model import PRESETS
from cat_kernels import MultiResConv

CPU_GOAL = 4.5  # forward + backward, two cores
REFERENCE_CLIPS = (
    8  # the reference goes through the batch in pieces of so many clips, so that it fits where dense does not
)
PROVIDERS = ("dense", "visible")
FUSED = ("triton",)  # on a GPU
COMPILED = ("dense compiled", "visible compiled")


def eager(device: torch.device) -> tuple[str, ...]:
    """The candidates that no compiler works on, the dense one first."""
    return PROVIDERS + (FUSED if device.type == "cuda" else ())


def counted(name: str) -> str:
    """The backend whose multiply-adds a candidate has: the kernels are the visible-only stem's."""
    backend = name.split()[0]
    return "visible" if backend == "triton" else backend


def inputs(shape: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Random spectrograms (B, 1, T, F) and visible patches (B*M, K), the same for every candidate."""
    config = PRESETS[shape["preset"]]
    B, T, n_mels, P = shape["clips"], shape["frames"], config.mel_bins, config.patch_size
    spec = torch.randn(B, 1, T, n_mels, generator=torch.Generator().manual_seed(1))
    masks = MaskConfig(num_masks=shape["masks"])
    visible = inverse_block_masks(masks, (T // P, n_mels // P), seed=2, step=0, clips=torch.arange(B))
    return spec.to(device), visible.to(device)


def build_stem(preset: str, backend: str) -> MultiResConv:
    config = PRESETS[preset]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultiResConv(config.resolutions, config.channels, config.embed_dim, backend=backend)


class StemProvider:
    """One backend, eager or compiled. ``mode``: "forward" without gradients, or "forward+backward" to all weights."""

    def __init__(
        self,
        name: str,
        shape: dict[str, Any],
        dtype: str,
        mode: str,
        device: torch.device,
        compiler: str = "inductor",
    ) -> None:
        self.device, self.dtype, self.mode = device, dtype, mode
        self.stem = build_stem(shape["preset"], name.split()[0]).to(device)
        self.spec_B1TF, self.visible_NK = inputs(shape, device)
        self.cotangent_NKD = cotangent(self.visible_NK, self.stem.embed_dim)
        if "compiled" in name:
            self.stem.compile(dynamic=False, backend=compiler)

    def call(self) -> object:
        with torch.set_grad_enabled(self.mode != "forward"), autocast(self.dtype, self.device):
            tokens = self.stem(self.spec_B1TF, self.visible_NK)
        if self.mode != "forward":
            tokens.backward(self.cotangent_NKD.to(tokens.dtype))
            self.stem.zero_grad(set_to_none=True)
        return tokens

    def check(self) -> Groups:
        if self.mode == "forward":
            return {"tokens": [self.call()]}
        with autocast(self.dtype, self.device):
            tokens = self.stem(self.spec_B1TF, self.visible_NK)
        tokens.backward(self.cotangent_NKD.to(tokens.dtype))
        gradients = [p.grad for p in self.stem.parameters()]
        self.stem.zero_grad(set_to_none=True)
        return {"tokens": [tokens.detach()], "gradients": gradients}

    def persistent_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.stem.parameters())


def make_provider(name: str, shape: dict[str, Any], dtype: str, mode: str) -> StemProvider:
    """For the process that measures memory on a CPU."""
    return StemProvider(name, shape, dtype, mode, torch.device("cpu"))


def cotangent(visible_NK: Tensor, D: int) -> Tensor:
    """Incoming gradient (N, K, D)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*visible_NK.shape, D, generator=generator).to(visible_NK.device)


def reference(shape: dict[str, Any], mode: str, device: torch.device) -> Groups:
    """Tokens and gradients by the dense formula in float32, a few clips at a time."""
    stem = build_stem(shape["preset"], "dense").to(device)
    spec, visible = inputs(shape, device)
    incoming, M = cotangent(visible, stem.embed_dim), shape["masks"]
    tokens = []
    for first in range(0, shape["clips"], REFERENCE_CLIPS):
        clips = slice(first, first + REFERENCE_CLIPS)
        clones = slice(first * M, (first + REFERENCE_CLIPS) * M)
        with torch.set_grad_enabled(mode != "forward"):
            piece = stem(spec[clips], visible[clones])
        if mode != "forward":
            piece.backward(incoming[clones])
        tokens.append(piece.detach())
    groups = {"tokens": [torch.cat(tokens)]}
    if mode != "forward":
        groups["gradients"] = [p.grad for p in stem.parameters()]
    return groups


def count(shape: dict[str, Any], backend: str, mode: str) -> int:
    """Multiply-adds of the whole batch."""
    with torch.device("meta"):
        stem = build_stem(shape["preset"], backend)
    spec, visible = inputs({**shape, "clips": 1}, torch.device("cpu"))
    spec, visible = spec.to("meta"), visible.to("meta")

    def call() -> None:
        tokens = stem(spec, visible)
        if mode != "forward":
            tokens.sum().backward()

    return multiply_adds(call) * shape["clips"]


def fits(shape: dict[str, Any], dtype: str, device: torch.device) -> bool:
    """Whether the eager dense candidate has the memory for this batch."""
    try:
        StemProvider("dense", shape, dtype, "forward+backward", device).call()
    except RuntimeError:  # libraries that lack memory do not all raise OutOfMemoryError
        return False
    return True


def largest_batch(shape: dict[str, Any], fits: Callable[[dict[str, Any]], bool], device: torch.device) -> int:
    """The batch asked for, or the largest half, quarter, ... of it in which the dense candidate fits as well."""
    clips = shape["clips"]
    while device.type == "cuda" and clips > 1 and not fits({**shape, "clips": clips}):
        release()
        clips //= 2
    release()
    return clips


def case(shape: dict[str, Any], dtype: str, mode: str, names: tuple[str, ...], s: Settings) -> Case:
    counts = {name: count(shape, counted(name), mode) for name in names}
    work = {
        name: {"multiply_adds": counts[name], "floor_ms": floor_ms(counts[name], dtype, s.ceilings)} for name in names
    }
    peak = None
    if s.device.type == "cpu" and s.memory:
        peak = lambda name: memory.peak_in_fresh_process(  # noqa: E731
            "stem", {"name": name, "shape": shape, "dtype": dtype, "mode": mode}, threads=s.threads
        )
    return Case(
        key=Key(benchmark="stem", mode=mode, dtype=dtype, shape=shape),
        providers={
            name: lambda name=name: StemProvider(name, shape, dtype, mode, s.device, s.compiler) for name in names
        },
        baseline="dense" if "dense" in names else names[0],
        reference=lambda: reference(shape, mode, s.device),
        work=work,
        peak=peak,
    )


def run(s: Settings) -> Results:
    results = Results()
    skipped_dtypes(s, results)
    plain = eager(s.device)
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    for dtype in s.dtypes:
        clips = largest_batch(shape, lambda sh, dtype=dtype: fits(sh, dtype, s.device), s.device)
        compared = {**shape, "clips": clips}
        run_case(case(compared, dtype, "forward", plain, s), results, s)
        # The compiler is asked for the training pass only: compiling takes longer than all else here.
        names, stages = (plain + COMPILED, [plain, COMPILED]) if s.compiled else (plain, None)
        run_case(case(compared, dtype, "forward+backward", names, s), results, s, stages=stages)
        if clips != s.clips:
            results.notes.append(f"stem {dtype}: the dense stem has no memory for {s.clips} clips; compared at {clips}")
            run_case(case(shape, dtype, "forward+backward", plain[1:], s), results, s)
    return results


def main() -> int:
    s = Settings.of(arguments(__doc__.splitlines()[0]).parse_args(), clips_cpu=1, clips_cuda=96)
    results = run(s)
    goals = []
    for c in results.comparisons:
        say(speedup_line(c))
    if s.device.type == "cpu" and s.preset == "base":
        found = results.speedup("stem", "forward+backward", "fp32", "dense", "visible")
        if found is None or found < CPU_GOAL:
            goals.append(f"stem forward+backward, visible against dense: {found or 0:.2f}x, goal {CPU_GOAL}x")
    return finish(results, s, goals)


if __name__ == "__main__":
    sys.exit(main())
