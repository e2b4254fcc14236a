"""The whole pre-training step on an H200, by arithmetic: `benchmarks.predict` writes its tables.

The step is traced without data (`benchmarks.traced_step`), and every operation takes as long as the slowest of what it
needs, as in `benchmarks.predicted_stem`. A launch of a Triton kernel that `benchmarks.kernels` lists needs what that
list says, in proportion to its rows; any other kernel its bytes, and `Assumptions.instructions` an element.

Compiled blocks: a run of element-wise operations and norms between products is one kernel, which reads what was made
before it and writes what is read after it. That is a guess of what inductor does; it also keeps less for the backward.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import predicted_stem
from benchmarks.ahead import Resources, modules
from benchmarks.kernels import Kernel
from benchmarks.predicted_stem import SHAPE, Assumptions, floor_ms, needs
from benchmarks.results import write_atomic
from benchmarks.tables import Table
from benchmarks.trace import name_of
from cat.provenance import ROOT, commit, versions

PREDICTIONS = Path(__file__).resolve().parent / "predictions"
BEFORE, AFTER = PREDICTIONS / "before.json", PREDICTIONS / "after.json"
CODE = ("cat", "cat_kernels", ":(exclude)*.md")  # what is predicted
TITLE = "PREDICTION, not measured: "

# In the order of a step; goals in ms: twice the floor of stem and step, a share of the copy bandwidth for the others.
GOALS_MS: dict[str, float | None] = {
    **{"features": 0.08, "teacher's stem": 10.0, "teacher's blocks": None, "targets": 0.31, "student's stem": 24.0},
    **{"tokens": None, "blocks": None, "restore": 0.1, "decoder": None, "loss": 0.163, "rest": None},
    **{"optimiser": None, "EMA": 0.322, "step": 112.0},
}
COMPILED = ("blocks", "teacher's blocks", "decoder")  # whose element-wise work `run.compile: blocks` fuses
KINDS = {
    "products": ("mm", "addmm", "bmm", "matmul", "baddbmm"),
    "attention": ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    "convolutions": ("convolution", "convolution_backward"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "casts": ("_to_copy", "to"),
    "sums over rows": ("sum",),
    "lists of tensors": ("_foreach_norm", "_foreach_mul_", "_foreach_copy_", "_foreach_add_", "_fused_adamw_"),
}
# Warp instructions of log-mel features: 44 to 50 us of them for 96 clips, counted for `cat_kernels.mel`'s kernel.
FBANK_ISSUE_MS = 0.05


def traced(shape: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks.trace` finds in a step, in a process of its own. Raises RuntimeError with its last words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "benchmarks.traced_step", "--shape", json.dumps(shape)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the step {shape} was not traced: {words}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- one operation


@dataclass
class Cost:
    """Of one operation, or of a run of fused ones."""

    part: str
    backward: bool
    kind: str
    launches: int
    bytes: int
    flops: int
    instructions: int  # of threads
    floor_ms: float
    ms: float


def kind_of(name: str) -> str:
    if name.startswith("triton "):
        return "Triton kernels"
    return next((kind for kind, names in KINDS.items() if name in names), "other element-wise and copies")


class Model:
    """Costs of operations under assumptions."""

    def __init__(self, a: Assumptions) -> None:
        self.a = a
        listed = [*predicted_stem.stem(0), *predicted_stem.stem(SHAPE["masks"])]
        self.kernels = {k.name: k for k in listed if k.forward + k.backward}
        self.compiled = predicted_stem.compile_needed(predicted_stem.compiled_names(listed))
        self.ahead = [one for module in modules() for one in importlib.import_module(module).ahead("bf16", 90)]

    def cost(self, o: dict[str, Any]) -> Cost:
        a, kind, alone, cached = self.a, kind_of(o["name"]), False, 0
        share = {"attention": a.attention_share, "convolutions": a.grouped_share}.get(kind, a.library_share)
        flops, products = o["flops"], o["flops"]
        instructions = 0 if flops else self._elementwise(o)
        if kind == "Triton kernels":
            share = a.triton_share
            listed = self._listed(o)
            if listed is not None:
                kernel, resources, tile = listed
                width = tile["c"] if "c" in tile else tile["h"]
                part = self._rows(o, width) / self._rows_of(kernel, width)
                flops = int(2 * kernel.work()[1] * part)
                products = flops - int(50 * kernel.scalar.get("depthwise", 0) * part)
                instructions = int(part * sum(a.instructions[name] * n for name, n in kernel.scalar.items()))
                alone = predicted_stem.resident(resources, a) == 1
                cached = predicted_stem.cache_bytes(kernel.name, tile, self._rows(o, width))
        found = needs(o["bytes"], products, instructions, share, a, cached=cached, alone=alone)
        ms = max(found.values()) + o["launches"] * a.launch_us / 1e3
        floor = floor_ms(o["bytes"], flops, a)
        return Cost(o["part"], o["backward"], kind, o["launches"], o["bytes"], flops, instructions, floor, ms)

    def _elementwise(self, o: dict[str, Any]) -> int:
        """Instructions, by the words in its name."""
        words = o["name"].split(".")[-1].replace("native_", "").split("_")
        direction = "_backward" if "backward" in words else ""
        found = [self.a.instructions[word + direction] for word in ("norm", "gelu") if word in words]
        if not found:
            known = o["part"] in self.a.instructions and o["name"].startswith("triton ")
            found = [self.a.instructions[o["part"] if known else "other"]]
        return sum(found) * o["elements"]

    def _listed(self, o: dict[str, Any]) -> tuple[Kernel, Resources, dict[str, Any]] | None:
        """The stem's kernel that this launch is one of: the same function, of its constants most the same."""
        given, best = o["arguments"], (0, None)
        for one in self.ahead:
            if one.name not in self.compiled or name_of(one.kernel) != o["name"]:
                continue
            same = [given.get(name) == value for name, value in one.constexprs.items()]
            if given.get("c") == one.constexprs.get("c") and sum(same) > best[0]:
                best = sum(same), one
        if best[1] is not None:
            return self.kernels[best[1].name], *self.compiled[best[1].name]
        if o["multiplies"] and not o["flops"]:
            raise ValueError(
                f"{o['name']} multiplies matrices, and neither benchmarks.kernels lists it for these sizes nor "
                "benchmarks.flops.FORMULAS says how many FLOPs its operator does"
            )
        return None

    @staticmethod
    def _rows(o: dict[str, Any], c: int) -> int:
        return o["rows"].get(str(c), 0)

    @staticmethod
    def _rows_of(kernel: Kernel, c: int) -> int:
        return predicted_stem.rows(kernel, c) or kernel.scalar["norm"] // c


