"""Build, GPU tests and every benchmark in one command: ``make gpu-suite OUT=DIR``.

    python3 -m benchmarks.suite --out DIR

Runs on a bare machine: the Python it is given, the repository's root as working directory, nothing installed; the
extension is built in place. Leaves results.json, log.txt and plots in DIR and prints a short table last. Exit code: 0
when everything ran and every test and parity check passed, 1 when something failed or ran out of time, 2 without a GPU.
A piece that lacks its tool is skipped, which is no failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import tables
from benchmarks.pieces import Piece, run_limited, run_pieces, tell
from benchmarks.plots import plot
from benchmarks.results import Results, load
from benchmarks.runner import say

BUILD = ("setup.py", "build_ext", "--inplace")
LIMIT_S = 460.0  # of the whole suite, so that it ends inside eight minutes
TESTS_S = 200.0  # of these, the tests: every Triton kernel is compiled in three precisions


def pieces(device: str, *, quick: bool) -> list[Piece]:
    """All of a run but the tests, the most wanted first: time that runs out is taken from the last."""
    on = ("--device", device)
    if quick:
        on += ("--clips", "1", "--dtypes", "fp32", "--budget", "0.1", "--min-rounds", "1", "--no-memory")
        tiny = ("--preset", "tiny", "--frames", "64", "--masks", "2")
        few = ("--only", "gather_tokens,masked_regression_loss")
        other = ("--sweep", "1", "2", "--resolutions", "4,16")
        return [
            Piece("ceilings", "ceilings", ("--device", device, "--quick")),
            Piece("fbank", "fbank", (*on, *tiny, "--compiled", "--compiler", "aot_eager")),
            Piece("memcheck", "sanitize", ("--tool", "memcheck")),
            Piece("stem fp32", "stem", (*on, *tiny, "--compiled", "--compiler", "aot_eager")),
            Piece("step fp32", "step_time", (*on, *tiny)),
            Piece("kernels", "kernels", (*on, *tiny, "--only", "norm_linear")),
            Piece("stem sweep", "stem", (*on, *tiny, *other)),
            Piece("operators", "operators", (*on, *few)),
        ]
    bf16 = ("--dtypes", "bf16")
    others = ("--dtypes", "fp16,fp32", "--no-compiled")  # compilers get one precision: they take longer than all else
    return [
        Piece("ceilings", "ceilings", on, 60),
        Piece("stem bf16", "stem", (*on, *bf16, "--budget", "2"), 90),
        Piece("step bf16", "step_time", (*on, *bf16, "--budget", "3"), 110),
        Piece("kernels", "kernels", (*on, *bf16), 60),
        Piece("stem sweep", "stem", (*on, *bf16, "--budget", "0.3", "--sweep"), 45),
        Piece("operators", "operators", (*on, "--dtypes", "bf16,fp32"), 90),
        Piece("fbank", "fbank", (*on, "--dtypes", "fp32,bf16", "--budget", "2"), 100),
        Piece("memcheck", "sanitize", ("--tool", "memcheck"), 90),
        Piece("racecheck", "sanitize", ("--tool", "racecheck"), 90),
        Piece("stem fp16, fp32", "stem", (*on, *others, "--budget", "1"), 80),
        Piece("step fp16, fp32", "step_time", (*on, *others, "--budget", "2"), 120),
        Piece("stem resolutions", "stem", (*on, *bf16, "--budget", "0.2", "--resolutions"), 60),
    ]


def run_build(results: Results, log: TextIO, limit_s: float) -> None:
    """The extension, for the GPU that is here only: all that a release holds take minutes."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if major:
        os.environ.setdefault("CMAKE_CUDA_ARCHITECTURES", f"{major}{minor}")
    record = run_limited("build", [sys.executable, *BUILD], limit_s, log)
    results.pieces.append(record)
    tell(record)


def run_tests(results: Results, scratch: Path, log: TextIO, limit_s: float, *, quick: bool) -> None:
    """``pytest -m gpu``; the counts go into the results, what it prints into the log."""
    junit = scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", "--durations=10"]
    command += ["-p", "no:cacheprovider", f"--junitxml={junit}", *(["tests/test_benchmarks.py"] if quick else [])]
    record = run_limited("tests", command, limit_s, log)
    results.pieces.append(record)
    if junit.exists():
        suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        passed = counts.pop("tests") - sum(counts.values())
        results.tests |= {"passed": passed, **counts}
    tell(record)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json, log.txt and the plots")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="the same path, tiny shapes: for tests")
    parser.add_argument(
        "--build", action=argparse.BooleanOptionalAction, default=True, help="build the extension first"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds in all (default {LIMIT_S:.0f})")
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    if options.device == "cuda" and not torch.cuda.is_available():
        say("No CUDA device is visible to PyTorch here: the GPU suite measures nothing without one "
            "(--device cpu --quick tries the same path on the CPU).")  # fmt: skip
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary, open(options.out / "log.txt", "w") as log:
        scratch = Path(temporary)
        if options.build:
            run_build(results, log, min(180.0, options.limit))
        first, *rest = pieces(options.device, quick=options.quick)
        run_pieces([first], results, scratch, log, deadline=deadline)  # ceilings: nothing is warm or fragmented yet
        run_tests(results, scratch, log, min(TESTS_S, deadline - time.monotonic()), quick=options.quick)
        run_pieces(rest, results, scratch, log, deadline=deadline)
    path = options.out / "results.json"
    results.write(path, torch.device(options.device))
    data = load(path)
    try:
        plot(data, options.out)
    except Exception as error:  # numbers without pictures are still numbers
        say(f"no plots: {error}")
    say("\n" + tables.summary(data))
    complete = all(piece["status"] in ("ok", "skipped") for piece in data["pieces"])
    return 0 if complete and not data["rejected"] else 1


if __name__ == "__main__":
    sys.exit(main())
