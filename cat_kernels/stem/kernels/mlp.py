"""LayerNorm, two linear layers with GELU between them, and the residual: y = x + fc2(GELU(fc1(LN(x)))).

    xn = LN(x),  pre = xn @ W1.T + b1,  hidden = GELU(pre),  y = x + hidden @ W2.T + b2
    dpre = (grad @ W2) * GELU'(pre),  dxn = dpre @ W1,  dx = grad + LN'(dxn)
    dW1 = dpre.T @ xn,  db1 = sum dpre,  dW2 = grad.T @ hidden,  db2 = sum grad

The hidden layer, four times as wide as x, is never in memory: it is made a chunk at a time, and made again in backward.

A tile's columns are kept in two parts, c = HI + LO, both powers of two as tiles must be: 384 = 256 + 128, where one
tile would need 512 columns, a third more of everything. `HI` is less than c, so that both parts always exist.

Shapes: R rows, c channels, h hidden; a tile has BLOCK_R rows and BLOCK_H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_kernels._triton import Ahead, dot, input_precision, launch, padded
from cat_kernels.stem.kernels.rows import layer_norm

# Rows that LayerNorm takes at a time: a whole tile of them in float32 would not fit in the registers.
PART = tl.constexpr(16)


# Programs that share the gradient of the weights: two on every multiprocessor of an H200.
PROGRAMS = 264


def split_width(c: int) -> tuple[int, int]:
    """c -> HI, LO: the largest power of two below c, and the tile that holds the rest; both at least 16."""
    HI = max(16, triton.next_power_of_2(c) // 2)
    return HI, padded(c - HI)


def config(kernel: str, c: int, h: int, dtype: torch.dtype, architecture: int = 90) -> dict[str, int]:
    """Tiles of "forward", "backward_input" or "backward_weight", by what they hold of registers and shared memory.

    A tile of rows stays in shared memory while the weights pass by, twice that in "backward_input"; accumulators as
    wide as c stay in registers, twice in "backward_weight". ``architecture``: 80, 90, ... for compute capability 8.0,
    9.0: Ampere has 163 KiB of shared memory where Hopper has 227, and Blackwell passes more operands through it.
    """
    width = sum(split_width(c))
    ampere, blackwell = architecture < 90, architecture >= 100
    stages = 2
    if dtype == torch.float32:
        # No matrix units: every operand passes through registers.
        rows, hidden, warps = 16, 16, 4
    elif kernel == "forward":
        rows, hidden, warps = (64 if ampere or width > 384 else 128), 32, 8
    elif kernel == "backward_input":
        rows, hidden, warps = (64 if ampere or width > 256 else 128), 32, 8
        hidden = 16 if blackwell and width > 256 else 32
    else:
        # On Hopper, 64 at width 384 keeps wgmma but spills 17 registers in the loop.
        rows, hidden, warps = 32, (64 if width <= (384 if blackwell else 256) else 32), 8
        stages = 1 if blackwell and width > 256 else 2
    return {"BLOCK_R": rows, "BLOCK_H": min(hidden, padded(h)), "num_warps": warps, "num_stages": stages}


def _architecture(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] * 10 if x.device.type == "cuda" else 90


def _constants(kernel: str, x: Tensor, h: int) -> dict[str, Any]:
    """The constexpr arguments and compiler options of a launch."""
    c = x.shape[1]
    HI, LO = split_width(c)
    shapes = {"c": c, "h": h, "HI": HI, "LO": LO, "PRECISION": input_precision(x.dtype)}
    return shapes | config(kernel, c, h, x.dtype, _architecture(x))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_and_slope(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _columns(c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """Numbers of the columns of both parts, and which of the second are inside: those of the first all are."""
    hi = tl.arange(0, HI)
    lo = HI + tl.arange(0, LO)
    return hi, lo, (lo < c) | (c == HI + LO)


@triton.jit
def _load_rows(ptr, rows, R, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """The rows of (R, c), zeros beyond it: (len(rows), HI), (len(rows), LO)."""
    hi, lo, in_lo = _columns(c, HI, LO)
    at = rows.to(tl.int64)[:, None] * c
    inside = (rows < R)[:, None]
    return tl.load(ptr + at + hi, inside, 0.0), tl.load(ptr + at + lo, inside & in_lo, 0.0)


@triton.jit
def _store_rows(ptr, y_hi, y_lo, rows, R, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    hi, lo, in_lo = _columns(c, HI, LO)
    at = rows.to(tl.int64)[:, None] * c
    inside = (rows < R)[:, None]
    tl.store(ptr + at + hi, y_hi, inside)
    tl.store(ptr + at + lo, y_lo, inside & in_lo)


@triton.jit
def _load_vector(ptr, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """(c,) -> (HI,), (LO,) in float32, zeros beyond c."""
    hi, lo, in_lo = _columns(c, HI, LO)
    return tl.load(ptr + hi).to(tl.float32), tl.load(ptr + lo, in_lo, 0.0).to(tl.float32)


@triton.jit
def _normalise(x_hi, x_lo, eps, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """(x - mean) * rstd of every row in float32, zeros beyond c, and rstd (BLOCK_R,)."""
    x_hi = x_hi.to(tl.float32)
    x_lo = x_lo.to(tl.float32)
    mean = (tl.sum(x_hi, 1) + tl.sum(x_lo, 1)) / c
    x_hi = x_hi - mean[:, None]
    x_lo = tl.where(HI + tl.arange(0, LO) < c, x_lo - mean[:, None], 0.0)
    rstd = tl.rsqrt((tl.sum(x_hi * x_hi, 1) + tl.sum(x_lo * x_lo, 1)) / c + eps)
    return x_hi * rstd[:, None], x_lo * rstd[:, None], rstd


@triton.jit
def _layer_norm_rows(
    x_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    xn_ptr,
    first,
    R,
    eps,
    c: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """xn = LN(x) for the rows of one tile, a few at a time to need few registers, and visible to the whole program."""
    w_hi, w_lo = _load_vector(ln_weight_ptr, c, HI, LO)
    b_hi, b_lo = _load_vector(ln_bias_ptr, c, HI, LO)
    for part in range(0, BLOCK_R, PART):
        rows = first + part + tl.arange(0, PART)
        x_hi, x_lo = _load_rows(x_ptr, rows, R, c, HI, LO)
        xhat_hi, xhat_lo, _ = _normalise(x_hi, x_lo, eps, c, HI, LO)
        _store_rows(xn_ptr, xhat_hi * w_hi + b_hi, xhat_lo * w_lo + b_lo, rows, R, c, HI, LO)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["R", "eps"])
def _norm_mlp_residual(
    x_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    fc1_ptr,
    b1_ptr,
    fc2_ptr,
    b2_ptr,
    y_ptr,
    R,
    eps,
    c: tl.constexpr,
    h: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    hi, lo, in_lo = _columns(c, HI, LO)
    # LN(x) goes through y's own rows, written for good at the end: Triton keeps a left operand in shared memory only
    # when it was loaded, and otherwise in registers, which the accumulators need.
    _layer_norm_rows(x_ptr, ln_weight_ptr, ln_bias_ptr, y_ptr, first, R, eps, c, HI, LO, BLOCK_R)
    xn_hi, xn_lo = _load_rows(y_ptr, rows, R, c, HI, LO)
    tl.debug_barrier()

    acc_hi = tl.zeros((BLOCK_R, HI), tl.float32)
    acc_lo = tl.zeros((BLOCK_R, LO), tl.float32)
    for start in range(0, h, BLOCK_H):
        hs = start + tl.arange(0, BLOCK_H)
        in_h = (hs < h) | (h % BLOCK_H == 0)
        fc1_hi = tl.load(fc1_ptr + hs * c + hi[:, None], in_h, 0.0)
        fc1_lo = tl.load(fc1_ptr + hs * c + lo[:, None], in_h & in_lo[:, None], 0.0)
        pre = dot(xn_hi, fc1_hi, tl.zeros((BLOCK_R, BLOCK_H), tl.float32), PRECISION)
        pre = dot(xn_lo, fc1_lo, pre, PRECISION)
        pre += tl.load(b1_ptr + hs, in_h, 0.0).to(tl.float32)
        hidden = _gelu(pre).to(x_ptr.dtype.element_ty)
        fc2_hi = tl.load(fc2_ptr + hi * h + hs[:, None], in_h[:, None], 0.0)
        fc2_lo = tl.load(fc2_ptr + lo * h + hs[:, None], in_h[:, None] & in_lo, 0.0)
        acc_hi = dot(hidden, fc2_hi, acc_hi, PRECISION)
        acc_lo = dot(hidden, fc2_lo, acc_lo, PRECISION)

    # As before the loop, for who does not know that the second number is always 0: addresses are made anew, where the
    # compiler would otherwise keep them in registers, or out of them, all the way.
    first = (tl.program_id(0) + tl.program_id(1)) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    # The MLP's result too is stored and added to x a few rows at a time: beside the accumulators there is no room.
    _store_rows(y_ptr, acc_hi, acc_lo, rows, R, c, HI, LO)
    tl.debug_barrier()
    b_hi, b_lo = _load_vector(b2_ptr, c, HI, LO)
    for part in range(0, BLOCK_R, PART):
        some = first + part + tl.arange(0, PART)
        x_hi, x_lo = _load_rows(x_ptr, some, R, c, HI, LO)
        y_hi, y_lo = _load_rows(y_ptr, some, R, c, HI, LO)
        tl.debug_barrier()
        _store_rows(y_ptr, x_hi + (y_hi + b_hi), x_lo + (y_lo + b_lo), some, R, c, HI, LO)


def norm_mlp_residual(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> Tensor:
    """(R, c) -> (R, c); fc1_weight (h, c) and fc2_weight (c, h) in x's dtype."""
    y = torch.empty_like(x)
    constants = _constants("forward", x, fc1_weight.shape[0])
    grid = (triton.cdiv(x.shape[0], constants["BLOCK_R"]),)
    tensors = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, y)
    launch(_norm_mlp_residual, grid, *tensors, x.shape[0], eps, **constants)
    return y


