"""`layer_norm_gelu` in Triton: whole rows, one pass forward and one backward, which computes the norm again.

Where the backward sums for weight and bias, a program goes through every PROGRAMS-th tile of rows, and the sums stay in
as many rows as the tile has until the end.

Shapes: R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gelu_triton import gelu, gelu_slope
from .._norm_triton import PROGRAMS, config, flat, loaded_gradient, normalised, normalised_backward, scaled
from .._triton import Ahead, launch, padded


@triton.jit(do_not_specialize=["R", "eps"])
def _layer_norm_gelu(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    low_ptr,
    R,
    eps,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, C)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns
    mask = (rows < R)[:, None] & (columns < D)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    xhat, _ = normalised(x, columns, eps, D)
    y = gelu(scaled(xhat, weight_ptr, bias_ptr, columns, D, HAS_WEIGHT, HAS_BIAS))
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask)
    if HAS_LOW:
        tl.store(low_ptr + at, y, mask)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    low: Tensor | None,
) -> None:
    """Writes y, and low where given. See `cat_kernels.layer_norm_gelu`."""
    x = flat(x)
    R, D = x.shape
    affine = [x if t is None else t.contiguous() for t in (weight, bias)]
    tensors = (x, x if residual is None else flat(residual), *affine, y, y if low is None else low)
    flags = {
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_LOW": low is not None,
    }
    options = config(D)
    grid = (triton.cdiv(R, options["BLOCK_R"]),)
    launch(_layer_norm_gelu, grid, *tensors, R, eps, D=D, C=padded(D), **flags, **options)


@triton.jit(do_not_specialize=["R", "eps"])
def _layer_norm_gelu_backward(
    grad_ptr,
    grad_low_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    dresidual_ptr,
    sums_ptr,
    R,
    eps,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        grad = loaded_gradient(grad_ptr, grad_low_ptr, at, mask, HAS_GRAD, HAS_LOW)
        if HAS_RESIDUAL:
            tl.store(dresidual_ptr + at, grad, mask)
        xhat, rstd = normalised(x, columns, eps, D)
        grad *= gelu_slope(scaled(xhat, weight_ptr, bias_ptr, columns, D, HAS_WEIGHT, HAS_BIAS))
        if HAS_SUMS:
            dweight += grad * xhat
            dbias += grad
        grad = scaled(grad, weight_ptr, weight_ptr, columns, D, HAS_WEIGHT, False)
        tl.store(dx_ptr + at, normalised_backward(grad, xhat, rstd, D), mask)
    if HAS_SUMS:
        out = sums_ptr + tl.program_id(0) * 2 * D + columns
        tl.store(out, tl.sum(dweight, 0)[None, :], columns < D)
        tl.store(out + D, tl.sum(dbias, 0)[None, :], columns < D)


def backward(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dx: Tensor,
    dresidual: Tensor | None,
    sums: bool,
) -> Tensor:
    """Writes dx, and dresidual where given; (2, D) float32, summed in a fixed order: dweight, dbias. Without ``sums``
    it is empty."""
    x = flat(x)
    R, D = x.shape
    options = config(D)
    tiles = triton.cdiv(R, options["BLOCK_R"])
    programs = min(PROGRAMS, tiles) if sums else tiles
    partial = x.new_empty((programs, 2, D) if sums else (0,), dtype=torch.float32)
    grads = [x if g is None else flat(g) for g in (grad, grad_low)]
    affine = [x if t is None else t.contiguous() for t in (weight, bias)]
    tensors = (*grads, x, *affine, dx, dx if dresidual is None else dresidual, partial)
    flags = {
        "HAS_GRAD": grad is not None,
        "HAS_LOW": grad_low is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": dresidual is not None,
        "HAS_SUMS": sums,
    }
    launch(_layer_norm_gelu_backward, (programs,), *tensors, R, eps, D=D, C=padded(D), **flags, **options)
    return partial.sum(0) if sums else partial


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The base model's decoder: under autocast the residual is float32, what a convolution gives and takes is not."""
    D = 768
    options = config(D)
    sizes: dict[str, Any] = {"D": D, "C": padded(D), "BLOCK_R": options.pop("BLOCK_R")}
    both, ends = dtype != "fp32", {"R": "i32", "eps": "fp32"}
    affine = {"weight_ptr": "*fp32", "bias_ptr": "*fp32"}
    x = {"x_ptr": f"*{dtype}"}
    signature = {**x, "residual_ptr": "*fp32", **affine, "y_ptr": "*fp32", "low_ptr": f"*{dtype}", **ends}
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": False, "HAS_BIAS": False, "HAS_LOW": both}
    found = [Ahead("layer_norm_gelu", _layer_norm_gelu, signature, {**sizes, **flags}, options)]
    signature = {"grad_ptr": "*fp32", "grad_low_ptr": f"*{dtype}", **x, **affine}
    signature |= {"dx_ptr": f"*{dtype}", "dresidual_ptr": "*fp32", "sums_ptr": "*fp32", **ends}
    for name, whole in (("layer_norm_gelu_backward", False), ("layer_norm_gelu_backward, with weights", True)):
        flags = {"HAS_GRAD": True, "HAS_LOW": both, "HAS_WEIGHT": whole, "HAS_BIAS": whole}
        flags |= {"HAS_RESIDUAL": both, "HAS_SUMS": whole}
        found.append(Ahead(name, _layer_norm_gelu_backward, signature, {**sizes, **flags}, options))
    return found
