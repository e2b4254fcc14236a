"""Registers, shared memory and spills of the CUDA kernels, as the compiler tells them. Needs nvcc, and no GPU.

    python -m benchmarks.resources            # the table
    python -m benchmarks.resources --write    # also into cat_kernels/mel/README.md, between the markers there

The kernels' shared memory is sized at the launch; the one told is of the settings of AudioSet (128 mel bins, frames of
25 ms at 16 kHz).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import write_between
from benchmarks.tables import Table
from cat.provenance import ROOT

SOURCE = ROOT / "csrc" / "fbank" / "cuda.cu"
DOCUMENT = ROOT / "cat_kernels" / "mel" / "README.md"
ARCHITECTURES = ("80", "90", "100")
# Bytes of shared memory of a multiprocessor that blocks can use, from the programming guide's table of capabilities;
# each block takes another KiB of them.
SHARED_BYTES = {"80": 164 * 1024, "90": 228 * 1024, "100": 228 * 1024}
REGISTERS = 65536  # of a multiprocessor, handed out in units of 8 a thread

ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<architecture>\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
STATIC = re.compile(r"(\d+) bytes smem")
NAME = re.compile(r"(\w+)(?:<(?:\w+::)*(\w+)>)?\(")

SIZES = """
#include <cstdio>
#include "fbank/block.h"
int main() {
  const cat::FbankShape shape = {400, 160, 512, 128};
  const cat::FbankTables tables = cat::fbank_tables(shape, 16000, 20, 8000, cat::Window::hanning);
  std::printf("fbank_400 %d %d\\n", int(cat::kBlockThreads), int(cat::Block400::bytes(tables.view())));
  std::printf("fbank_general %d %d\\n", int(cat::kBlockThreads), int(cat::GeneralBlock::bytes(shape)));
}
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; bytes a block (shared memory) or a thread (the rest)."""

    name: str  # fbank_400
    type: str  # of its output: float, Half or BFloat16
    architecture: str  # 90
    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # stores and loads


def find_nvcc() -> str | None:
    """In the places where the build looks (docs/install.md)."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = [shutil.which("nvcc", path=f"{home}/bin") for home in homes]
    return next(filter(None, [*found, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)


def known(nvcc: str, architectures: tuple[str, ...] = ARCHITECTURES) -> tuple[str, ...]:
    """Those of the architectures that this nvcc compiles for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(a for a in architectures if f"compute_{a}" in listed)


def compiler_output(nvcc: str, architectures: tuple[str, ...]) -> str:
    """What ptxas says of SOURCE, names demangled."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-fatbin", str(SOURCE)]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        done = subprocess.run([*command, "-o", f"{folder}/fatbin"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc cannot compile {SOURCE}:\n{done.stderr}")
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    said = done.stdout + done.stderr
    return subprocess.run([demangler], input=said, capture_output=True, text=True).stdout if demangler else said


def parse(said: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed, in its order; raises ValueError where a number is missing."""
    entries = list(ENTRY.finditer(said))
    kernels = []
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        part = said[entry.end() : following.start() if following else None]
        stack, used = STACK.search(part), USED.search(part)
        if not stack or not used:
            raise ValueError(f"ptxas said nothing of the registers or the stack of {entry['name']}: {part!r}")
        static = STATIC.search(part)
        name = NAME.search(entry["name"].replace("(anonymous namespace)::", ""))
        kernels.append(
            Kernel(
                name=name[1] if name else entry["name"],
                type=(name[2] or "") if name else "",
                architecture=entry["architecture"],
                registers=int(used[1]),
                static_shared_bytes=int(static[1]) if static else 0,
                stack_bytes=int(stack[1]),
                spill_bytes=int(stack[2]) + int(stack[3]),
            )
        )
    return kernels


def launch_sizes(nvcc: str) -> dict[str, tuple[int, int]]:
    """Kernel -> threads of a block, bytes of shared memory asked for at the launch: computed by the sources."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sizes.cu").write_text(SIZES)
        sources = [f"{folder}/sizes.cu", str(SOURCE.with_name("tables.cpp"))]
        command = [nvcc, "-std=c++17", f"-I{ROOT / 'csrc'}", *sources, "-o", f"{folder}/sizes"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc cannot compile what tells the launch sizes:\n{done.stderr}")
        lines = subprocess.run([f"{folder}/sizes"], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: (int(threads), int(size)) for name, threads, size in map(str.split, lines)}


def blocks_of_a_multiprocessor(kernel: Kernel, threads: int, dynamic_bytes: int) -> int:
    """As far as registers and shared memory go."""
    by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * threads)
    by_memory = SHARED_BYTES[kernel.architecture] // (kernel.static_shared_bytes + dynamic_bytes + 1024)
    return min(by_registers, by_memory)


def table(kernels: list[Kernel], sizes: dict[str, tuple[int, int]]) -> Table:
    header = ["kernel", "output", "architecture", "registers", "shared bytes", "spilled bytes", "blocks an SM"]
    rows = []
    for k in sorted(kernels, key=lambda k: (k.name, k.type, int(k.architecture))):
        threads, dynamic = sizes[k.name]
        shared = k.static_shared_bytes + dynamic
        blocks = blocks_of_a_multiprocessor(k, threads, dynamic)
        numbers = [k.registers, shared, k.spill_bytes, blocks]
        rows.append([k.name, k.type, f"sm_{k.architecture}", *map(str, numbers)])
    return Table("What the CUDA kernels take", header, rows)


def version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d[\d.]*)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"also into {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found; docs/install.md tells where it is looked for", file=sys.stderr)
        return 2
    made = table(parse(compiler_output(nvcc, known(nvcc))), launch_sizes(nvcc))
    print(made.text())
    if options.write:
        write_between(DOCUMENT, "resources", f"{made.markdown()}\n\n{version(nvcc)}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
