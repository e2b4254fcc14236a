"""Is anything slower than it was? Every operator and a small step, against a baseline saved on this machine.

    python -m benchmarks.regressions --save     # before a change
    python -m benchmarks.regressions            # after it; exit code 1 where something is slower

pytest-benchmark takes the times (`bench_calls.py`), in several processes one after another. A call's time is the least
of all its rounds: what disturbs a machine only ever adds. Its noise is how far the processes' least times lie apart, in
the baseline or now, whichever is more. A regression is a ratio beyond that noise and a margin; what looks like one is
measured once more before it counts. Where PyTorch's own copy or product has become slower, the machine has, and nothing
is said of the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write_atomic
from benchmarks.runner import say
from benchmarks.tables import Table
from cat.provenance import ROOT, commit, machine, versions

CALLS = "benchmarks/bench_calls.py"
MACHINE = "test_machine"
Times = dict[str, list[float]]  # call -> least milliseconds, one a process


@dataclass(frozen=True)
class Change:
    """A call's time against the baseline's."""

    name: str
    before_ms: float
    now_ms: float
    noise: float  # 0.1: least times lay up to 10 % apart
    margin: float

    @property
    def ratio(self) -> float:
        return self.now_ms / self.before_ms

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + max(self.noise, self.margin)

    @property
    def verdict(self) -> str:
        if self.slower:
            return "SLOWER"
        return "faster" if self.ratio < 1 / (1 + max(self.noise, self.margin)) else ""


def changes(before: Times, now: Times, margin: float) -> list[Change]:
    """Of all calls that both have."""
    return [
        Change(name, min(before[name]), min(times), max(_noise(before[name]), _noise(times)), margin)
        for name, times in now.items()
        if name in before
    ]


def _noise(times: Sequence[float]) -> float:
    return max(times) / min(times) - 1


def take(runs: int, seconds: float, select: Sequence[str]) -> Times:
    """Times calls in ``runs`` processes; ``select`` tells pytest which. Raises RuntimeError where one fails."""
    found: Times = {}
    for number in range(1, runs + 1):
        say(f"run {number} of {runs}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "benchmark.json"
            words = [sys.executable, "-m", "pytest", *select, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
            words += [f"--benchmark-json={out}", f"--benchmark-max-time={seconds}", "--benchmark-min-rounds=5"]
            words += ["--benchmark-disable-gc", "--benchmark-quiet"]
            # Under pytest-xdist, as in the tests of this file, pytest-benchmark would time nothing.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode or not out.exists():
                raise RuntimeError(f"the calls could not be timed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
            for call in json.loads(out.read_text())["benchmarks"]:
                found.setdefault(call["name"].removeprefix("test_"), []).append(1e3 * call["stats"]["min"])
    return found


def described() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"machine": machine(device), "versions": versions(), "commit": commit()}


def read_baseline(path: Path) -> tuple[Times, list[str]]:
    """Its times, and what else has changed since then. Raises ValueError for another machine's."""
    data, here = json.loads(path.read_text()), described()
    if data["machine"] != here["machine"]:
        raise ValueError(
            f"{path} was taken on another machine, {data['machine']}; this one is {here['machine']}: take a baseline "
            "here (--save)"
        )
    differing = [
        f"{name}: {data['versions'].get(name)} then, {version} now"
        for name, version in here["versions"].items()
        if data["versions"].get(name) != version and name != "cat_kernels"
    ]
    return data["times_ms"], differing


def table(found: Sequence[Change]) -> Table:
    rows = [
        [c.name, f"{c.before_ms:.3g}", f"{c.now_ms:.3g}", f"{c.ratio:.2f}", f"{100 * c.noise:.0f} %", c.verdict]
        for c in sorted(found, key=lambda c: -c.ratio)
    ]
    return Table("Least times", ["call", "before, ms", "now, ms", "ratio", "noise", ""], rows)


def judge(found: Sequence[Change]) -> tuple[int, str]:
    """Exit code and a sentence: 0, 1 for a regression, 2 where the machine itself is slower."""
    own = [c for c in found if not _of_machine(c.name)]
    slow_machine = [c for c in found if _of_machine(c.name) and c.slower]
    slower = [c for c in own if c.slower]
    if slow_machine:
        told = ", ".join(f"{c.name} {c.ratio:.2f}x" for c in slow_machine)
        return 2, f"the machine is slower than it was ({told}): nothing can be said; let it come to rest and run again"
    if slower:
        return 1, f"slower: {', '.join(f'{c.name} {c.ratio:.2f}x' for c in slower)}"
    return 0, f"none of {len(own)} calls is slower beyond noise"


def _of_machine(name: str) -> bool:
    return name.startswith(MACHINE.removeprefix("test_"))


def again(slower: Sequence[Change]) -> list[str]:
    """pytest's words for these calls and the machine's own."""
    return [*(f"{CALLS}::test_{c.name}" for c in slower if not _of_machine(c.name)), f"{CALLS}::{MACHINE}"]


def confirmed(before: Times, now: Times, second: Mapping[str, Sequence[float]], margin: float) -> list[Change]:
    """With a second look at what seemed slower: both looks' times count."""
    both = {name: [*times, *second.get(name, ())] for name, times in now.items()}
    return changes(before, both, margin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="take the baseline, in place of an earlier one")
    parser.add_argument("--baseline", type=Path, default=ROOT / ".benchmarks" / "baseline.json")
    parser.add_argument("--runs", type=int, default=3, help="processes that take times (default 3)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a call in a process (default 1)")
    parser.add_argument("--margin", type=float, default=0.05, help="slower by less is no regression (default 0.05)")
    parser.add_argument("--only", help="some of the calls, as pytest's -k")
    options = parser.parse_args()
    if not options.save and not options.baseline.exists():
        parser.error(f"there is no baseline {options.baseline}; take one before the change: --save")
    try:
        before, differing = ({}, []) if options.save else read_baseline(options.baseline)
        now = take(options.runs, options.seconds, [CALLS, *(["-k", options.only] if options.only else [])])
        if options.save:
            write_atomic(options.baseline, json.dumps({**described(), "times_ms": now}, indent=1) + "\n")
            say(f"baseline of {len(now)} calls: {options.baseline}")
            return 0
        found = changes(before, now, options.margin)
        if judge(found)[0]:
            slower = [c for c in found if c.slower]
            found = confirmed(before, now, take(options.runs, options.seconds, again(slower)), options.margin)
    except (RuntimeError, ValueError) as error:
        say(str(error))
        return 2
    code, told = judge(found)
    say("\n" + table(found).text())
    for line in (*differing, *(f"not in the baseline: {name}" for name in now.keys() - before.keys())):
        say(line)
    say(told)
    return code


if __name__ == "__main__":
    sys.exit(main())
