"""LayerNorm inside Triton kernels that hold whole rows; imported when one is first asked for.

Shapes: R rows, D width; tiles are (BLOCK_R, C) with C columns, D of them in use.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._triton import padded

PROGRAMS = 1024  # that share the rows of a backward with sums: eight on every multiprocessor of an H100, of twelve


def config(D: int) -> dict[str, int]:
    """A tile of 1024 elements a warp, 32 for each thread: a row of 768 has a warp to itself, and what is summed over it
    never leaves the warp. (Among 4 warps it waits at a dozen barriers and takes 1.6 times the instructions, counted in
    machine code for sm_90.) A wider row is shared, 16 numbers for each thread: with 32, registers spilled."""
    C = padded(D)
    return {"BLOCK_R": max(1, 1024 // C), "num_warps": 1 if C <= 1024 else C // 512}


def flat(t: Tensor) -> Tensor:
    """(R, D), contiguous."""
    return t.reshape(-1, t.shape[-1]).contiguous()


@triton.jit
def normalised(x, columns, eps, D: tl.constexpr):
    """(x - mean) / sqrt(var + eps), 0 in the columns beyond D, and what was multiplied by."""
    mean = tl.sum(x, 1) / D
    centred = tl.where(columns < D, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalised_backward(grad, xhat, rstd, D: tl.constexpr):
    """Gradient of x from that of `normalised`; grad is 0 in the columns beyond D."""
    mean = tl.sum(grad, 1) / D
    slope = tl.sum(grad * xhat, 1) / D
    return (grad - mean[:, None] - xhat * slope[:, None]) * rstd[:, None]


@triton.jit
def scaled(xhat, weight_ptr, bias_ptr, columns, D: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        xhat = xhat * tl.load(weight_ptr + columns, columns < D, 0.0).to(tl.float32)
    if HAS_BIAS:
        xhat = xhat + tl.load(bias_ptr + columns, columns < D, 0.0).to(tl.float32)
    return xhat


@triton.jit
def loaded_gradient(grad_ptr, low_ptr, at, mask, HAS_GRAD: tl.constexpr, HAS_LOW: tl.constexpr):
    """Of a result that is given twice: the sum, in float32."""
    if HAS_GRAD:
        grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
        if HAS_LOW:
            grad += tl.load(low_ptr + at, mask, 0.0).to(tl.float32)
    else:
        grad = tl.load(low_ptr + at, mask, 0.0).to(tl.float32)
    return grad
