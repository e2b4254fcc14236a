"""What every Triton kernel of the package shares: the launch guard, tile widths, the precision of a matrix product.

Kernels live in modules that import Triton; this one and they are imported when a kernel is first asked for, never by
`import cat_kernels`. With TRITON_INTERPRET=1 in the environment they run, slowly, on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: Any, grid: Sequence[int], *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on ``grid`` programs, on the device and current stream of its first tensor.

    Tensors must be contiguous where the kernel takes no strides; nothing is launched for an empty grid.
    """
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if 0 in grid:
        return
    guard = torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[tuple(grid)](*args, **meta)


def padded(width: int) -> int:
    """The tile that holds ``width`` columns: the next power of two, and at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(width))


def input_precision(dtype: torch.dtype) -> str:
    """For `tl.dot` of float32 operands: TF32 only where PyTorch's own products use it. Others ignore it."""
    # Not allow_tf32: reading that raises once anybody has set fp32_precision, while this one is told of both.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# The most shared memory that a block can have, in KiB, by compute capability without the dot: the programming guide's
# table. What is not listed is taken for the smallest.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class Chip:
    """What a rule needs to know of a GPU. ``architecture``: 80, 90, ... for compute capability 8.0, 9.0. Where there is
    none, an H200."""

    architecture: int = 90
    multiprocessors: int = 132
    memory: int = 141 << 30  # bytes

    @property
    def shared_kib(self) -> int:
        return SHARED_KIB.get(self.architecture, 99)

    @property
    def hopper(self) -> bool:
        return 90 <= self.architecture < 100

    @property
    def tensor_memory(self) -> bool:
        """Datacenter Blackwell: sums of products are kept apart from the registers."""
        return 100 <= self.architecture < 120

    @staticmethod
    def of(device: torch.device) -> Chip:
        if device.type != "cuda":
            return Chip()
        found = torch.cuda.get_device_properties(device)
        return Chip(10 * found.major + found.minor, found.multi_processor_count, found.total_memory)


# Triton's names of the dtypes that kernels take.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; sum and result are float32 whatever the operands' dtype.

    For the gradients of weights: (m, rows) times (rows, n), by PyTorch's product, which is the vendor's library. It
    shares out the rows by itself: cut into slices here, one product each, they took an H100 up to 2.9 times as long."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()  # PyTorch takes out_dtype on CUDA tensors only
    return torch.mm(a, b, out_dtype=torch.float32)


@dataclass(frozen=True)
class Ahead:
    """One instantiation of a kernel, to be compiled without a GPU: names of arguments to Triton's type strings, the
    constexpr arguments' values, and the compiler's options (num_warps, num_stages)."""

    name: str
    kernel: Any
    signature: dict[str, Any]  # of strings, and tuples of strings
    constexprs: dict[str, Any]
    options: dict[str, int]


# Read once: Triton too decides when it is imported.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _round_as_a_gpu_does() -> None:
    """Triton 3.6's interpreter cuts float32 off to bfloat16, toward zero, where a GPU rounds to the nearest: twice the
    error, and all of it on one side."""
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(values, source, target, mode)
        bits = values.view("uint32")
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to even where two are as near
        return (nearest * (values == values) + 0x7FC0 * (values != values)).astype("uint16")

    interpreter._convert_float = rounded


if triton.knobs.runtime.interpret:
    _round_as_a_gpu_does()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`tl.dot` with an accumulator. The interpreter multiplies bfloat16 operands as integers, so it gets float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