# ---------------------------------------------------------------- compiled blocks


def fused(operations: Sequence[dict[str, Any]], model: Model) -> list[Cost]:
    """Costs with the runs of element-wise operations and norms of `COMPILED` parts each as one kernel."""
    last_read = {number: i for i, o in enumerate(operations) for number, _ in o["reads"]}
    costs, run = [], range(0)
    for i, o in enumerate((*operations, None)):
        joins = o is not None and o["part"] in COMPILED and _fuses(o["name"])
        if joins and run and (operations[run[0]]["part"], operations[run[0]]["backward"]) == (o["part"], o["backward"]):
            run = range(run.start, i + 1)
            continue
        if run:
            costs.append(_as_one(operations, run, last_read, model))
        run = range(i, i + 1) if joins else range(0)
        if o is not None and not joins:
            costs.append(model.cost(o))
    return costs


def _fuses(name: str) -> bool:
    return kind_of(name) in ("norms", "GELU", "casts", "other element-wise and copies")


def _as_one(operations: Sequence[dict[str, Any]], run: range, last_read: dict[int, int], model: Model) -> Cost:
    read: dict[int, int] = {}
    made: dict[int, int] = {}
    for o in (operations[i] for i in run):
        for number, size in o["reads"]:
            if number not in made:
                read[number] = max(size, read.get(number, 0))
        for number, size in o["writes"]:
            made[number] = max(size, made.get(number, 0))
    moved = sum(read.values()) + sum(size for number, size in made.items() if last_read.get(number, -1) >= run.stop)
    alone = [model.cost(operations[i]) for i in run]
    sizes = {operations[i]["elements"] for i in run}  # what has another size, a weight that is cast, is no part of it
    instructions = sum(c.instructions for c in alone)
    found = needs(moved, 0, instructions, 1.0, model.a)
    ms = max(found.values()) + len(sizes) * model.a.launch_us / 1e3
    first = alone[0]
    return Cost(
        first.part, first.backward, first.kind, len(sizes), moved, 0, instructions, floor_ms(moved, 0, model.a), ms
    )


# ---------------------------------------------------------------- the step


