"""The Triton kernels compiled ahead for GPUs that are not here: registers, shared memory, spills. Needs no GPU.

    python -m benchmarks.ahead            # the table
    python -m benchmarks.ahead --json     # the numbers, for the tests
    python -m benchmarks.ahead --write    # the tables, also into each operator's README.md, between the markers there

Each module of kernels names what it runs at the base model's widths (`ahead()`), with the tiles it would use there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cat_kernels
from benchmarks.report import write_between
from benchmarks.tables import Table
from cat.provenance import ROOT

ARCHITECTURES = (80, 86, 90, 100)
USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+).*?LOCAL:(?P<local>\d+)")


def modules() -> list[str]:
    """Those of the package that hold Triton kernels: `cat_kernels.<operator>.kernels`, or modules in there."""
    names = [found.name for found in pkgutil.walk_packages(cat_kernels.__path__, "cat_kernels.") if not found.ispkg]
    return [name for name in names if "kernels" in name.split(".")[2:] and not name.endswith(".tiles")]


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture: registers a thread, bytes of shared memory a block; bytes a thread of
    stack, where registers are spilled to."""

    folder: str  # of the operator, in cat_kernels
    name: str
    architecture: int
    warps: int
    registers: int
    shared_bytes: int
    stack_bytes: int


def compile_ahead(a: Any, architecture: int, folder: str = "") -> Resources:
    """`a`: `cat_kernels._triton.Ahead`."""
    import triton
    from triton._utils import find_paths_if
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: a.signature.get(name, "constexpr") for name in a.kernel.arg_names}
    # As at a launch: tensors that PyTorch allocates are aligned to 16 bytes.
    pointers = find_paths_if(list(signature.values()), lambda _, type_: isinstance(type_, str) and type_[0] == "*")
    attrs = {path: [["tt.divisibility", 16]] for path in pointers}
    source = ASTSource(fn=a.kernel, signature=signature, constexprs=a.constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=a.options)
    usage = resource_usage(compiled.asm["cubin"])
    return Resources(
        folder=folder,
        name=a.name,
        architecture=architecture,
        warps=a.options.get("num_warps", 4),
        registers=int(usage["registers"]),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=int(usage["stack"]) + int(usage["local"]),
    )


def resource_usage(cubin: bytes) -> re.Match[str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = USAGE.search(said.stdout)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {said.stdout!r}")
    return found


def compile_module(module: str, architecture: int) -> list[Resources]:
    """In bf16, and for sm_90 in fp32 too. sm_86 runs what is made for sm_80: only tiles of its own are compiled."""
    ahead = importlib.import_module(module).ahead
    wanted = ahead("bf16", architecture)
    if architecture == 86:
        wanted = [a for a in wanted if a not in ahead("bf16", 80)]
    elif architecture == 90:
        wanted += [dataclasses.replace(a, name=f"{a.name}, fp32") for a in ahead("fp32", architecture)]
    folder = module.split(".")[1]
    found = [compile_ahead(a, architecture, folder) for a in wanted]
    if architecture == 80:
        names = {a.name for a in ahead("bf16", 86) if a in wanted}
        found += [dataclasses.replace(r, architecture=86) for r in found if r.name in names]
    return found


def compile_all() -> list[Resources]:
    pairs = [(module, architecture) for module in modules() for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return [r for found in pool.map(compile_module, *zip(*pairs, strict=True)) for r in found]


def table(found: list[Resources]) -> Table:
    """A line a kernel: warps, registers a thread, shared memory a block on every architecture."""
    cells: dict[str, dict[int, str]] = {}
    for r in found:
        spilled = f", {r.stack_bytes} spilled" if r.stack_bytes else ""
        cell = f"{r.warps}, {r.registers}, {r.shared_bytes / 1024:.0f} KiB{spilled}"
        cells.setdefault(r.name, {})[r.architecture] = cell
    rows = [[name, *(by.get(a, "") for a in ARCHITECTURES)] for name, by in cells.items()]
    title = "Triton kernels, bf16 unless said: warps, registers a thread, shared memory a block"
    return Table(title, ["kernel", *(f"sm_{a}" for a in ARCHITECTURES)], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print numbers")
    parser.add_argument("--write", action="store_true", help="also into the operators' README.md")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it", file=sys.stderr)
        return 2
    found = compile_all()
    if options.json:
        print(json.dumps([dataclasses.asdict(r) for r in found]))
        return 0
    for folder in sorted({r.folder for r in found}):
        made = table([r for r in found if r.folder == folder])
        print(f"{folder}\n{made.text()}\n")
        if options.write:
            import triton

            document = ROOT / "cat_kernels" / folder / "README.md"
            write_between(document, "ahead", f"{made.markdown()}\n\nTriton {triton.__version__}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
