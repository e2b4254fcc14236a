"""Build, GPU tests and every benchmark in one command: ``make gpu-suite OUT=DIR``.

    python3 -m benchmarks.suite --out DIR
    python3 -m benchmarks.suite --out DIR --pieces "stem step" --tests off --limit 300
    python3 -m benchmarks.suite --list

Runs on a bare machine: the Python it is given, the repository's root as working directory, nothing installed; the
extension is built in place. Leaves results.json, written anew after every piece, and log.txt in DIR, and prints a short
table last. Failures are printed as they happen. Exit code: 0 when everything ran and every test and parity check
passed, 1 when something failed or ran out of time, 2 for a request that cannot be met. A piece that lacks its tool is
skipped, which is no failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import cache, stem, tables
from benchmarks.pieces import Piece, run_limited, run_pieces, tell
from benchmarks.plan import TESTS, chosen, pieces
from benchmarks.results import Results, load
from benchmarks.runner import say

CACHE = Path("gpu-cache.tar.xz")
LIMIT_S = 570.0  # of the whole suite, so that it ends inside ten minutes
WORKERS = str(max(1, min(14, len(os.sched_getaffinity(0)) - 2)))  # processes of pytest, which share the GPU


def build_environment() -> None:
    """The extension is built for the GPU that is here only: all that a release holds take minutes."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("CMAKE_CUDA_ARCHITECTURES", f"{major}{minor}")


def test_command(marks: str, junit: Path, *, quick: bool) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "--continue-on-collection-errors", "--durations=10"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.failures", f"--junitxml={junit}"]
    if "not alone" in marks and importlib.util.find_spec("xdist"):
        command += ["-n", WORKERS, "--dist", "worksteal"]
    return command + (["tests/test_benchmarks.py"] if quick else [])


NO_TESTS = 5  # pytest's exit code where it chose none


def run_tests(piece: Piece, results: Results, scratch: Path, log: TextIO, limit_s: float, *, quick: bool) -> None:
    """``pytest -m``; the counts go into the results, what it prints into the log."""
    junit = scratch / f"{piece.name}.xml"
    record = run_limited(piece.name, test_command(piece.arguments[0], junit, quick=quick), limit_s, log)
    if str(record["reason"]).startswith(f"exit code {NO_TESTS}:"):
        record |= {"status": "ok", "reason": None}
    results.pieces.append(record)
    if junit.exists():
        suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        counts["passed"] = 2 * counts["tests"] - sum(counts.values())
        del counts["tests"]
        results.tests = {name: results.tests.get(name, 0) + count for name, count in counts.items()}
    tell(record)


def run(wanted: Sequence[Piece], options: argparse.Namespace, results: Results, scratch: Path, log: TextIO) -> None:
    deadline = time.monotonic() + options.limit
    device = torch.device(options.device)

    def save() -> None:
        results.write(options.out / "results.json", device)

    for piece in wanted:
        limit_s = min(piece.limit_s, deadline - time.monotonic())
        if piece.name == "build":
            build_environment()
            record = run_limited(piece.name, [sys.executable, *piece.arguments], limit_s, log)
            results.pieces.append(record)
            tell(record)
        elif piece.name in TESTS:
            run_tests(piece, results, scratch, log, limit_s, quick=options.quick)
        else:
            run_pieces([piece], results, scratch, log, deadline=deadline)
        save()
    note_goals(results, device)
    save()


def note_goals(results: Results, device: torch.device) -> None:
    """The stem's goals, which are an H200's, once all that they compare has been measured."""
    done = {record["name"] for record in results.pieces if record["status"] == "ok"}
    if {"stem", "stem-compiled"} <= done and "H200" in torch.cuda.get_device_name(device):
        results.notes += [f"goal missed: {goal}" for goal in stem.missed_on_h200(results)]


def prepare_cache(path: Path | None) -> None:
    """Unpack the compiled kernels that were brought along, where no folder of Triton's own was named."""
    path = path or (CACHE if CACHE.exists() else None)
    if path is None:
        say(f"no {CACHE}: Triton compiles every kernel here (make gpu-cache makes it where there is no GPU)")
        return
    folder = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(cache.FOLDER)))
    say(cache.unpack(path, folder))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="directory for results.json and log.txt")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--pieces", default="", help="names of pieces, with spaces between (default: all; --list tells them)")
    add("--tests", default="on", choices=("on", "off", "only"), help="with the rest (default), without them, alone")
    add("--limit", type=float, default=LIMIT_S, help=f"seconds in all (default {LIMIT_S:.0f})")
    add("--cache", type=Path, help=f"compiled kernels, of make gpu-cache (default: {CACHE} where there is one)")
    add("--quick", action="store_true", help="the same path, tiny shapes: for tests")
    add("--build", action=argparse.BooleanOptionalAction, default=True, help="build the extension first")
    add("--list", action="store_true", help="print the pieces in their order, and end")
    return parser


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    found = pieces(options.device, quick=options.quick)
    if options.list:
        for piece in found:
            say(f"{piece.name:<20} at most {piece.limit_s:.0f} s")
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    try:
        wanted = chosen(found, options.pieces.split(), options.tests, build=options.build)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        say("No CUDA device is visible to PyTorch here: the GPU suite measures nothing without one "
            "(--device cpu --quick tries the same path on the CPU).")  # fmt: skip
        return 2
    if options.device == "cuda":
        try:
            prepare_cache(options.cache)
        except (OSError, ValueError) as error:
            say(str(error))
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary, open(options.out / "log.txt", "w") as log:
        run(wanted, options, results, Path(temporary), log)
    data = load(options.out / "results.json")
    say("\n" + tables.summary(data))
    complete = all(piece["status"] in ("ok", "skipped") for piece in data["pieces"])
    return 0 if complete and not data["rejected"] else 1


if __name__ == "__main__":
    sys.exit(main())