def predicted(shape: dict[str, Any], a: Assumptions) -> dict[str, Any]:
    """Parts of a step: launches, bytes, FLOPs, warp instructions and milliseconds; memory; and where it comes from."""
    found, model = traced(shape), Model(a)
    costs = [model.cost(o) for o in found["operations"]]
    compiled = fused(found["operations"], model)
    parts = {}
    for name in GOALS_MS:
        own = costs if name == "step" else [c for c in costs if c.part == name]
        parts[name] = _sum(own)
        parts[name] |= {"compiled_ms": sum(c.ms for c in compiled if name in ("step", c.part))}
    features = _features(shape, a)
    parts["features"] = features
    for name, value in features.items():
        parts["step"][name] += value
    kinds = {kind: _sum([c for c in costs if c.kind == kind]) for kind in dict.fromkeys(c.kind for c in costs)}
    return {
        "commit": commit(CODE), "versions": versions(), "shape": shape, "dtype": "bf16", "assumptions": asdict(a),
        "parts": parts, "kinds": kinds,
        "memory": {"peak_MiB": found["peak_bytes"] / 2**20, "at_peak": _at_peak(found), "kept": kept(found)},
    }  # fmt: skip


def _sum(costs: Sequence[Cost]) -> dict[str, float]:
    return {
        "launches": sum(c.launches for c in costs),
        "bytes": sum(c.bytes for c in costs),
        "flops": sum(c.flops for c in costs),
        "warp_instructions": sum(c.instructions for c in costs) // 32,
        "floor_ms": sum(c.floor_ms for c in costs),
        "forward_ms": sum(c.ms for c in costs if not c.backward),
        "backward_ms": sum(c.ms for c in costs if c.backward),
        "ms": sum(c.ms for c in costs),
    }


def _features(shape: dict[str, Any], a: Assumptions) -> dict[str, float]:
    """Log-mel features of ten-second clips, which the extension's one kernel makes on a GPU: not traced."""
    moved = shape["clips"] * 4 * (160_000 + 128 * shape["frames"])
    issue = FBANK_ISSUE_MS * shape["clips"] / 96
    floor = floor_ms(moved, 0, a)
    ms = max(max(needs(moved, 0, 0, 1.0, a).values()), issue / a.issue_share) + a.launch_us / 1e3
    warps = int(1e-3 * issue * a.multiprocessors * 4 * a.clock_GHz * 1e9)
    return {"launches": 1, "bytes": moved, "flops": 0, "warp_instructions": warps, "floor_ms": floor,
            "forward_ms": ms, "backward_ms": 0.0, "ms": ms, "compiled_ms": ms}  # fmt: skip


# ---------------------------------------------------------------- memory

# What the stem's operators put out, in words; what is not here goes by its own name.
KEPT = {
    "stem_embed_pixels.0": "the finest embedding, after its LayerNorm",
    "stem_layer_norm.0": "an embedding, after its LayerNorm",
    "stem_conv_block.0": "a conv block's output",
    "stem_conv_block.1": "rows in front of the depthwise convolution",
    "stem_conv_block.2": "rows in front of the MLP",
    "stem_halo_rows.0": "a table of neighbours",
    "stem_add_product.0": "an embedding in front of its LayerNorm, or the tokens",
    "clone": "weights in the order of the rows",
    "_to_copy": "the spectrogram and weights in bf16",
}
RECOMPUTED = tuple(f"stem_conv_block.{i}" for i in range(1, 9))  # with recompute=True: all but the block's output


