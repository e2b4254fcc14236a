"""The stem alone: visible-only against dense, forward and forward + backward.

    python -m benchmarks.stem                  # one clip on a CPU, 96 on a GPU; base width, 4 masks
    python -m benchmarks.stem --check          # fails below 4.5x on a CPU, and on an H200 when a budget is missed
    python -m benchmarks.stem --sweep          # instead: smaller batches
    python -m benchmarks.stem --resolutions    # instead: the paper's other resolution sets

"dense forward" is the teacher's pass: no mask, every position once a clip; "dense" there is the formula as released.

Shapes: B clips, M masks a clip, T frames, L patches, K visible patches, D width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    unsearched,
)
from cat.data.masks import MaskConfig, inverse_block_masks
from cat.model import PRESETS
from cat_kernels import MultiResConv

CPU_GOAL = 4.5  # forward + backward, two cores
# On an H200, base model, 96 clips, 4 masks, bf16: twice the floors of the work (9.6 and 4 TFLOP at 790 TFLOP/s).
H200_GOALS_MS = {"forward+backward": 24.0, "dense forward": 10.0}
H200_GOAL_COMPILED = 5.0  # forward + backward, against the compiled dense stem
REFERENCE_CLIPS = (
    8  # the reference goes through the batch in pieces of so many clips, so that it fits where dense does not
)
PROVIDERS = ("dense", "visible")
FUSED = ("triton",)  # on a GPU
COMPILED = ("dense compiled", "visible compiled")
DENSE_INPUT = "dense forward"

SWEEP = {"cuda": (1, 4, 16, 48), "cpu": (2,)}  # the batch of the main comparison is not measured again
# The paper's resolution sets with their channels; the last width is the model's.
RESOLUTIONS: dict[str, tuple[int, ...]] = {
    "4,8,16": (256, 384),
    "16": (),
    "4,8": (384,),
    "4,16": (384,),
    "8,16": (384,),
    "2,4,8,16": (256, 384, 768),
    "4,8,16,32": (256, 384, 768),
}


@dataclass(frozen=True)
class Sizes:
    """What a shape says of the model."""

    resolutions: tuple[int, ...]
    channels: tuple[int, ...]
    embed_dim: int
    mel_bins: int


def sizes(shape: dict[str, Any]) -> Sizes:
    """Of the preset; ``shape["resolutions"]``, e.g. "4,16", names another set, at the paper's widths where the preset
    is the base model, and at equal shares of them elsewhere."""
    config = PRESETS[shape["preset"]]
    if "resolutions" not in shape:
        return Sizes(config.resolutions, config.channels, config.embed_dim, config.mel_bins)
    channels = RESOLUTIONS[shape["resolutions"]]
    share = PRESETS["base"].embed_dim // config.embed_dim
    resolutions = tuple(int(r) for r in shape["resolutions"].split(","))
    return Sizes(resolutions, tuple(c // share // 16 * 16 for c in channels), config.embed_dim, config.mel_bins)


def eager(device: torch.device) -> tuple[str, ...]:
    """The candidates that no compiler works on, the dense one first."""
    return PROVIDERS + (FUSED if device.type == "cuda" else ())


def counted(name: str) -> str:
    """The backend whose multiply-adds a candidate has: the kernels are the visible-only stem's."""
    backend = name.split()[0]
    return "visible" if backend == "triton" else backend


