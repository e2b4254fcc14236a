"""LayerNorm, two linear layers with GELU between them, and the residual: y = x + fc2(GELU(fc1(LN(x)))).

    xn = LN(x),  pre = xn @ W1.T + b1,  hidden = GELU(pre),  y = x + hidden @ W2.T + b2
    dpre = (grad @ W2) * GELU'(pre),  dxn = dpre @ W1,  dx = grad + LN'(dxn)
    dW1 = dpre.T @ xn,  db1 = sum dpre,  dW2 = grad.T @ hidden,  db2 = sum grad

The hidden layer, four times as wide as x, is kept for nothing: the forward makes it a chunk at a time on the chip, the
backward makes it again. Of what the chip has no room for (see `tiles.mlp`) and of the backward, a slice of rows at a
time lies in memory, at most `SCRATCH` bytes however large the batch. In the backward that is what costs least: with
hidden and dpre of a slice at hand, the three products that are left are plain ones, for the vendor's library; made
again in each of two fused kernels, they cost 28 c^2 multiply-adds a row where this costs 20.

A fused tile's columns are kept in two parts, c = HI + LO, both powers of two as tiles must be: 384 = 256 + 128, where
one tile would need 512 columns, a third more of everything. `HI` is less than c, so that both parts always exist.

Shapes: R rows, c channels, h hidden; a tile has BLOCK_R rows and BLOCK_H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..._gelu_triton import gelu, normal
from ..._triton import DTYPES, Ahead, dot, launch, product
from . import tiles
from .linear import norm_linear
from .rows import layer_norm, layer_norm_backward

# Bytes of hidden layer, and of its gradient, in memory at a time: 32,768 rows or more of the base model's, some 0.1 ms
# of work for ten launches.
SCRATCH = 256 << 20

# Rows that LayerNorm takes at a time: a whole tile of them in float32 would not fit in the registers.
PART = tl.constexpr(16)


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
        pre = dot(xn_hi, fc1_hi, tl.zeros((BLOCK_R, BLOCK_H), tl.float32), "ieee")
        pre = dot(xn_lo, fc1_lo, pre, "ieee")
        pre += tl.load(b1_ptr + hs, in_h, 0.0).to(tl.float32)
        hidden = gelu(pre).to(x_ptr.dtype.element_ty)
        fc2_hi = tl.load(fc2_ptr + hi * h + hs[:, None], in_h[:, None], 0.0)
        fc2_lo = tl.load(fc2_ptr + lo * h + hs[:, None], in_h[:, None] & in_lo, 0.0)
        acc_hi = dot(hidden, fc2_hi, acc_hi, "ieee")
        acc_lo = dot(hidden, fc2_lo, acc_lo, "ieee")

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
    (R, c), h = x.shape, fc1_weight.shape[0]
    y = torch.empty_like(x)
    options = tiles.mlp(c, h, x.dtype, tiles.Chip.of(x.device))
    if options is None:
        for rows in _slices(R, h * x.element_size()):
            hidden = norm_linear(x[rows], ln_weight, ln_bias, fc1_weight, fc1_bias, eps, activation=True)
            torch.addmm(x[rows] + fc2_bias.to(x.dtype), hidden, fc2_weight.t(), out=y[rows])
        return y
    HI, LO = tiles.split_width(c)
    tensors = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, y)
    launch(
        _norm_mlp_residual, (triton.cdiv(R, options["BLOCK_R"]),), *tensors, R, eps, c=c, h=h, HI=HI, LO=LO, **options
    )
    return y


def _slices(R: int, row_bytes: int) -> Iterator[slice]:
    """Rows in slices of at most `SCRATCH` bytes, whole tiles."""
    size = max(128, SCRATCH // row_bytes // 128 * 128)
    for first in range(0, R, size):
        yield slice(first, min(first + size, R))


@triton.jit(do_not_specialize=["R"])
def _mlp_hidden(
    xn_ptr,
    grad_ptr,
    fc1_ptr,
    b1_ptr,
    fc2_ptr,
    hidden_ptr,
    dpre_ptr,
    db1_ptr,
    R,
    c: tl.constexpr,
    h: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Hidden tiles of the same rows are neighbours, and find them in the cache. db1 (row tiles, h): sums of each tile.
    tiles_h: tl.constexpr = (h + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) // tiles_h
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    hs = tl.program_id(0) % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    ks = tl.arange(0, BLOCK_K)
    row_at = rows.to(tl.int64)[:, None] * c
    inside = (rows < R)[:, None]
    in_h = hs < h
    pre = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    dhidden = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for k in range(0, c, BLOCK_K):
        in_k = k + ks < c
        xn = tl.load(xn_ptr + row_at + (k + ks), inside & in_k, 0.0)
        fc1 = tl.load(fc1_ptr + hs * c + (k + ks)[:, None], in_h & in_k[:, None], 0.0)
        pre = dot(xn, fc1, pre, "ieee")
        grad = tl.load(grad_ptr + row_at + (k + ks), inside & in_k, 0.0)
        fc2 = tl.load(fc2_ptr + (k + ks)[:, None] * h + hs, in_h & in_k[:, None], 0.0)
        dhidden = dot(grad, fc2, dhidden, "ieee")
    pre += tl.load(b1_ptr + hs, in_h, 0.0).to(tl.float32)
    phi, density = normal(pre)
    hidden = pre * phi
    dpre = dhidden * (phi + 0.3989422804014327 * pre * density)
    at = rows.to(tl.int64)[:, None] * h + hs
    tl.store(hidden_ptr + at, hidden, inside & in_h)
    tl.store(dpre_ptr + at, dpre, inside & in_h)
    tl.store(db1_ptr + tile.to(tl.int64) * h + hs, tl.sum(dpre, 0), in_h)  # rows beyond R have gradient 0


def mlp_hidden(
    xn: Tensor, grad: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x) and the gradient of the result, (R, c) -> hidden and dpre (R, h) in their dtype, db1 (h,) float32."""
    (R, c), h = xn.shape, fc1_weight.shape[0]
    options = tiles.mlp_hidden(c, h, xn.dtype, tiles.Chip.of(xn.device))
    if options is None:
        pre = F.linear(xn, fc1_weight, fc1_bias.to(xn.dtype))
        dpre = torch.ops.aten.gelu_backward(grad @ fc2_weight, pre)
        return F.gelu(pre), dpre, dpre.sum(0, dtype=torch.float32)
    hidden, dpre = xn.new_empty(R, h), xn.new_empty(R, h)
    tiles_r = triton.cdiv(R, options["BLOCK_R"])
    db1 = xn.new_empty((tiles_r, h), dtype=torch.float32)
    tensors = (xn, grad, fc1_weight, fc1_bias, fc2_weight, hidden, dpre, db1)
    launch(_mlp_hidden, (tiles_r * triton.cdiv(h, options["BLOCK_H"]),), *tensors, R, c=c, h=h, **options)
    return hidden, dpre, db1.sum(0)


