"""Where and with what numbers were measured: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def made(device: torch.device) -> dict[str, Any]:
    """``{"date", "commit", "machine", "versions"}``; the date is UTC's."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Names of the processor and, for a GPU run, of the GPU and its driver."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "gpu": None,
        "driver": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_MiB"] = properties.total_memory >> 20
        found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction sets the kernel names; empty where it does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    from cat_kernels import __version__

    return {
        "cat_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": of("triton"),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
    }


def commit(paths: Sequence[str] = ()) -> str | None:
    """The commit this tree stands on, "+" behind it where tracked files differ; None without git.

    paths: the last commit that changed one of these, "+" where one of these differs.
    """
    git = "git", "-C", str(ROOT)
    found = _first_line(*git, "log", "-1", "--format=%H", "--", *paths)
    if found is None:
        return None
    changed = _first_line(*git, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    return found[:12] + ("+" if changed else "")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
