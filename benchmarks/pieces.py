"""A run as pieces, each in a process of its own under a time limit: one that fails or hangs costs only itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
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
    pieces: Sequence[Piece],
    results: Results,
    scratch: Path,
    log: TextIO,
    *,
    deadline: float = float("inf"),
) -> None:
    """Run pieces in turn, merge what they measured, and record how each ended in ``results.pieces``.

    Args:
        scratch: directory for the pieces' files; the first piece that measures ceilings gives them to those after it.
        log: takes all they print.
        deadline: of ``time.monotonic()``; a piece gets what is left, and is not run when that is too little.
    """
    ceilings = scratch / "ceilings.json"
    for piece in pieces:
        out = ceilings if piece.module == "ceilings" else scratch / f"{len(results.pieces)}.json"
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
GRACE_S = 8.0  # between the interrupt, on which pytest prints its summary and writes its file, and the kill
# Lines that are shown as soon as they are printed, so that whatever ends the run later, they have been seen.
URGENT = ("FAILED ", "ERROR ", "rejected: ", "missed: ")


def run_limited(name: str, command: Sequence[str], limit_s: float, log: TextIO) -> dict[str, Any]:
    """Run a process and all it starts for at most ``limit_s`` seconds; how it ended, in a dictionary.

    On the limit the process is interrupted (SIGINT); after ``GRACE_S`` seconds it and all it started are killed.
    """
    record: dict[str, Any] = {"name": name, "status": "ok", "seconds": 0.0, "reason": None}
    if limit_s < LEAST_S:
        return {**record, "status": "not run", "reason": "no time was left"}
    log.write(f"\n===== {name}: {' '.join(command)}\n")
    log.flush()
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, so that compilers and workers it started end with it
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    last = _Copy(process, log)
    try:
        code = process.wait(timeout=limit_s)
        last.join(2.0)
        if code == SKIPPED:
            record |= {"status": "skipped", "reason": last.line}
        elif code:
            record |= {"status": "failed", "reason": f"exit code {code}: {last.line}"}
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        record |= {"status": "timed out", "reason": f"after {limit_s:.0f} s; what it had measured is kept"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        last.join(2.0)
    record["seconds"] = round(time.monotonic() - began, 1)
    return record


class _Copy(threading.Thread):
    """Copies what a process prints into the log line by line, and says what is urgent at once."""

    def __init__(self, process: subprocess.Popen[bytes], log: TextIO) -> None:
        super().__init__(daemon=True)
        self._process, self._log, self.line = process, log, "it printed nothing"
        self._said: set[str] = set()
        self.start()

    def run(self) -> None:
        for raw in self._process.stdout or ():
            line = raw.decode(errors="replace").rstrip()
            with contextlib.suppress(ValueError):  # a process that outlived the kill writes on after the log is closed
                self._log.write(line + "\n")
                self._log.flush()
            if line.startswith(URGENT) and not self._again(line):
                say(f"  {line}")
            if line.strip():
                self.line = line.strip()[:200]

    def _again(self, line: str) -> bool:
        """pytest names every failed test once more at its end."""
        key = line.split()[1].removesuffix(":") if line.startswith(("FAILED ", "ERROR ")) else line
        seen = key in self._said
        self._said.add(key)
        return seen