def norm_mlp_backward(
    grad: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradient of the result (R, c), and the inputs -> dx (R, c) in x's dtype; in float32 and summed in a fixed order,
    dln_weight and dln_bias (c,), dfc1_weight (h, c), dfc1_bias (h,), dfc2_weight (c, h) and dfc2_bias (c,)."""
    (R, c), h = x.shape, fc1_weight.shape[0]
    dx = torch.empty_like(x)
    dnorm = x.new_zeros((3, c), dtype=torch.float32)  # of LayerNorm's weight and bias, and of fc2's bias
    dfc1, dfc2 = x.new_zeros((h, c), dtype=torch.float32), x.new_zeros((c, h), dtype=torch.float32)
    db1 = x.new_zeros(h, dtype=torch.float32)
    for rows in _slices(R, 2 * h * x.element_size()):
        xn = layer_norm(x[rows], ln_weight, ln_bias, eps)
        hidden, dpre, sums = mlp_hidden(xn, grad[rows], fc1_weight, fc1_bias, fc2_weight)
        product(dpre.t(), xn, dfc1)
        product(grad[rows].t(), hidden, dfc2)
        db1 += sums
        dnorm += layer_norm_backward(dpre @ fc1_weight, x[rows], ln_weight, eps, grad[rows], out=dx[rows])[1]
    return dx, dnorm[0], dnorm[1], dfc1, db1, dfc2, dnorm[2]


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model, with the tiles of ``architecture``."""
    norm = {"ln_weight_ptr": "*fp32", "ln_bias_ptr": "*fp32"}
    weights = {"fc1_ptr": f"*{dtype}", "b1_ptr": "*fp32", "fc2_ptr": f"*{dtype}"}
    x, xn, grad, y = ({f"{name}_ptr": f"*{dtype}"} for name in ("x", "xn", "grad", "y"))
    hidden = {"hidden_ptr": f"*{dtype}", "dpre_ptr": f"*{dtype}", "db1_ptr": "*fp32", "R": "i32"}
    forward: dict[str, str] = x | norm | weights | {"b2_ptr": "*fp32"} | y | {"R": "i32", "eps": "fp32"}
    found, chip = [], tiles.Chip(architecture)
    for c in sorted({c for c, _ in tiles.STAGES}):
        HI, LO = tiles.split_width(c)
        for name, kernel, signature, more, chosen in (
            ("norm_mlp_residual", _norm_mlp_residual, forward, {"HI": HI, "LO": LO},
             tiles.mlp(c, 4 * c, DTYPES[dtype], chip)),
            ("mlp_hidden", _mlp_hidden, xn | grad | weights | hidden, {},
             tiles.mlp_hidden(c, 4 * c, DTYPES[dtype], chip)),
        ):  # fmt: skip
            if chosen is None:
                continue
            options = {option: chosen[option] for option in ("num_warps", "num_stages")}
            blocks: dict[str, Any] = {size: value for size, value in chosen.items() if size not in options}
            found.append(Ahead(f"{name} c={c}", kernel, signature, {"c": c, "h": 4 * c, **more, **blocks}, options))
    return found
