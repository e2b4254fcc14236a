"""One launch of every kernel of the package, held to the reference: what to run first on a GPU it has never run on.

    python -m benchmarks.launch        # a line each, at once; under a minute where the kernels are compiled already

Operators on their first sample, then each kernel of the stem alone at base width. Exit code 1 when one fails.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import kernels
from benchmarks.pieces import SKIPPED
from benchmarks.results import Key, Results
from benchmarks.runner import DTYPES, FLOOR, distance, reason, release, say, setup
from cat_kernels import backends
from cat_kernels import spec as specification
from cat_kernels.specs import specs

OURS = ("triton", "native")  # backends that are kernels of this package
SHAPE = {"preset": "base", "clips": 1, "masks": 4, "frames": 1024}
PRECISIONS = ("bf16", "fp32")


def checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name, precision, and a call that raises where the kernel is wrong."""
    for spec in specs():
        names = [n for n in backends.OPERATORS[spec.name] if n in OURS]
        for other in (spec.with_backend(n) for n in names if backends.why_not(spec.name, n, device.type) is None):
            for precision in PRECISIONS:
                yield other.name, precision, functools.partial(operator, other, device, precision)
    if device.type == "cuda":
        for kernel in kernels.kernels(SHAPE, device, torch.bfloat16):
            if kernel.triton is not None:
                yield kernel.name, "bf16", functools.partial(stem_kernel, kernel)


def operator(spec: specification.OperatorSpec, device: torch.device, precision: str) -> None:
    if DTYPES[precision] in spec.dtypes:
        specification.check_parity(spec, next(spec.samples(device, DTYPES[precision])))


def stem_kernel(kernel: kernels.Kernel) -> None:
    apart = distance(kernels.KernelProvider(kernel, "triton", torch.bfloat16).check(), kernels.reference(kernel))
    if not apart <= FLOOR["bf16"]:
        raise AssertionError(f"error {apart:.3g} > {FLOOR['bf16']:.3g} allowed")


def run(device: torch.device, results: Results) -> int:
    """How many were launched; what fails is said at once and noted among the rejected."""
    count = 0
    torch.manual_seed(0)
    for name, precision, call in checks(device):
        began = time.perf_counter()
        try:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()  # an illegal access shows here, and not at a later kernel
            say(f"  {name} {precision}: ok, {time.perf_counter() - began:.1f} s")
        except Exception as error:  # the others go on
            results.reject(Key(benchmark="launch", mode=name, dtype=precision, shape={"clips": 1}), name, reason(error))
            say(f"rejected: launch of {name} {precision}: {reason(error)}")
        count += 1
    release()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--ceilings", type=Path, help="not used; every piece of the suite is given it")
    options = parser.parse_args()
    device, results = torch.device(options.device), Results()
    setup(device, None)
    count = run(device, results)
    if not count:
        say("no kernel of this package runs here")
        return SKIPPED
    results.notes.append(f"launch: {count - len(results.rejected)} of {count} kernels and operators agree")
    if options.out:
        results.write(options.out, device)
    say(results.notes[-1])
    return 1 if results.rejected else 0


if __name__ == "__main__":
    sys.exit(main())
