"""A run as pieces, each in a process of its own under a time limit: one that fails or hangs costs only itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.results import Results
from benchmarks.runner import say

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Piece:
    """One process: ``python -m benchmarks.<module> <arguments> --out FILE``; what it wrote is always merged."""

    name: str
    module: str
    arguments: Sequence[str] = ()
    limit_s: float = 120.0


def run_pieces(
    pieces: Sequence[Piece], results: Results, scratch: Path, log: TextIO, *, deadline: float = float("inf")
) -> None:
    """Run pieces in turn, merge what they measured, and record how each ended in ``results.pieces``.

    Args:
        scratch: directory for the pieces' files; the first piece that measures ceilings gives them to those after it.
        log: takes all they print.
        deadline: of ``time.monotonic()``; a piece gets what is left, and is not run when that is too little.
    """
    ceilings = scratch / "ceilings.json"
    for number, piece in enumerate(pieces):
        out = ceilings if piece.module == "ceilings" else scratch / f"{number}.json"
        arguments = [*piece.arguments, "--out", str(out)]
        if piece.module != "ceilings" and ceilings.exists():
            arguments += ["--ceilings", str(ceilings)]
        command = [sys.executable, "-m", f"benchmarks.{piece.module}", *arguments]
        record = run_limited(piece.name, command, min(piece.limit_s, deadline - time.monotonic()), log)
        results.pieces.append(record)
        if out.exists():
            results.merge(json.loads(out.read_text()))
        tell(record)


def tell(record: dict[str, Any]) -> None:
    detail = f": {record['reason']}" if record["reason"] else ""
    say(f"{record['name']:<24} {record['status']:<10} {record['seconds']:6.1f} s{detail}")


SKIPPED = 77  # exit code of a piece that cannot run here; its last line says why
LEAST_S = 10.0  # a piece is not begun with less: importing PyTorch takes half of it


def run_limited(name: str, command: Sequence[str], limit_s: float, log: TextIO) -> dict[str, Any]:
    """Run a process and all it starts for at most ``limit_s`` seconds; how it ended, in a dictionary."""
    record: dict[str, Any] = {"name": name, "status": "ok", "seconds": 0.0, "reason": None}
    if limit_s < LEAST_S:
        return {**record, "status": "not run", "reason": "no time was left"}
    log.write(f"\n===== {name}: {' '.join(command)}\n")
    log.flush()
    mark, began = log.tell(), time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=limit_s)
        if code == SKIPPED:
            record |= {"status": "skipped", "reason": _last_words(log, mark)}
        elif code:
            record |= {"status": "failed", "reason": f"exit code {code}: {_last_words(log, mark)}"}
    except subprocess.TimeoutExpired:
        record |= {"status": "timed out", "reason": f"after {limit_s:.0f} s; what it had measured is kept"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, so compilers it started end with it
            process.wait()
    record["seconds"] = round(time.monotonic() - began, 1)
    return record


def _last_words(log: TextIO, mark: int) -> str:
    log.flush()
    with open(log.name, errors="replace") as text:
        text.seek(mark)
        lines = [line.strip() for line in text.read().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"
