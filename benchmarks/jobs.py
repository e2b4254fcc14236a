"""The GPU suite's tests and pieces on the stand-in, each in a process of its own: what they ask Triton for.

    python -O -m benchmarks.jobs NAME --arch 90 --out FILE    # one of them; `benchmarks.cache` starts them all

Nothing is compared, timed or counted; a test that ends early launches less than on a GPU, and is named. The stand-in
must be imported before PyTorch, so nothing at the top of this file may import that.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Pieces of the suite that launch kernels of ours. What only compilers are asked for in addition launches the same.
MODULES = ("launch", "stem", "step_time", "step_parts", "kernels", "operators", "finetune", "inference", "sanitize")
MARKED = re.compile(r"mark\.(gpu|either)\b")
LAUNCHES = re.compile(r'"triton"|\bCAT\b|\bspec as S\b|\bcat_kernels\.stem\.kernels\b|import .*\bkernels\b')
# Tests of the operators whose launches are those of test_parity and test_awkward_inputs, over again.
REPEATS = "outputs_are_written or opcheck or inductor or graph_breaks or recompile or no_synchronisation or inputs_and"


def jobs() -> list[str]:
    """Test files, and pieces of the suite by their names."""
    from benchmarks import plan, sanitize

    names = [piece.name for piece in plan.pieces("cuda", quick=False) if piece.module in MODULES]
    names = [name for name in names if "compiled" not in name and name not in sanitize.OURS_ALONE]
    tests = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("tests/**/test_*.py"))]
    tests = [path for path in tests if MARKED.search(text := (ROOT / path).read_text()) and LAUNCHES.search(text)]
    return sorted(tests, key=lambda path: "operators" not in path) + names  # the longest first


def run_job(name: str, architecture: int, out: Path) -> int:
    """In the job's own process: run it, and write down what Triton was asked for."""
    from benchmarks import standin

    os.environ["STANDIN_ARCHITECTURE"] = str(architecture)
    recorded = Recorded(name)
    atexit.register(recorded.write, out)
    if name.endswith(".py"):
        import pytest

        options = ["-q", "--assert=plain", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu"]
        options += ["-k", f"not ({REPEATS})"]
        recorded.listen()
        return int(pytest.main([*options, "-p", "benchmarks.standin.plugin", name], plugins=[recorded]))
    standin.install(architecture)
    recorded.listen()
    with standin.gpu():
        return run_piece(name)


class Recorded:
    """What was asked for: of every entry, by its name in Triton's cache, the key without the compiler's part."""

    def __init__(self, job: str) -> None:
        self.job, self.keys, self.cold, self.ended_early = job, {}, [], []
        self.began = time.monotonic()

    def listen(self) -> None:
        import triton
        from triton.compiler import compiler
        from triton.runtime.cache import triton_key

        ours, make = triton_key(), compiler.get_cache_key

        def key_of(*args: Any, **options: Any) -> str:
            key = make(*args, **options)
            self.keys[hashlib.sha256(key.encode()).hexdigest()] = key.removeprefix(ours)
            return key

        def heard(*, cache_hit: bool, src: Any, **_: Any) -> None:
            if not cache_hit:
                self.cold.append(src.name)

        compiler.get_cache_key = key_of
        triton.knobs.compilation.listener = heard

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.ended_early.append(report.nodeid)

    def write(self, out: Path) -> None:
        from benchmarks import standin

        launchers = sorted(standin.LAUNCHERS)
        found = {"keys": self.keys, "cold": self.cold, "ended_early": self.ended_early, "launchers": launchers}
        out.write_text(json.dumps({**found, "seconds": time.monotonic() - self.began}))


def once(calls: dict[str, Callable[[], object]], *args: Any, **options: Any) -> dict[str, list[float]]:
    """In place of `timing.interleaved`."""
    for call in calls.values():
        call()
    return {name: [1.0] * 3 for name in calls}


# What pieces take from their modules by name, and get instead: of the candidates only ours, and each is only called.
INSTEAD: dict[str, Any] = {
    "interleaved": once,
    "overhead_us": lambda call, *args, **options: (call(), 0.0)[1],
    "peak_cuda": lambda call, *args, **options: (call(), 0.0)[1],
    "multiply_adds": lambda *args: 1,
    "reference": lambda *args: {},
    "distance": lambda *args: 0.0,
    "fits": lambda *args: True,
    "largest_batch": lambda shape, *args: shape["clips"],
    "eager": lambda device: ("triton",),
    "usual_names": lambda *args: [],
    "other_models": lambda *args: [],
}


def run_piece(name: str) -> int:
    """A piece of the suite with nothing timed, compared or counted."""
    from benchmarks import plan
    from benchmarks.standin import plugin  # parity checks only run

    del plugin
    piece = next(piece for piece in plan.pieces("cuda", quick=False) if piece.name == name)
    module = importlib.import_module(f"benchmarks.{piece.module}")
    for loaded in [module for full, module in sys.modules.items() if full.startswith("benchmarks.")]:
        for function in INSTEAD.keys() & vars(loaded).keys():
            setattr(loaded, function, INSTEAD[function])
    if piece.module == "step_time":
        module.PROVIDERS = ("triton", "triton")
    if piece.module == "operators":
        module.PROVIDERS = ("operator",)
    sys.argv = [piece.module, *piece.arguments, *(["--calls"] if piece.module == "sanitize" else [])]
    return int(module.main())


@dataclass
class Job:
    name: str
    found: dict[str, Any]


def start(name: str, architecture: int, folder: Path) -> Job:
    """A job in its process, with `folder` as Triton's cache."""
    with tempfile.TemporaryDirectory() as temporary:
        out, log = Path(temporary) / "job.json", Path(temporary) / "log.txt"
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-O", "-m", "benchmarks.jobs", name]
        with open(log, "w") as text:
            options = ["--arch", str(architecture), "--out", str(out)]
            output = {"stdout": text, "stderr": subprocess.STDOUT}
            ran = subprocess.run([*command, *options], cwd=ROOT, env=environment, check=False, **output)
        said = log.read_text(errors="replace")
        if not out.exists():
            raise ValueError(f"{name} did not run on the stand-in:\n{said[-3000:]}")
        found = json.loads(out.read_text())
        found["problems"] = [f"ended early: {test}" for test in found["ended_early"]]
        found["problems"] += [line for line in said.splitlines() if line.startswith("rejected: ")]
        if ran.returncode and not found["problems"]:
            found["problems"] = [f"exit code {ran.returncode}: {said.strip().splitlines()[-1]}"]
        return Job(name, found)


def run_all(names: Sequence[str], architecture: int, folder: Path, processes: int) -> list[Job]:
    """Every job, a line each; what ended early, and so may have launched less, is named."""
    done: list[Job] = []
    with ThreadPoolExecutor(processes) as pool:
        for job in pool.map(lambda name: start(name, architecture, folder), names):
            done.append(job)
            f = job.found
            print(
                f"[{len(done)}/{len(names)}] {job.name}: {len(f['keys'])} instantiations, {len(f['cold'])} compiled, "
                f"{f['seconds']:.0f} s",
                flush=True,
            )
            for line in f["problems"]:
                print(f"    {line}", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a test file, or a piece of the suite")
    parser.add_argument("--arch", type=int, default=90, help="compute capability (default 90)")
    parser.add_argument("--out", type=Path, required=True, help="file for what was asked for")
    options = parser.parse_args()
    return run_job(options.name, options.arch, options.out)


if __name__ == "__main__":
    sys.exit(main())
