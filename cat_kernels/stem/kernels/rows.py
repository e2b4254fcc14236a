"""LayerNorm over the channels of every row, and its backward with the residual's gradient added.

    xhat = (x - mean) / sqrt(var + eps),  y = xhat * weight + bias
    dx = rstd * (u - mean(u) - xhat * mean(u * xhat)) + residual,  u = dy * weight

What is added is the gradient of a residual path; its sum over the rows is the gradient of the bias in front of it.

Shapes: R rows, c channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Ahead, launch, padded
from . import tiles

PROGRAMS = 1024  # that share the rows of a backward: two to eight on every multiprocessor


@triton.jit(do_not_specialize=["R", "eps"])
def _layer_norm(x_ptr, weight_ptr, bias_ptr, y_ptr, R, eps, c: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, C)
    at = rows.to(tl.int64)[:, None] * c + columns
    mask = (rows < R)[:, None] & (columns < c)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    mean = tl.sum(x, 1) / c
    centred = tl.where(columns < c, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)
    weight = tl.load(weight_ptr + columns, columns < c, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, columns < c, 0.0).to(tl.float32)
    tl.store(y_ptr + at, centred * rstd[:, None] * weight + bias, mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """(R, c) -> (R, c) in ``dtype``; without it, in x's."""
    R, c = x.shape
    y = torch.empty_like(x, dtype=dtype)
    options = tiles.layer_norm(c)
    grid = (triton.cdiv(R, options["BLOCK_R"]),)
    launch(_layer_norm, grid, x, weight, bias, y, R, eps, c=c, C=padded(c), **options)
    return y


@triton.jit(do_not_specialize=["R", "eps"])
def _layer_norm_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    dx_ptr,
    sums_ptr,
    R,
    eps,
    c: tl.constexpr,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # sums (programs, 3, c): of this program's rows, dweight, dbias and the residual's sum. They stay apart for every
    # row of a tile until the end: a sum over rows in the loop is a barrier of all warps.
    columns = tl.arange(0, C)
    weight = tl.load(weight_ptr + columns, columns < c, 0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, C), tl.float32)
    dbias = tl.zeros((BLOCK_R, C), tl.float32)
    dresidual = tl.zeros((BLOCK_R, C), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        at = rows.to(tl.int64)[:, None] * c + columns
        mask = (rows < R)[:, None] & (columns < c)
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
        mean = tl.sum(x, 1) / c
        centred = tl.where(columns < c, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)
        xhat = centred * rstd[:, None]
        u = grad * weight
        dx = (u - (tl.sum(u, 1) / c)[:, None] - xhat * (tl.sum(u * xhat, 1) / c)[:, None]) * rstd[:, None]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
            dx += residual
            dresidual += residual
        tl.store(dx_ptr + at, dx, mask)
        dweight += grad * xhat
        dbias += grad
    out = sums_ptr + tl.program_id(0) * 3 * c + columns
    tl.store(out, tl.sum(dweight, 0), columns < c)
    tl.store(out + c, tl.sum(dbias, 0), columns < c)
    if HAS_RESIDUAL:
        tl.store(out + 2 * c, tl.sum(dresidual, 0), columns < c)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the result, and the input -> dx (R, c) in the gradient's dtype, with ``residual`` (R, c) added,
    written to ``out`` where given; and (3, c) float32, summed in a fixed order: dweight, dbias, the residual's sum over
    the rows (without a residual: 2 rows)."""
    R, c = x.shape
    options = tiles.layer_norm_backward(c)
    programs = min(PROGRAMS, triton.cdiv(R, options["BLOCK_R"]))
    dx = torch.empty_like(grad) if out is None else out
    sums = x.new_empty((programs, 3, c), dtype=torch.float32)
    tensors = (grad, x, weight, grad if residual is None else residual, dx, sums)
    sizes = {"c": c, "C": padded(c), "HAS_RESIDUAL": residual is not None}
    launch(_layer_norm_backward, (programs,), *tensors, R, eps, **sizes, **options)
    return dx, sums[:, : 2 if residual is None else 3].sum(0)


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model."""
    found = []
    for c in sorted({768, *(c for c, _ in tiles.STAGES)}):
        options = tiles.layer_norm(c)
        sizes: dict[str, Any] = {"c": c, "C": padded(c), "BLOCK_R": options.pop("BLOCK_R")}
        ends = {"R": "i32", "eps": "fp32"}
        forward = {"x_ptr": f"*{dtype}", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": f"*{dtype}", **ends}
        found.append(Ahead(f"layer_norm c={c}", _layer_norm, forward, sizes, options))
        tensors = dict.fromkeys(("grad_ptr", "x_ptr"), f"*{dtype}") | {"weight_ptr": "*fp32"}
        tensors |= dict.fromkeys(("residual_ptr", "dx_ptr"), f"*{dtype}")
        tensors |= {"sums_ptr": "*fp32"}
        options = tiles.layer_norm_backward(c)
        constexprs = {**sizes, "BLOCK_R": options.pop("BLOCK_R"), "HAS_RESIDUAL": True}
        found.append(
            Ahead(f"layer_norm_backward c={c}", _layer_norm_backward, {**tensors, **ends}, constexprs, options)
        )
    return found
