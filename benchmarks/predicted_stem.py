"""Model of a GPU and of the stem's kernels on it, for `benchmarks.predict`.

Every kernel of `benchmarks.kernels` takes as long as the slowest of what it needs: bytes of memory, bytes through the
L2 cache, multiply-adds of the matrix units, instructions of the rest. Registers and shared memory, as the compiler
tells them, say how many programs a multiprocessor holds; where it is one alone, its products and its instructions
follow each other and their times add up. What that rests on is `Assumptions`. Nothing of this enters a result file.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.ahead import Resources, compile_ahead, modules
from benchmarks.kernels import Kernel, kernels
from benchmarks.tables import Table

ARCHITECTURE = 90
SHAPE = {"preset": "base", "clips": 96, "masks": 4, "frames": 1024}
BUDGETS_MS = {"forward": None, "forward + backward": 24.0, "teacher's forward": 10.0}  # twice the floors: see `stem`


@dataclass(frozen=True)
class Assumptions:
    """Numbers of an H200 and what is guessed of it, each with its source."""

    memory_TBps: float = 4.3  # copy, measured on such a card
    matrix_TFLOPS: float = 790.0  # large bf16 product, measured on such a card
    cache_TBps: float = 7.0  # L2 to multiprocessors: a guess, half of 64 bytes a clock each
    multiprocessors: int = 132
    clock_GHz: float = 1.7  # a guess: under load, below the datasheet's boost
    registers: int = 65536  # of a multiprocessor; shared memory and warps: the programming guide
    shared_bytes: int = 228 << 10
    warps: int = 64
    memory_share: float = 0.85  # of the copy's rate, in a kernel that streams: a guess
    triton_share: float = 0.6  # of the large product's rate, in a Triton kernel: a guess
    library_share: float = 0.75  # the same, of the library's products, of which one side is short: a guess
    attention_share: float = 0.35  # the same, of attention over 103 and 513 tokens: a guess
    grouped_share: float = 0.15  # the same, of cuDNN's grouped convolutions: a guess
    issue_share: float = 0.7  # of four warp instructions a clock: a guess
    launch_us: float = 2.0  # between two kernels: a guess
    # Instructions an element: those of GELU, of restoring (Philox) and of the loss counted in sm_90 machine code; the
    # rest multiply-adds, loads and conversions of the formulas.
    instructions: dict[str, int] = field(
        default_factory=lambda: {
            **{"gelu": 17, "gelu_backward": 19, "norm": 8, "norm_backward": 16, "depthwise": 40},
            **{"restore": 19, "loss": 20, "other": 4},
        }
    )

    def told(self) -> str:
        """In a sentence, for the reader of the tables."""
        costs = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.instructions.items())
        shares = (self.memory_share, self.triton_share, self.library_share, self.issue_share)
        memory, triton, library, issue = (f"{100 * share:.0f} %" for share in shares)
        attention, grouped = (f"{100 * share:.0f} %" for share in (self.attention_share, self.grouped_share))
        return (
            f"Assumed: {self.memory_TBps:g} TB/s of copy and {self.matrix_TFLOPS:g} TFLOP/s in bf16; of these {memory} "
            f"in a kernel that streams, {triton} in a product in Triton, {library} in one of the library's, "
            f"{attention} in attention, {grouped} in the library's grouped convolutions; "
            f"{self.cache_TBps:g} TB/s through the L2; {self.multiprocessors} multiprocessors at "
            f"{self.clock_GHz:g} GHz that issue {issue} of four warp instructions a clock; instructions an element: "
            f"{costs}; {self.launch_us:g} us a launch. The first two are measured on an H200, instructions of GELU, "
            "restore and loss counted in machine code; all else is guessed."
        )


def resident(r: Resources, a: Assumptions) -> int:
    """Programs that a multiprocessor holds at a time."""
    registers = r.warps * 32 * (-(-r.registers // 8) * 8)  # given out by eights
    by_shared = a.shared_bytes // (r.shared_bytes + 1024)  # the driver takes 1 KiB of each
    return max(1, min(a.registers // registers, by_shared, a.warps // r.warps, 32))


def cache_bytes(name: str, sizes: dict[str, Any], R: int) -> int:
    """What all programs of a kernel of ours read and write through the L2, from its tiles; 2 bytes an element.

    A tile that is read twice counts twice; a patch's halo once a program.
    """
    z, c, rows = sizes, sizes.get("c", 0), R * sizes.get("c", 0)
    programs = math.ceil(R / z["BLOCK_R"]) if "BLOCK_R" in z else 0
    halo = ((z["P"] + z["KK"] - 1) / z["P"]) ** 2 if "KK" in z else 0.0
    match name.split()[0]:
        case "norm_linear":
            columns = math.ceil(z["n"] / z["BLOCK_N"])
            elements = columns * (2 * rows + programs * z["BLOCK_N"] * c) + R * z["n"]
        case "norm_mlp_residual":
            elements = programs * 2 * c * z["h"] + 7 * rows
        case "conv_linear_residual":
            elements = (halo + 2) * rows + programs * c * c
        case "depthwise":
            elements = (halo + 1) * rows
        case "depthwise_backward_weight":
            elements = z["KK"] * ((z["G"] + z["KK"] - 1) / z["G"] + 1) * rows
        case _:
            elements = 0
    return int(2 * elements)


@dataclass(frozen=True)
class Prediction:
    """Of one launch: milliseconds of each thing it needs, and in all."""

    kernel: Kernel
    bytes: int
    flops: int
    resident: int | None  # None: the library's
    needs: dict[str, float]
    floor_ms: float
    ms: float

    @property
    def bound(self) -> str:
        return max(self.needs, key=self.needs.__getitem__)


def predict(kernel: Kernel, compiled: dict[str, tuple[Resources, dict[str, Any]]], a: Assumptions) -> Prediction:
    moved, macs = kernel.work()
    instructions = sum(a.instructions[name] * count for name, count in kernel.scalar.items())
    products = 2 * (macs - 25 * kernel.scalar.get("depthwise", 0))  # the convolution is not for the matrix units
    share, blocks, cached = a.library_share, None, 0
    if kernel.triton is not None:
        resources, tile = compiled[kernel.name]
        share, blocks = a.triton_share, resident(resources, a)
        cached = cache_bytes(kernel.name, tile, rows(kernel, tile["c"] if "c" in tile else tile["h"]))
    found = needs(moved, products, instructions, share, a, cached=cached, alone=blocks == 1)
    floor = floor_ms(moved, 2 * macs, a)
    gaps = slices(kernel) * a.launch_us / 1e3
    return Prediction(kernel, moved, 2 * macs, blocks, found, floor, max(found.values()) + gaps)


def needs(
    moved: int, products: int, instructions: int, share: float, a: Assumptions, *, cached: int = 0, alone: bool = False
) -> dict[str, float]:
    """Milliseconds of each. products: FLOPs of the matrix units; alone: one program on a multiprocessor."""
    found = {
        "memory": 1e3 * moved / (a.memory_TBps * 1e12 * a.memory_share),
        "L2": 1e3 * cached / (a.cache_TBps * 1e12),
        "products": 1e3 * products / (a.matrix_TFLOPS * 1e12 * share),
        "instructions": 1e3 * instructions / (a.multiprocessors * 128 * a.clock_GHz * 1e9 * a.issue_share),
    }
    if alone and found["products"] and found["instructions"]:
        found["products + instructions"] = found.pop("products") + found.pop("instructions")
    return found


def floor_ms(moved: int, flops: int, a: Assumptions) -> float:
    return max(1e3 * moved / (a.memory_TBps * 1e12), 1e3 * flops / (a.matrix_TFLOPS * 1e12))


def slices(kernel: Kernel) -> int:
    """Launches that a kernel's work is cut into: the MLP's backward goes slice by slice, with 80 GB in one."""
    from cat_kernels.stem.kernels.mlp import scratch

    first = kernel.inputs[0]
    assert first is not None
    return max(1, math.ceil(kernel.scratch * first.shape[0] / scratch(first.device)))


def rows(kernel: Kernel, c: int) -> int:
    """R of a kernel's rows (R, c): of the largest of its tensors."""
    return max((t.shape[0] for t in kernel.inputs if t is not None and t.ndim == 2 and t.shape[1] == c), default=0)


