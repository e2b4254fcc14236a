"""Which implementation of an operator runs where, and why not the others.

`OPERATORS` is the table: for every operator its implementations, the preferred one first. `resolve` picks one,
`explain` tells what it would pick on this machine.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import extension

# Looked up, not imported: importing Triton takes long and, without a GPU, may fail.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter, slow and for tests, takes CPU tensors. Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# An operator's own implementations, in the order "auto" prefers them.
OPERATORS: dict[str, tuple[str, ...]] = {
    "MultiResConv": ("triton", "visible", "dense"),
    "gather_tokens": ("triton", "torch"),
    "residual_layer_norm": ("triton", "torch"),
    "layer_norm_gelu": ("triton", "torch"),
    "restore_tokens": ("triton", "torch"),
    "average_targets": ("triton", "torch"),
    "masked_regression_loss": ("triton", "torch"),
    "ema_update_": ("triton", "torch"),
    "fbank": ("native", "torch"),
    "grouped_conv2d": ("triton", "torch"),
}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """One way to run operators.

    why_not: device type -> None where it can run, otherwise a sentence with the reason and the remedy.
    """

    name: str
    description: str
    why_not: Callable[[str], str | None]


def _runs_anywhere(device: str) -> str | None:
    return None


def _why_not_triton(device: str) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed; install it with: pip install triton"
    if device != "cuda" and not INTERPRETED:
        return "Triton kernels take CUDA tensors; move them with .cuda()"
    if device == "cuda" and not torch.compiler.is_compiling() and _gpus_too_old():
        return "Triton kernels need GPUs of compute capability 8.0 (Ampere) or newer; use another backend"
    return None


def _gpus_too_old() -> bool:
    """Whether PyTorch sees a GPU that Triton does not compile for. Without any GPU nothing is too old."""
    if not _GPUS_TOO_OLD:
        if not torch.cuda.is_available():
            return False
        devices = range(torch.cuda.device_count())
        _GPUS_TOO_OLD.append(any(torch.cuda.get_device_capability(i) < (8, 0) for i in devices))
    return _GPUS_TOO_OLD[0]


_GPUS_TOO_OLD: list[bool] = []  # asked once: it starts the driver, and calls pass here


BACKENDS: dict[str, Backend] = {
    "torch": Backend("torch", "PyTorch operations", _runs_anywhere),
    "visible": Backend("visible", "PyTorch operations on the visible patches only (exact)", _runs_anywhere),
    "dense": Backend("dense", "PyTorch operations on all positions (the formula)", _runs_anywhere),
    "native": Backend("native", "C++ on CPU tensors, CUDA on CUDA tensors (the extension)", extension.why_not),
    "triton": Backend("triton", "Triton kernels", _why_not_triton),
}


def why_not(operator: str, backend: str, device: str) -> str | None:
    """None when `backend` can run `operator` on tensors of this device type, otherwise the reason and the remedy."""
    if backend not in OPERATORS[operator]:
        have = " or ".join(repr(name) for name in (*OPERATORS[operator], "auto"))
        return f"{operator} has no {backend} implementation in this version; use backend={have}"
    return BACKENDS[backend].why_not(device)


def resolve(operator: str, backend: str = "auto", device: str = "cpu") -> str:
    """The backend that runs `operator` on tensors of device type `device` ("cpu", "cuda").

    backend: "auto" takes the first of the operator's implementations that can run, Triton only on a GPU (who wants its
        interpreter asks for it by name); a name asks for just that one.
    Raises ValueError for a name that is no backend, BackendError for one that cannot run here. Eager calls pass through
    here each time (about a microsecond), and compilers trace it: lookups only.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; expected one of {', '.join(OPERATORS)}")
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"{operator}: unknown backend {backend!r}; expected 'auto' or one of {_quoted(operator)}")
        reason = why_not(operator, backend, device)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run {operator} on {device}: {reason}")
        return backend
    for name in OPERATORS[operator]:
        if (name != "triton" or device == "cuda") and BACKENDS[name].why_not(device) is None:
            return name
    told = "; ".join(f"{name}: {why_not(operator, name, device)}" for name in OPERATORS[operator])
    raise BackendError(f"no backend can run {operator} on {device}: {told}")


