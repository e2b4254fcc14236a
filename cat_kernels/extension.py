"""The compiled part of the package, its module `_C` (csrc/): whether it is there, what is in it, why it cannot run.

It is optional. Operators that have it fall back to PyTorch, and `explain()` says so.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

BUILD_RECORD = Path(__file__).with_name("_build.json")  # written by setup.py, also where nothing was built

MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


@cache
def _found() -> tuple[ModuleType | None, str | None]:
    """The module, or the reason why there is none."""
    try:
        return importlib.import_module("._C", __package__), None
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            return None, _broken(error)
        reason = _recorded("reason") or "in a source tree: pip install -e ."
        return None, f"the extension was not built ({reason}); see docs/install.md"
    except ImportError as error:
        return None, _broken(error)


def _broken(error: ImportError) -> str:
    return f"the extension cannot be loaded ({error}); build it again: pip install --force-reinstall --no-deps ."


def _recorded(key: str) -> str | None:
    """What the build wrote down; None where it did not, or of the module of another Python in the same source tree."""
    try:
        record = json.loads(BUILD_RECORD.read_text())
        return None if record.get("module", MODULE) != MODULE else record[key]
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _why_no_cuda() -> str:
    return _recorded("cuda_reason") or "the reason was not recorded"


def load() -> ModuleType | None:
    """The module `_C`, or None without it."""
    return _found()[0]


def why_not(device: str) -> str | None:
    """None where the extension can run on tensors of this device type, otherwise the reason and the remedy."""
    module, reason = _found()
    if module is None or device == "cpu":
        return reason
    if device != "cuda":
        return f"the extension runs on CPU and CUDA tensors, these are on {device}"
    if not module.about()["cuda"]:
        return f"the extension was built without CUDA ({_why_no_cuda()}); build it again (docs/install.md)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _cuda_problem(torch.cuda.current_device())


@cache
def _cuda_problem(index: int) -> str | None:
    """What keeps the kernels from running on this GPU: a driver that is too old, an architecture not compiled for."""
    module = load()
    assert module is not None
    torch.cuda.init()
    problem = module.cuda_problem(index)
    if not problem:
        return None
    return (
        f"{problem} (built with CUDA {module.about()['cuda']} for {architectures()}); build it again on this machine: "
        "docs/install.md"
    )


def architectures() -> str:
    """The GPU architectures whose code the extension holds, such as "sm_80, sm_90, PTX for sm_90 and newer"."""
    module = load()
    names = module.about()["architectures"] if module else []
    return ", ".join(_architecture(name) for name in names) or "none"


def _architecture(name: str) -> str:
    number, _, kind = name.partition("-")
    return f"PTX for sm_{number} and newer" if kind == "virtual" else f"sm_{number}"


def describe() -> str:
    """One line for `explain()`."""
    module, reason = _found()
    if module is None:
        return f"none: {reason}"
    about = module.about()
    cuda = f"CUDA {about['cuda']} for {architectures()}" if about["cuda"] else f"no CUDA: {_why_no_cuda()}"
    return f"C++ by {about['compiler']}, {about['cpu']} in use; {cuda}"