def compile_needed(names: set[str]) -> dict[str, tuple[Resources, dict[str, Any]]]:
    """Resources and tiles of the named instantiations in bf16 for an H200."""
    found = {}
    for module in (m for m in modules() if m.startswith("cat_kernels.stem.")):
        for a in importlib.import_module(module).ahead("bf16", ARCHITECTURE):
            if a.name in names:
                found[a.name] = compile_ahead(a, ARCHITECTURE, "stem"), a.constexprs
    if names - set(found):
        raise ValueError(f"no ahead() of the stem's kernels lists {', '.join(sorted(names - set(found)))}")
    return found


def stem(masks: int) -> list[Kernel]:
    """Of the base model at 96 clips, without data."""
    return list(kernels({**SHAPE, "masks": masks}, torch.device("meta"), torch.bfloat16))


def compiled_names(found: Iterable[Kernel]) -> set[str]:
    return {k.name for k in found if k.triton is not None and k.forward + k.backward}


def predict_all(found: list[Kernel], compiled: dict[str, Any], a: Assumptions) -> list[Prediction]:
    return [predict(kernel, compiled, a) for kernel in found if kernel.forward + kernel.backward]


def kernel_table(predictions: list[Prediction]) -> Table:
    """A line a kernel; the library's products and sums are put together by what they are for."""
    header = ["kernel", "launches", "programs held", "floor, ms", "predicted, ms", "slowest"]
    groups: dict[str, list[Prediction]] = {}
    for p in predictions:
        name = p.kernel.name if p.resident else p.kernel.name.split(",")[0].split(" c=")[0]
        groups.setdefault(name if p.resident else f"{name} (library)", []).append(p)
    lines = []
    for name, group in groups.items():
        times = [p.kernel.forward + p.kernel.backward for p in group]
        floor = sum(n * p.floor_ms for n, p in zip(times, group, strict=True))
        total = sum(n * p.ms for n, p in zip(times, group, strict=True))
        held = str(group[0].resident) if group[0].resident else ""
        slowest = max(group, key=lambda p: p.ms).bound
        lines.append([name, str(sum(times)), held, f"{floor:.2f}", f"{total:.2f}", slowest])
    return Table("PREDICTION, not measured: the stem's kernels on an H200, all launches of a step", header, lines)


def pass_table(masked: list[Prediction], dense: list[Prediction]) -> Table:
    header = ["pass", "TFLOP", "floor, ms", "predicted, ms", "budget, ms"]
    passes = {
        "forward": (masked, ("forward",)),
        "forward + backward": (masked, ("forward", "backward")),
        "teacher's forward": (dense, ("forward",)),
    }
    lines = []
    for name, (predictions, directions) in passes.items():
        times = [sum(getattr(p.kernel, d) for d in directions) for p in predictions]
        sums = [
            sum(n * getattr(p, what) for n, p in zip(times, predictions, strict=True))
            for what in ("flops", "floor_ms", "ms")
        ]
        budget = BUDGETS_MS[name]
        lines.append(
            [name, f"{sums[0] / 1e12:.1f}", f"{sums[1]:.1f}", f"{sums[2]:.1f}", f"{budget:.0f}" if budget else ""]
        )
    return Table("PREDICTION, not measured: the stem on an H200, base model, 96 clips, 4 masks, bf16", header, lines)