def inputs(shape: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Random spectrograms (B, 1, T, F) and visible patches (B*M, K), the same for every candidate."""
    model = sizes(shape)
    B, T, n_mels, P = shape["clips"], shape["frames"], model.mel_bins, model.resolutions[-1]
    spec = torch.randn(B, 1, T, n_mels, generator=torch.Generator().manual_seed(1))
    masks = MaskConfig(num_masks=max(1, shape["masks"]))
    visible = inverse_block_masks(masks, (T // P, n_mels // P), seed=2, step=0, clips=torch.arange(B))
    return spec.to(device), visible.to(device)


def stem_inputs(shape: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """`inputs`, or without masks None: all patches are visible."""
    spec, visible = inputs(shape, device)
    return spec, visible if shape["masks"] else None


def build_stem(shape: dict[str, Any], backend: str) -> MultiResConv:
    model = sizes(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultiResConv(model.resolutions, model.channels, model.embed_dim, backend=backend)


class StemProvider:
    """One backend, eager or compiled. ``mode``: "forward" or "dense forward" without gradients, or "forward+backward"
    to all weights."""

    def __init__(
        self,
        name: str,
        shape: dict[str, Any],
        dtype: str,
        mode: str,
        device: torch.device,
        compiler: str = "inductor",
    ) -> None:
        self.device, self.dtype, self.backward = device, dtype, mode == "forward+backward"
        self.stem = build_stem(shape, name.split()[0]).to(device)
        self.spec_B1TF, self.visible_NK = stem_inputs(shape, device)
        self.cotangent_NKD = cotangent(self.visible_NK, self.stem.embed_dim) if self.backward else None
        if "compiled" in name:
            self.stem.compile(dynamic=False, backend=compiler)

    def call(self) -> Tensor:
        with torch.set_grad_enabled(self.backward), autocast(self.dtype, self.device):
            tokens = self.stem(self.spec_B1TF, self.visible_NK)
        if self.cotangent_NKD is not None:
            tokens.backward(self.cotangent_NKD.to(tokens.dtype))
            self.stem.zero_grad(set_to_none=True)
        return tokens

    def check(self) -> Groups:
        if self.cotangent_NKD is None:
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


def cotangent(visible_NK: Tensor | None, D: int) -> Tensor:
    """Incoming gradient (N, K, D)."""
    if visible_NK is None:
        raise ValueError("gradients are measured of masked input: masks=0; expected 1 or more")
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*visible_NK.shape, D, generator=generator).to(visible_NK.device)


def reference(shape: dict[str, Any], mode: str, device: torch.device) -> Groups:
    """Tokens and gradients in float32, a few clips at a time; of visible patches alone, which tests hold to the dense
    formula, and which is done in a fraction of its time."""
    stem = build_stem(shape, "visible").to(device)
    spec, visible = stem_inputs(shape, device)
    backward, M = mode == "forward+backward", shape["masks"]
    incoming = cotangent(visible, stem.embed_dim) if backward else None
    tokens = []
    size = 2 if "resolutions" in shape else REFERENCE_CLIPS  # the finest set needs several times the memory
    for first in range(0, shape["clips"], size):
        clips = slice(first, first + size)
        clones = slice(first * M, (first + size) * M)
        with torch.set_grad_enabled(backward):
            piece = stem(spec[clips], visible if visible is None else visible[clones])
        if incoming is not None:
            piece.backward(incoming[clones])
        tokens.append(piece.detach())
    groups = {"tokens": [torch.cat(tokens)]}
    if backward:
        groups["gradients"] = [p.grad for p in stem.parameters()]
    return groups


def count(shape: dict[str, Any], backend: str, mode: str) -> int:
    """Multiply-adds of the whole batch."""
    with torch.device("meta"):
        stem = build_stem(shape, backend)
    spec, visible = stem_inputs({**shape, "clips": 1}, torch.device("cpu"))
    spec, visible = spec.to("meta"), visible if visible is None else visible.to("meta")

    def call() -> None:
        tokens = stem(spec, visible)
        if mode == "forward+backward":
            tokens.sum().backward()

    return multiply_adds(call) * shape["clips"]


def fits(shape: dict[str, Any], dtype: str, device: torch.device) -> bool:
    """Whether the eager dense candidate has the memory for this batch."""
    try:
        with unsearched():
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


def case(
    shape: dict[str, Any], dtype: str, mode: str, names: tuple[str, ...], s: Settings, benchmark: str = "stem"
) -> Case:
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
        key=Key(benchmark=benchmark, mode=mode, dtype=dtype, shape=shape),
        providers={
            name: lambda name=name: StemProvider(name, shape, dtype, mode, s.device, s.compiler) for name in names
        },
        baseline="dense" if "dense" in names else names[0],
        reference=lambda: reference(shape, mode, s.device),
        work=work,
        peak=peak,
    )


MODES = ("forward", "forward+backward", DENSE_INPUT)


def run(s: Settings, modes: Sequence[str] = MODES) -> Results:
    """One batch: forward, forward + backward, and the teacher's forward."""
    results = Results()
    skipped_dtypes(s, results)
    plain = eager(s.device)
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    for dtype in s.dtypes:
        clips = largest_batch(shape, lambda sh, dtype=dtype: fits(sh, dtype, s.device), s.device)
        compared = {**shape, "clips": clips}
        if "forward" in modes:
            run_case(case(compared, dtype, "forward", plain, s), results, s)
        # The compiler is asked for the training pass only: compiling takes longer than all else here.
        names, stages = (plain + COMPILED, [plain, COMPILED]) if s.compiled else (plain, None)
        if "forward+backward" in modes:
            run_case(case(compared, dtype, "forward+backward", names, s), results, s, stages=stages)
        if "forward+backward" in modes and clips != s.clips:
            results.notes.append(f"stem {dtype}: the dense stem has no memory for {s.clips} clips; compared at {clips}")
            run_case(case(shape, dtype, "forward+backward", plain[1:], s), results, s)
        if DENSE_INPUT in modes:
            run_case(case({**shape, "masks": 0}, dtype, DENSE_INPUT, plain, s), results, s)
    return results


def run_others(s: Settings, shapes: Sequence[dict[str, Any]], benchmark: str, results: Results) -> None:
    """Other batches or other resolution sets, without compilers; where dense has no memory, the others alone.

    On a CPU forward + backward only: it takes minutes otherwise.
    """
    plain = eager(s.device)
    for dtype in s.dtypes:
        for shape in shapes:
            names = plain
            if s.device.type == "cuda" and not fits(shape, dtype, s.device):
                names = plain[1:]
                results.notes.append(f"{benchmark} {dtype}: the dense stem has no memory for {describe(shape)}")
            release()
            for mode in ("forward", "forward+backward") if s.device.type == "cuda" else ("forward+backward",):
                run_case(case(shape, dtype, mode, names, s, benchmark), results, s)


def describe(shape: dict[str, Any]) -> str:
    """Batch and resolutions in words."""
    resolutions = f", resolutions {shape['resolutions']}" if "resolutions" in shape else ""
    return f"{shape['clips']} clips{resolutions}"


def missed(results: Results, s: Settings) -> list[str]:
    """Goals of this machine that the results miss, in words."""
    if s.preset != "base":
        return []
    if s.device.type == "cpu":
        found = results.speedup("stem", "forward+backward", "fp32", "dense", "visible") or 0.0
        reached = found >= CPU_GOAL
        return [] if reached else [f"stem forward+backward, visible against dense: {found:.2f}x, goal {CPU_GOAL}x"]
    if "H200" not in torch.cuda.get_device_name(s.device) or "bf16" not in s.dtypes:
        return []
    return missed_on_h200(results)


def missed_on_h200(results: Results) -> list[str]:
    rows = [r for r in results.rows if r["benchmark"] == "stem" and r["dtype"] == "bf16"]
    times = {(r["mode"], r["provider"], r["shape"]["clips"]): r["median_ms"] for r in rows}
    goals = []
    for mode, goal in H200_GOALS_MS.items():
        found = times.get((mode, "triton", 96))
        if found is None or found > goal:
            words = f"{found:.1f} ms" if found else "not measured"
            goals.append(f"stem {mode}, triton, bf16, 96 clips: {words}, goal {goal:.0f} ms")
    mode = "forward+backward"
    ours, dense = ({clips: t for (m, p, clips), t in times.items() if (m, p) == (mode, name)}
                   for name in ("triton", "dense compiled"))  # fmt: skip
    ratio = max((dense[clips] / ours[clips] for clips in dense if clips in ours), default=0.0)
    if ratio < H200_GOAL_COMPILED:
        goals.append(f"stem {mode}, bf16, triton against dense compiled: {ratio:.2f}x, goal {H200_GOAL_COMPILED}x")
    return goals


def chosen_shapes(options: argparse.Namespace, s: Settings) -> list[tuple[str, list[dict[str, Any]]]]:
    """What --sweep and --resolutions ask for: name of the benchmark, its shapes."""
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    found = []
    if options.sweep is not None:
        batches = options.sweep or SWEEP[s.device.type]
        found.append(("stem sweep", [{**shape, "clips": clips} for clips in batches]))
    if options.resolutions is not None:
        unknown = [r for r in options.resolutions if r not in RESOLUTIONS]
        if unknown:
            raise SystemExit(f"--resolutions {unknown[0]}: expected some of {', '.join(RESOLUTIONS)}")
        sets = options.resolutions or list(RESOLUTIONS)
        found.append(("stem resolutions", [{**shape, "resolutions": r} for r in sets]))
    return found


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sweep", nargs="*", type=int, metavar="B", help="other batches instead (default: a few)")
    parser.add_argument("--resolutions", nargs="*", metavar="R", help="other sets, e.g. 4,16 (default: all)")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES, metavar="MODE", help="some of the passes")
    options = parser.parse_args()
    others = options.sweep is not None or options.resolutions is not None
    s = Settings.of(options, clips_cpu=1, clips_cuda=16 if options.resolutions is not None else 96)
    results, goals = Results(), []
    if others:
        for benchmark, shapes in chosen_shapes(options, s):
            run_others(s, shapes, benchmark, results)
    else:
        results = run(s, options.modes)
        if s.device.type == "cpu" or (s.compiled and set(options.modes) == set(MODES)):
            goals = missed(results, s)
        results.notes += [f"goal missed: {goal}" for goal in goals if s.device.type == "cuda"]
    for c in results.comparisons:
        say(speedup_line(c))
    return finish(results, s, goals)


if __name__ == "__main__":
    sys.exit(main())