def kept(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the student's stem leaves in memory for its backward: words, width, how many, bytes a visible patch."""
    left = found["kept"]["student's stem"]
    patches = min(a["shape"][0] for a in left if a["made_by"] == "stem_layer_norm.0")  # the last stage's rows
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for a in left:
        c = a["shape"][-1] if a["made_by"] != "_to_copy" else 0
        what, again = KEPT.get(a["made_by"], a["made_by"]), a["made_by"].startswith(RECOMPUTED)
        line = lines.setdefault((a["made_by"], c), {"what": what, "width": c, "recomputed": again, "count": 0})
        line["count"] += 1
        line["bytes_per_patch"] = line.get("bytes_per_patch", 0.0) + a["bytes"] / patches
    return list(lines.values())


def _at_peak(found: dict[str, Any]) -> dict[str, float]:
    """MiB by part whose operations made it."""
    total: dict[str, float] = {}
    for part, backward, size in found["at_peak"]:
        name = f"{part}, backward" if backward else part
        total[name] = total.get(name, 0.0) + size / 2**20
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# ---------------------------------------------------------------- tables


def step_table(p: dict[str, Any]) -> Table:
    header = ["part", "launches", "GB", "TFLOP", "G warp instructions", "floor, ms", "forward, ms", "backward, ms",
              "in all, ms", "goal, ms", "blocks compiled, ms"]  # fmt: skip
    return Table(f"{TITLE}a step on an H200, {described(p)}", header, [
        [name, str(c["launches"]), f"{c['bytes'] / 1e9:.2f}", f"{c['flops'] / 1e12:.2f}",
         f"{c['warp_instructions'] / 1e9:.2f}", _ms(c["floor_ms"]), _ms(c["forward_ms"]), _ms(c["backward_ms"]),
         _ms(c["ms"]), _goal(name), _ms(c["compiled_ms"])]
        for name, c in p["parts"].items()
    ])  # fmt: skip


def kind_table(p: dict[str, Any]) -> Table:
    kinds = sorted(p["kinds"].items(), key=lambda item: -item[1]["ms"])
    rows = [[n, str(c["launches"]), f"{c['bytes'] / 1e9:.1f}", f"{c['flops'] / 1e12:.1f}", f"{c['ms']:.1f}"]
            for n, c in kinds]  # fmt: skip
    return Table(f"{TITLE}the step by kind of operation", ["kind", "launches", "GB", "TFLOP", "ms"], rows)


def memory_table(p: dict[str, Any]) -> Table:
    memory = p["memory"]
    rows = [[name, f"{size / 1024:.2f}"] for name, size in memory["at_peak"].items() if size >= 1]
    rows.append(["in all", f"{memory['peak_MiB'] / 1024:.2f}"])
    title = f"{TITLE}memory at the worst moment of a step, above weights, optimiser and inputs; {described(p)}"
    return Table(title, ["made by", "GiB"], rows)


def kept_table(p: dict[str, Any]) -> Table:
    lines = [line for line in p["memory"]["kept"] if line["bytes_per_patch"] >= 1]
    rows = [[line["what"], str(line["width"] or ""), str(line["count"]), f"{line['bytes_per_patch']:,.0f}"]
            for line in sorted(lines, key=lambda line: -line["bytes_per_patch"])]  # fmt: skip
    for what, left_out in (("in all", ()), ("in all with `recompute=True`", (True,))):
        total = sum(line["bytes_per_patch"] for line in lines if line["recomputed"] not in left_out)
        rows.append([what, "", "", f"{total:,.0f}"])
    title = f"What stays of the stem's forward for its backward, counted on a traced step; {described(p)}"
    return Table(title, ["tensor", "channels", "tensors", "bytes a visible patch"], rows)


def comparison_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    header = ["part", "launches", "after", "GB", "after", "ms", "after", "blocks compiled, ms", "after", "goal, ms"]
    rows = []
    for name in GOALS_MS:
        row = [name]
        for field, words in (("launches", str), ("bytes", _gb), ("ms", _ms), ("compiled_ms", _ms)):
            row += [words(p["parts"][name][field]) for p in (before, after)]
        rows.append([*row, _goal(name)])
    peaks = [f"{p['memory']['peak_MiB'] / 1024:.2f}" for p in (before, after)]
    rows.append(["peak memory, GiB", "", "", *peaks, "", "", "", "", ""])
    return Table(f"{TITLE}a step before and after, {before['commit']} and {after['commit']}", header, rows)


def described(p: dict[str, Any]) -> str:
    shape = p["shape"]
    return f"{shape['preset']} model, {shape['clips']} clips, {shape['masks']} masks, {p['dtype']}"


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _goal(name: str) -> str:
    goal = GOALS_MS[name]
    return "" if goal is None else f"{goal:g}"


def of(shape: dict[str, Any], dtype: str) -> dict[str, Any] | None:
    """What is predicted of such a step, as it was last written."""
    found = load(AFTER) if AFTER.exists() else None
    return found if found and (found["shape"], found["dtype"]) == (shape, dtype) else None


def peak_MiB(shape: dict[str, Any], dtype: str) -> float | None:
    found = of(shape, dtype)
    return found["memory"]["peak_MiB"] if found else None


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def save(p: dict[str, Any], path: Path) -> None:
    write_atomic(path, json.dumps(p, indent=1) + "\n")
