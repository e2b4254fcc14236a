"""`residual_layer_norm` in Triton: whole rows, one pass forward and one backward.

Where the backward sums for weight and bias, a program goes through every PROGRAMS-th tile of rows, and the sums stay in
as many rows as the tile has until the end: no row waits for another.

Shapes: R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._norm_triton import PROGRAMS, config, flat, loaded_gradient, normalised, normalised_backward, scaled
from .._triton import Ahead, launch, padded


@triton.jit(do_not_specialize=["R", "eps"])
def _residual_layer_norm(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    low_ptr,
    R,
    eps,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, C)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns
    mask = (rows < R)[:, None] & (columns < D)
    s = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) + tl.load(branch_ptr + at, mask, 0.0).to(tl.float32)
    xhat, _ = normalised(s, columns, eps, D)
    y = scaled(xhat, weight_ptr, bias_ptr, columns, D, HAS_WEIGHT, HAS_BIAS)
    tl.store(y_ptr + at, y, mask)
    if HAS_LOW:
        tl.store(low_ptr + at, y, mask)


def forward(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor, low: Tensor | None
) -> None:
    """Writes y, and low where given. See `cat_kernels.residual_layer_norm`."""
    x, branch = flat(x), flat(branch)
    R, D = x.shape
    tensors = (x, branch, *(x if t is None else t.contiguous() for t in (weight, bias)), y, y if low is None else low)
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "HAS_LOW": low is not None}
    options = config(D)
    grid = (triton.cdiv(R, options["BLOCK_R"]),)
    launch(_residual_layer_norm, grid, *tensors, R, eps, D=D, C=padded(D), **flags, **options)


@triton.jit(do_not_specialize=["R", "eps"])
def _residual_layer_norm_backward(
    grad_ptr,
    grad_low_ptr,
    x_ptr,
    branch_ptr,
    weight_ptr,
    dx_ptr,
    dbranch_ptr,
    sums_ptr,
    R,
    eps,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # sums (programs, 2, D): of this program's rows.
    columns = tl.arange(0, C)[None, :]
    dweight = tl.zeros((BLOCK_R, C), tl.float32)
    dbias = tl.zeros((BLOCK_R, C), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        at = rows.to(tl.int64)[:, None] * D + columns
        mask = (rows < R)[:, None] & (columns < D)
        s = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) + tl.load(branch_ptr + at, mask, 0.0).to(tl.float32)
        grad = loaded_gradient(grad_ptr, grad_low_ptr, at, mask, HAS_GRAD, HAS_LOW)
        xhat, rstd = normalised(s, columns, eps, D)
        if HAS_SUMS:
            dweight += grad * xhat
            dbias += grad
        grad = scaled(grad, weight_ptr, weight_ptr, columns, D, HAS_WEIGHT, False)
        dx = normalised_backward(grad, xhat, rstd, D)
        tl.store(dx_ptr + at, dx, mask)
        if HAS_BRANCH:
            tl.store(dbranch_ptr + at, dx, mask)
    if HAS_SUMS:
        out = sums_ptr + tl.program_id(0) * 2 * D + columns
        tl.store(out, tl.sum(dweight, 0)[None, :], columns < D)
        tl.store(out + D, tl.sum(dbias, 0)[None, :], columns < D)


def backward(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    dx: Tensor,
    dbranch: Tensor | None,
    sums: bool,
) -> Tensor:
    """Writes dx, and dbranch where given; (2, D) float32, summed in a fixed order: dweight, dbias. Without ``sums``
    it is empty."""
    x, branch = flat(x), flat(branch)
    R, D = x.shape
    options = config(D)
    tiles = triton.cdiv(R, options["BLOCK_R"])
    programs = min(PROGRAMS, tiles) if sums else tiles
    partial = x.new_empty((programs, 2, D) if sums else (0,), dtype=torch.float32)
    grads = [x if g is None else flat(g) for g in (grad, grad_low)]
    tensors = (*grads, x, branch, x if weight is None else weight.contiguous(), dx, dx if dbranch is None else dbranch)
    flags = {
        "HAS_GRAD": grad is not None,
        "HAS_LOW": grad_low is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BRANCH": dbranch is not None,
        "HAS_SUMS": sums,
    }
    launch(_residual_layer_norm_backward, (programs,), *tensors, partial, R, eps, D=D, C=padded(D), **flags, **options)
    return partial.sum(0) if sums else partial


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The base model's: under autocast the residual is float32, what a product gives and takes is not."""
    D = 768
    options = config(D)
    sizes: dict[str, Any] = {"D": D, "C": padded(D), "BLOCK_R": options.pop("BLOCK_R")}
    both, ends = dtype != "fp32", {"R": "i32", "eps": "fp32"}
    read = {"x_ptr": "*fp32", "branch_ptr": f"*{dtype}", "weight_ptr": "*fp32"}
    signature = {**read, "bias_ptr": "*fp32", "y_ptr": "*fp32", "low_ptr": f"*{dtype}", **ends}
    flags = {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_LOW": both}
    found = [Ahead("residual_layer_norm", _residual_layer_norm, signature, {**sizes, **flags}, options)]
    signature = {"grad_ptr": "*fp32", "grad_low_ptr": f"*{dtype}", **read}
    signature |= {"dx_ptr": "*fp32", "dbranch_ptr": f"*{dtype}", "sums_ptr": "*fp32", **ends}
    flags = {"HAS_GRAD": True, "HAS_LOW": both, "HAS_WEIGHT": True, "HAS_BRANCH": both, "HAS_SUMS": True}
    constexprs = {**sizes, **flags}
    found.append(Ahead("residual_layer_norm_backward", _residual_layer_norm_backward, signature, constexprs, options))
    return found
