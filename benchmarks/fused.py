"""What fusing saves: bytes and launches of every operator, as PyTorch users write it and as the kernels do it.

    python -m benchmarks.fused            # base model, 96 clips, 4 masks, bf16; half a minute, needs no GPU
    python -m benchmarks.fused --write    # also between the markers of docs/fusion.md
    python -m benchmarks.fused --check    # instead: exit code 1 where what stands there is out of date

Counted, not measured: both sides run on a GPU that is not there (`benchmarks.standin`) under `benchmarks.trace`, which
counts every argument and every result of an operation once. Before: `benchmarks.usual`, the stem's dense formula under
autocast, and for a kernel of the stem `benchmarks.composed`.
"""

from __future__ import annotations

from benchmarks import standin

# isort: split
import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.kernels import converted, kernels
from benchmarks.operators import OperatorProvider, spec_named
from benchmarks.report import write_between
from benchmarks.runner import say
from benchmarks.stem import StemProvider, inputs
from benchmarks.tables import Table
from benchmarks.trace import Trace
from benchmarks.usual import USUAL
from cat.provenance import ROOT
from cat_kernels import spec as specification
from cat_kernels.specs import specs

PAGE = ROOT / "docs" / "fusion.md"
SHAPE = {"preset": "base", "clips": 96, "masks": 4, "frames": 1024}
DTYPE = torch.bfloat16
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Cost:
    launches: int
    bytes: int


@dataclass(frozen=True)
class Row:
    name: str
    passes: str
    before: Cost
    after: Cost
    size: str = ""  # of the largest tensor that goes in
    times: int = 1


_tracing: list[Trace] = []


def _launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
    """In place of `triton.JITFunction.run`: nothing is compiled."""
    for trace in _tracing:
        trace.launched(kernel, args, meta)


def cost(call: Callable[[], object]) -> Cost:
    """Of a call's second run: the first makes tables that later ones find."""
    call()
    trace = Trace(GPU)
    _tracing.append(trace)
    with trace.tracing():
        call()
    _tracing.remove(trace)
    return Cost(sum(o.launches for o in trace.operations), sum(o.bytes for o in trace.operations))


def repeat_and_index(prediction: Tensor, target: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`usual.repeat_and_select` with the masked places by number: how many a mask has, no stand-in can tell."""
    N, L, D = prediction.shape
    mask = torch.ones(N, L, dtype=torch.bool, device=visible.device).scatter(1, visible, False)
    places = mask.flatten().nonzero()[: N * (L - visible.shape[1]), 0]
    p = prediction.flatten(0, 1).index_select(0, places).float()
    y = target.repeat_interleave(N // target.shape[0], dim=0).flatten(0, 1).index_select(0, places).float()
    loss = (p - y).square().sum(-1).mean() * D**-0.5
    with torch.no_grad():
        deviations = [(x.var(0) + 1e-6).sqrt().mean() for x in (p, y)]
    return loss, *deviations


def stem(shape: dict[str, Any]) -> Iterator[Row]:
    for mode, passes in (("forward", "forward"), ("forward+backward", "both")):
        found = [cost(StemProvider(name, shape, "bf16", mode, GPU).call) for name in ("dense", "triton")]
        yield Row("`MultiResConv`", passes, *found, "x".join(map(str, inputs(shape, torch.device("cpu"))[0].shape)))


def operators(clips: int) -> Iterator[Row]:
    USUAL["masked_regression_loss"] = {"repeat, index": repeat_and_index}
    for spec in specs():
        usual = next(iter(USUAL.get(spec.name, ())), None)
        if usual is None:
            continue
        sample = spec.benchmark(GPU, DTYPE, clips)
        for mode in ("forward", "both") if sample.differentiable else ("forward",):
            found = [cost(OperatorProvider(spec, sample, name, mode).call) for name in (usual, "operator")]
            yield Row(f"`{spec.name}`", mode, *found, largest(sample.inputs))


def features(clips: int) -> Row:
    spec = spec_named("fbank")
    sample = spec.benchmark(GPU, torch.float32, clips)
    before = cost(OperatorProvider(spec, sample, "reference", "forward").call)
    return Row("`fbank`", "forward", before, Cost(1, spec.bytes_forward(sample.inputs)), largest(sample.inputs))


def largest(given: Any) -> str:
    found = max(specification.floats(given), key=torch.Tensor.numel)
    return "x".join(map(str, found.shape))


def stem_kernels(shape: dict[str, Any]) -> Iterator[Row]:
    """Those of ours that the stem's passes run, with how often."""
    for kernel in kernels(shape, GPU, DTYPE):
        times = kernel.forward + kernel.backward
        if kernel.triton is None or not times:
            continue
        passes = "both" if kernel.forward and kernel.backward else "forward" if kernel.forward else "backward"
        given = converted(kernel.inputs, DTYPE)
        with torch.no_grad():
            before = cost(lambda kernel=kernel, given=given: kernel.pytorch(*given))
            after = cost(lambda kernel=kernel: kernel.triton(*kernel.inputs))
        yield Row(f"`{kernel.name}`", passes, before, after, times=times)


def table(title: str, rows: list[Row], second: str) -> Table:
    """GB and launches of all of a row's calls, before and after. ``second``: the column "largest input" or "calls"."""
    header = ["", "pass", second, "launches before", "after", "GB before", "after", "saved"]
    lines = []
    for r in rows:
        before, after = (r.times * c.bytes / 1e9 for c in (r.before, r.after))
        lines.append([
            r.name, r.passes, r.size or str(r.times), str(r.times * r.before.launches),
            str(r.times * r.after.launches), f"{before:.2f}", f"{after:.2f}", f"{before / after:.1f}x",
        ])  # fmt: skip
    return Table(title, header, lines)


def counted(shape: dict[str, Any]) -> list[Table]:
    where = f"{shape['preset']} model, {shape['clips']} clips, {shape['masks']} masks, bf16"
    with standin.gpu():
        ops = [*stem(shape), *operators(shape["clips"]), features(shape["clips"])]
        inside = list(stem_kernels(shape))
    return [
        table(f"Operators, one call at the size of their benchmark, counted; {where}", ops, "largest input"),
        table(f"Kernels of the stem, all calls of a step, counted; {where}", inside, "calls"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_mutually_exclusive_group().add_argument
    add("--write", action="store_true", help=f"also into {PAGE.relative_to(ROOT)}")
    add("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args()
    standin.install(90)
    triton.JITFunction.run = _launched
    versions = f"Counted with PyTorch {torch.__version__.partition('+')[0]}."
    tables = counted(SHAPE)
    text = "\n\n".join(found.markdown() for found in tables) + f"\n\n{versions}\n"
    if options.check:
        there = re.search(r"<!-- fused:begin -->\n(.*)<!-- fused:end -->", PAGE.read_text(), re.DOTALL)
        if there is None or there[1] != text:
            say(f"{PAGE.relative_to(ROOT)} is out of date, run python -m benchmarks.fused --write\n\n{text}")
            return 1
        return 0
    for found in tables:
        say(found.text() + "\n")
    say(versions)
    if options.write:
        write_between(PAGE, "fused", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
