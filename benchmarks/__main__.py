"""The CPU benchmarks, ``make bench``: stem, its kernels, step, features, operators, inference, a result file, tables.

    python -m benchmarks                    # results into benchmarks/results/<machine>-<date>.json
    python -m benchmarks --out FILE

Exit code 1 when a goal is missed (stem 4.5x and step 1.9x the dense formulation, log-mel features 3x torchaudio's
file), or a parity check failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.pieces import Piece, run_pieces
from benchmarks.results import Results, default_path, load
from benchmarks.runner import say

ON = ("--device", "cpu", "--check", "--dtypes", "fp32")  # and SHORT: so that all ends inside a quarter of an hour
SHORT = (*ON, "--frames", "128")
OTHERS = ("--sweep", "1", "2", "--resolutions", "4,16", "8,16")
PIECES = [
    Piece("ceilings", "ceilings", ("--device", "cpu"), 60),
    Piece("stem", "stem", (*ON, "--budget", "15"), 240),
    Piece("step", "step_time", (*ON, "--budget", "60"), 420),
    Piece("fbank", "fbank", (*ON, "--budget", "10"), 240),
    Piece("operators", "operators", (*ON, "--budget", "1", "--no-memory"), 180),
    Piece("inference", "inference", (*ON, "--preset", "small", "--budget", "10"), 300),
    Piece("stem sweep", "stem", (*SHORT, "--budget", "1", *OTHERS), 180),
    Piece("kernels", "kernels", (*SHORT, "--budget", "0.1"), 120),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<machine>-<date>.json)")
    options = parser.parse_args()
    device = torch.device("cpu")
    path = options.out or default_path(device)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        with open(scratch / "log.txt", "w") as log:
            run_pieces(PIECES, results, scratch, log)
        incomplete = [piece for piece in results.pieces if piece["status"] != "ok"]
        if incomplete:
            say((scratch / "log.txt").read_text())
    results.write(path, device)
    say("\n" + tables.summary(load(path)))
    say(f"\nwritten to {path}")
    return 1 if incomplete else 0


if __name__ == "__main__":
    sys.exit(main())
