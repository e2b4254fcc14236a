"""Peak memory of one call, above what stood before it.

On a GPU the caching allocator counts it. On a CPU the operating system does, in a fresh process for every candidate:
memory that an earlier one freed would otherwise hide what the next one takes. That process is this module as a script.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent


def peak_cuda(call: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors alive at the worst moment of ``call``, above those alive before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def peak_resident(call: Callable[[], object]) -> float:
    """MiB of resident memory at the worst moment of ``call``, above what was resident before it; of this process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
        before = _status("VmRSS")
        call()
        return max(0.0, _status("VmHWM") - before)
    except OSError:
        before = _high_water()
        call()
        return _high_water() - before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no field {field}")


def _high_water() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def peak_in_fresh_process(module: str, arguments: Mapping[str, Any], *, threads: int, limit_s: float = 300.0) -> float:
    """MiB that ``benchmarks.<module>.make_provider(**arguments).call()`` takes, measured in a process of its own.

    Raises RuntimeError with the process's last words when it fails.
    """
    settings = json.dumps({"module": module, "arguments": dict(arguments), "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"peak memory of {module} {dict(arguments)} could not be measured: {words}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_MiB"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak resident memory of one candidate, for the CPU benchmarks.")
    parser.add_argument("settings", type=json.loads, help='JSON: {"module": ..., "arguments": {...}, "threads": n}')
    settings = parser.parse_args().settings
    torch.set_num_threads(settings["threads"])
    provider = importlib.import_module(f"benchmarks.{settings['module']}").make_provider(**settings["arguments"])
    print(json.dumps({"peak_MiB": peak_resident(provider.call)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