@triton.jit(do_not_specialize=["R", "eps"])
def _norm_mlp_backward_input(
    grad_ptr,
    x_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    fc1_ptr,
    b1_ptr,
    fc2_ptr,
    dx_ptr,
    dln_weight_ptr,
    dln_bias_ptr,
    R,
    eps,
    c: tl.constexpr,
    h: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    hi, lo, in_lo = _columns(c, HI, LO)
    _layer_norm_rows(x_ptr, ln_weight_ptr, ln_bias_ptr, dx_ptr, first, R, eps, c, HI, LO, BLOCK_R)
    xn_hi, xn_lo = _load_rows(dx_ptr, rows, R, c, HI, LO)
    grad_hi, grad_lo = _load_rows(grad_ptr, rows, R, c, HI, LO)
    tl.debug_barrier()

    acc_hi = tl.zeros((BLOCK_R, HI), tl.float32)
    acc_lo = tl.zeros((BLOCK_R, LO), tl.float32)
    for start in range(0, h, BLOCK_H):
        hs = start + tl.arange(0, BLOCK_H)
        in_h = (hs < h) | (h % BLOCK_H == 0)
        fc1_hi = tl.load(fc1_ptr + hs[:, None] * c + hi, in_h[:, None], 0.0)
        fc1_lo = tl.load(fc1_ptr + hs[:, None] * c + lo, in_h[:, None] & in_lo, 0.0)
        pre = dot(xn_hi, tl.trans(fc1_hi), tl.zeros((BLOCK_R, BLOCK_H), tl.float32), PRECISION)
        pre = dot(xn_lo, tl.trans(fc1_lo), pre, PRECISION)
        pre += tl.load(b1_ptr + hs, in_h, 0.0).to(tl.float32)
        fc2_hi = tl.load(fc2_ptr + hi[:, None] * h + hs, in_h, 0.0)
        fc2_lo = tl.load(fc2_ptr + lo[:, None] * h + hs, in_h & in_lo[:, None], 0.0)
        dhidden = dot(grad_hi, fc2_hi, tl.zeros((BLOCK_R, BLOCK_H), tl.float32), PRECISION)
        dhidden = dot(grad_lo, fc2_lo, dhidden, PRECISION)
        dpre = (dhidden * _gelu_and_slope(pre)[1]).to(x_ptr.dtype.element_ty)
        acc_hi = dot(dpre, fc1_hi, acc_hi, PRECISION)
        acc_lo = dot(dpre, fc1_lo, acc_lo, PRECISION)

    # The gradient of LN(x) takes the way that LN(x) took, and is rounded as a stored tensor is.
    at = rows.to(tl.int64)[:, None] * c
    inside = (rows < R)[:, None]
    tl.store(dx_ptr + at + hi, acc_hi, inside)
    tl.store(dx_ptr + at + lo, acc_lo, inside & in_lo)
    tl.debug_barrier()
    w_hi, w_lo = _load_vector(ln_weight_ptr, c, HI, LO)
    dw_hi = tl.zeros((HI,), tl.float32)
    dw_lo = tl.zeros((LO,), tl.float32)
    db_hi = tl.zeros((HI,), tl.float32)
    db_lo = tl.zeros((LO,), tl.float32)
    for part in range(0, BLOCK_R, PART):
        some = first + part + tl.arange(0, PART)
        x_hi, x_lo = _load_rows(x_ptr, some, R, c, HI, LO)
        xhat_hi, xhat_lo, rstd = _normalise(x_hi, x_lo, eps, c, HI, LO)
        dxn_hi, dxn_lo = _load_rows(dx_ptr, some, R, c, HI, LO)
        tl.debug_barrier()
        dxn_hi = dxn_hi.to(tl.float32)
        dxn_lo = dxn_lo.to(tl.float32)
        dw_hi += tl.sum(dxn_hi * xhat_hi, 0)
        dw_lo += tl.sum(dxn_lo * xhat_lo, 0)
        db_hi += tl.sum(dxn_hi, 0)
        db_lo += tl.sum(dxn_lo, 0)
        u_hi = dxn_hi * w_hi
        u_lo = dxn_lo * w_lo
        mean = (tl.sum(u_hi, 1) + tl.sum(u_lo, 1)) / c
        slope = (tl.sum(u_hi * xhat_hi, 1) + tl.sum(u_lo * xhat_lo, 1)) / c
        g_hi, g_lo = _load_rows(grad_ptr, some, R, c, HI, LO)
        dx_hi = (u_hi - mean[:, None] - xhat_hi * slope[:, None]) * rstd[:, None] + g_hi
        dx_lo = (u_lo - mean[:, None] - xhat_lo * slope[:, None]) * rstd[:, None] + g_lo
        _store_rows(dx_ptr, dx_hi, dx_lo, some, R, c, HI, LO)
    out = tl.program_id(0).to(tl.int64) * c
    tl.store(dln_weight_ptr + out + hi, dw_hi)
    tl.store(dln_weight_ptr + out + lo, dw_lo, in_lo)
    tl.store(dln_bias_ptr + out + hi, db_hi)
    tl.store(dln_bias_ptr + out + lo, db_lo, in_lo)


def norm_mlp_backward_input(
    grad: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the result (R, c), and the inputs -> dx (R, c) in x's dtype, dln_weight and dln_bias (c,) float32.

    A partial sum of the latter for every tile of rows: 8 / BLOCK_R bytes for every element of x.
    """
    R, c = x.shape
    dx = torch.empty_like(x)
    constants = _constants("backward_input", x, fc1_weight.shape[0])
    tiles = triton.cdiv(R, constants["BLOCK_R"])
    dln_weight, dln_bias = x.new_empty((2, tiles, c), dtype=torch.float32)
    tensors = (grad, x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, dx, dln_weight, dln_bias)
    launch(_norm_mlp_backward_input, (tiles,), *tensors, R, eps, **constants)
    return dx, dln_weight.sum(0), dln_bias.sum(0)


@triton.jit(do_not_specialize=["R", "SPLITS"])
def _mlp_backward_weight(
    grad_ptr,
    xn_ptr,
    fc1_ptr,
    b1_ptr,
    fc2_ptr,
    dfc1_ptr,
    db1_ptr,
    dfc2_ptr,
    R,
    SPLITS,
    c: tl.constexpr,
    h: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Programs of the same rows are neighbours, and find them in the cache.
    chunks: tl.constexpr = (h + BLOCK_H - 1) // BLOCK_H
    split = tl.program_id(0) // chunks
    dtype: tl.constexpr = xn_ptr.dtype.element_ty
    hs = tl.program_id(0) % chunks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = ((hs < h) | (h % BLOCK_H == 0))[:, None]
    hi, lo, in_lo = _columns(c, HI, LO)
    fc1_hi = tl.load(fc1_ptr + hs[:, None] * c + hi, in_h, 0.0)
    fc1_lo = tl.load(fc1_ptr + hs[:, None] * c + lo, in_h & in_lo, 0.0)
    fc2_hi = tl.load(fc2_ptr + hi * h + hs[:, None], in_h, 0.0)
    fc2_lo = tl.load(fc2_ptr + lo * h + hs[:, None], in_h & in_lo, 0.0)
    b1 = tl.load(b1_ptr + hs, hs < h, 0.0).to(tl.float32)

    # Everything of a chunk is transposed, hidden units first: the accumulators' left operands come from registers.
    dfc1_hi = tl.zeros((BLOCK_H, HI), tl.float32)
    dfc1_lo = tl.zeros((BLOCK_H, LO), tl.float32)
    dfc2_hi = tl.zeros((BLOCK_H, HI), tl.float32)
    dfc2_lo = tl.zeros((BLOCK_H, LO), tl.float32)
    db1 = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(split * BLOCK_R, R, SPLITS * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        xn_hi, xn_lo = _load_rows(xn_ptr, rows, R, c, HI, LO)
        grad_hi, grad_lo = _load_rows(grad_ptr, rows, R, c, HI, LO)
        pre = dot(fc1_hi, tl.trans(xn_hi), tl.zeros((BLOCK_H, BLOCK_R), tl.float32), PRECISION)
        pre = dot(fc1_lo, tl.trans(xn_lo), pre, PRECISION)
        dhidden = dot(fc2_hi, tl.trans(grad_hi), tl.zeros((BLOCK_H, BLOCK_R), tl.float32), PRECISION)
        dhidden = dot(fc2_lo, tl.trans(grad_lo), dhidden, PRECISION)
        hidden, slope = _gelu_and_slope(pre + b1[:, None])
        dpre = dhidden * slope
        db1 += tl.sum(dpre, 1)
        dpre = dpre.to(dtype)
        hidden = hidden.to(dtype)
        dfc1_hi = dot(dpre, xn_hi, dfc1_hi, PRECISION)
        dfc1_lo = dot(dpre, xn_lo, dfc1_lo, PRECISION)
        dfc2_hi = dot(hidden, grad_hi, dfc2_hi, PRECISION)
        dfc2_lo = dot(hidden, grad_lo, dfc2_lo, PRECISION)

    out = (split * h + hs).to(tl.int64)
    tl.store(db1_ptr + out, db1, hs < h)
    at = out[:, None] * c
    tl.store(dfc1_ptr + at + hi, dfc1_hi, in_h)
    tl.store(dfc1_ptr + at + lo, dfc1_lo, in_h & in_lo)
    tl.store(dfc2_ptr + at + hi, dfc2_hi, in_h)
    tl.store(dfc2_ptr + at + lo, dfc2_lo, in_h & in_lo)


def norm_mlp_backward_weight(
    grad: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of the result (R, c), and the inputs -> dfc1_weight (h, c), dfc1_bias (h,), dfc2_weight (c, h) and
    dfc2_bias (c,), float32, summed in a fixed order.

    LN(x) is stored for the time of the call: h / BLOCK_H programs read every row, and normalising it in each of them
    would cost about half as many instructions as the matrix products.
    """
    R, c = x.shape
    h = fc1_weight.shape[0]
    xn = layer_norm(x, ln_weight, ln_bias, eps)
    constants = _constants("backward_weight", x, h)
    chunks = triton.cdiv(h, constants["BLOCK_H"])
    splits = min(max(1, PROGRAMS // chunks), triton.cdiv(R, constants["BLOCK_R"]))
    dfc1, dfc2 = x.new_empty((2, splits, h, c), dtype=torch.float32)
    db1 = x.new_empty((splits, h), dtype=torch.float32)
    tensors = (grad, xn, fc1_weight, fc1_bias, fc2_weight, dfc1, db1, dfc2)
    launch(_mlp_backward_weight, (chunks * splits,), *tensors, R, splits, **constants)
    return dfc1.sum(0), db1.sum(0), dfc2.sum(0).t().contiguous(), grad.sum(0, dtype=torch.float32)


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model, with the tiles of ``architecture``."""
    element = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    norm = {"ln_weight_ptr": "*fp32", "ln_bias_ptr": "*fp32"}
    weights = {"fc1_ptr": f"*{dtype}", "b1_ptr": "*fp32", "fc2_ptr": f"*{dtype}"}
    grad, x, xn, y, dx = ({f"{name}_ptr": f"*{dtype}"} for name in ("grad", "x", "xn", "y", "dx"))
    dnorm = {"dln_weight_ptr": "*fp32", "dln_bias_ptr": "*fp32"}
    dweights = {"dfc1_ptr": "*fp32", "db1_ptr": "*fp32", "dfc2_ptr": "*fp32"}
    rows = {"R": "i32", "eps": "fp32"}
    kernels: dict[str, tuple[Any, dict[str, str]]] = {
        "forward": (_norm_mlp_residual, x | norm | weights | {"b2_ptr": "*fp32"} | y | rows),
        "backward_input": (_norm_mlp_backward_input, grad | x | norm | weights | dx | dnorm | rows),
        "backward_weight": (_mlp_backward_weight, grad | xn | weights | dweights | {"R": "i32", "SPLITS": "i32"}),
    }
    found = []
    for c in (256, 384):
        HI, LO = split_width(c)
        for name, (kernel, signature) in kernels.items():
            options = config(name, c, 4 * c, element, architecture)
            tiles = {tile: options.pop(tile) for tile in ("BLOCK_R", "BLOCK_H")}
            constexprs = {"c": c, "h": 4 * c, "HI": HI, "LO": LO, "PRECISION": "ieee", **tiles}
            found.append(Ahead(f"norm_mlp_{name} c={c}", kernel, signature, constexprs, options))
    return found
