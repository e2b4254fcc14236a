"""A pre-training step on the GPU that is not there, traced: `benchmarks.trace`. Prints what it found as JSON.

    python -m benchmarks.traced_step --shape '{"preset": "base", "clips": 96, "masks": 4, "frames": 1024}'
    python -m benchmarks.traced_step --counts      # instead: launches, bytes and FLOPs of a small step, by part
    python -m benchmarks.traced_step --renew       # the same into tests/step_counts.json, which a test compares

In bf16, by the model's own kernels, of which none is compiled; the second step, as the first makes tables and moments.
"""

from __future__ import annotations

from benchmarks import standin

# isort: split
import argparse
import dataclasses
import json
import sys
from typing import Any

import torch
import triton

from benchmarks.results import write_atomic
from benchmarks.stem import inputs
from benchmarks.step_time import OBJECTIVE, OPTIM
from benchmarks.trace import Trace, counts
from cat.model import CAT, PRESETS
from cat.provenance import ROOT
from cat.training.step import PretrainStep

COUNTS = ROOT / "tests" / "step_counts.json"
SMALL = {"preset": "tiny", "depth": 2, "clips": 2, "masks": 2, "frames": 64}


def trace_step(shape: dict[str, Any]) -> Trace:
    """shape: as of `benchmarks.step_time`; any other field of the model's configuration may be in it too."""
    device = torch.device("cuda")
    fields = {f.name for f in dataclasses.fields(PRESETS["base"])} & shape.keys()
    config = dataclasses.replace(PRESETS[shape["preset"]], **{name: shape[name] for name in fields})
    trace = Trace(device)
    traced: list[Trace] = []

    def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        for one in traced:
            one.launched(kernel, args, meta)

    triton.JITFunction.run = launched
    spec, visible = inputs(shape, torch.device("cpu"))
    with standin.gpu():
        step = PretrainStep(CAT(config, OBJECTIVE).to(device).train(), OPTIM, precision="bf16")
        batch = spec.to(device), visible.to(device), None, torch.zeros(2, dtype=torch.int64, device=device)
        step(*batch, lr=1e-7, decay=0.9998)
        trace.watch_model(step.model)
        traced.append(trace)
        with trace.tracing():
            step(*batch, lr=1e-7, decay=0.9998)
    return trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--shape", type=json.loads, help="JSON: preset, clips, masks, frames; other fields of a model's configuration")
    add("--counts", action="store_true", help="launches, bytes and FLOPs of a small step, by part")
    add("--renew", action="store_true", help=f"the same into {COUNTS.relative_to(ROOT)}, where a change is meant")
    options = parser.parse_args()
    standin.install(90)
    if options.shape:
        print(json.dumps(trace_step(options.shape).as_dict()))
        return 0
    found = {"torch": ".".join(torch.__version__.split(".")[:2]), "parts": counts(trace_step(SMALL).operations)}
    if options.renew:
        write_atomic(COUNTS, json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