def _quoted(operator: str) -> str:
    return ", ".join(repr(name) for name in OPERATORS[operator])


@dataclass(frozen=True)
class Row:
    """What runs one operator on one device type; `others` gives for every other backend why it does not."""

    operator: str
    device: str
    backend: str
    others: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """`print(cat_kernels.explain())` shows versions, what runs, and why not the rest; the fields hold the same for
    programs."""

    versions: dict[str, str]
    rows: tuple[Row, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{name:<11} {value}" for name, value in self.versions.items()]
        return "\n".join([*lines, "", *self._table(), "", *self._backends(), "", *self._reasons()])

    def _table(self) -> list[str]:
        """A row an operator, a column a device."""
        chosen = {(row.operator, row.device): row.backend for row in self.rows}
        devices = dict.fromkeys(row.device for row in self.rows)
        width = max((len(row.operator) for row in self.rows), default=8)
        lines = [[f"{'operator':<{width}}", *(f"on {device}" for device in devices)]]
        for operator in dict.fromkeys(row.operator for row in self.rows):
            lines.append([f"{operator:<{width}}", *(chosen[operator, device] for device in devices)])
        return ["  ".join(f"{cell:<8}" for cell in line).rstrip() for line in lines]

    def _backends(self) -> list[str]:
        used = [name for name in BACKENDS if any(row.backend == name for row in self.rows)]
        return [f"{name:<8} {BACKENDS[name].description}" for name in used]

    def _reasons(self) -> list[str]:
        """Each reason once, with the operators it holds for."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            for name, reason in row.others.items():
                if name in OPERATORS[row.operator]:
                    found.setdefault((row.device, name, reason), []).append(row.operator)
        lines = ["not used:"]
        for (device, name, reason), operators in found.items():
            lines.append(f"{name:<8} on {device}: {reason}")
            lines += textwrap.wrap(", ".join(operators), 100, initial_indent=" " * 9, subsequent_indent=" " * 9)
        return lines

    __repr__ = __str__


def explain(device: str | None = None) -> Explanation:
    """Which backend every operator runs here, why not the others, and the versions that decide it.

    device: "cpu" or "cuda"; None tells of both where there is a CUDA device, of the CPU otherwise.
    """
    if device is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    elif device in ("cpu", "cuda"):
        devices = (device,)
    else:
        raise ValueError(f"unknown device {device!r}; expected 'cpu', 'cuda' or None")
    rows = tuple(_row(operator, device) for device in devices for operator in OPERATORS)
    return Explanation(_versions(), rows)


def _row(operator: str, device: str) -> Row:
    chosen = resolve(operator, "auto", device)
    others = {}
    for name in dict.fromkeys((*OPERATORS[operator], "triton")):
        if name != chosen:
            reason = why_not(operator, name, device)
            others[name] = reason if reason is not None else f"can run; {chosen} is preferred"
    return Row(operator, device, chosen, others)


def _versions() -> dict[str, str]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{name} (sm_{_capability(i)})" for i, name in enumerate(names))
    elif torch.version.cuda is None:
        gpus = "none: this PyTorch was built without CUDA"
    else:
        gpus = "none: PyTorch sees no CUDA device"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "present, version unknown" if HAS_TRITON else "not installed"
    return {
        "cat_kernels": sys.modules[__package__].__version__,  # set by the time anything is called
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "not in this PyTorch",
        "Triton": triton,
        "extension": extension.describe(),
        "GPU": gpus,
        "CPU threads": str(torch.get_num_threads()),
    }


def _capability(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{major}{minor}"
