"""What this machine has, what runs on it, what to install for the rest (`cat-audio doctor`). Made to be pasted."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Extra -> {distribution: import name}, as in pyproject.toml.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {
        "soundfile": "soundfile",
        "soxr": "soxr",
        "pyyaml": "yaml",
        "tqdm": "tqdm",
        "tensorboard": "tensorboard",
        "matplotlib": "matplotlib",
        "scikit-learn": "sklearn",
        "scipy": "scipy",
        "shtab": "shtab",
        "threadpoolctl": "threadpoolctl",
    },
    "hub": {"huggingface-hub": "huggingface_hub"},
    "files": {"pyarrow": "pyarrow", "h5py": "h5py"},
    "remote": {"fsspec": "fsspec", "aiohttp": "aiohttp"},
    "clap": {"transformers": "transformers"},
    "tflite": {"ai-edge-litert": "ai_edge_litert"},
    "export": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "events": {"sed_eval": "sed_eval"},
}


def report() -> str:
    """The whole report, for people; nothing that is missing makes it fail."""
    import cat_kernels

    machine, packages = [*_machine()], [(name, found or f"missing: {remedy}") for name, found, remedy in _packages()]
    return "\n".join([str(cat_kernels.explain()), "", *_rows(machine), "", *_rows(packages)])


def report_json() -> dict[str, Any]:
    """The same for programs. A package that is missing is null."""
    import cat_kernels

    told = cat_kernels.explain()
    return {
        "versions": told.versions,
        "operators": [dataclasses.asdict(row) for row in told.rows],
        "machine": dict(_machine()),
        "packages": {name: found for name, found, _ in _packages()},
    }


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}} {value}" for name, value in pairs]


def _machine() -> Iterator[tuple[str, str]]:
    yield "platform", f"{platform.platform()}, {os.cpu_count()} CPUs"
    yield (
        "GPU driver",
        _first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    )
    yield "C++ compiler", _first_line(os.environ.get("CXX", "c++"), "--version")
    release = next((line for line in _output(_nvcc(), "--version") if "release" in line), None)
    yield "CUDA compiler", release or "none (nvcc not found); only needed to build CUDA code"


def _packages() -> Iterator[tuple[str, str | None, str]]:
    """(name, version if it is there, what installs it)"""
    for name in ("numpy", "safetensors"):
        yield name, _version(name, name), f"pip install {name}"
    for extra, packages in EXTRAS.items():
        for distribution, module in packages.items():
            yield distribution, _version(distribution, module), f"pip install 'cat-kernels[{extra}]'"
    yield "libsndfile", _libsndfile(), "comes with soundfile"


def _version(distribution: str, module: str) -> str | None:
    """None when it is not there. Only looked up, not imported: some of them take seconds to import."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "present, version unknown"


def _libsndfile() -> str | None:
    try:
        import soundfile
    except ImportError:
        return None
    except OSError as error:  # the package without its library
        return f"cannot be loaded ({error}); install it, e.g. apt install libsndfile1"
    formats = [name for name in ("WAV", "FLAC", "OGG", "MP3") if name in soundfile.available_formats()]
    return f"{soundfile.__libsndfile_version__}, reads {', '.join(formats)}"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or str(Path(home, "bin", "nvcc"))


def _output(*command: str) -> list[str]:
    """The lines it prints; none when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _first_line(*command: str) -> str:
    return next(iter(_output(*command)), f"none ({command[0]} not found)")
