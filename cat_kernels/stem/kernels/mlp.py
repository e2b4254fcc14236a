"""LayerNorm, two linear layers with GELU between them, and the residual: y = x + fc2(GELU(fc1(LN(x)))).

    xn = LN(x),  pre = xn @ W1.T + b1,  hidden = GELU(pre),  y = x + hidden @ W2.T + b2
    dpre = (grad @ W2) * GELU'(pre),  dxn = dpre @ W1,  dx = grad + LN'(dxn)
    dW1 = dpre.T @ xn,  db1 = sum dpre,  dW2 = grad.T @ hidden,  db2 = sum grad

The forward makes the hidden layer, four times as wide as x, a chunk at a time on the chip. Of what the chip has no room
for (see `tiles.mlp`) and of the backward, a slice of rows at a time lies in memory (`scratch`): all products there are
plain ones, for the vendor's library, and between them stands one kernel, at the memory's speed.

Measured on an H100 (626,688 rows, c = 256, bfloat16), forward and backward up to dpre: 5.1 ms so; 5.7 where the forward
keeps ``pre`` and the backward fuses GELU' with the product in front of it, which also takes 1.3 GB; 5.2 where the
backward fuses both products with it.

A fused tile's columns are kept in parts, powers of two as tiles must be: 384 = 256 + 128, where one tile would need 512
columns, a third more of everything; 256 is one part. See `tiles.split_width`.

Shapes: R rows, c channels, h hidden; a tile has BLOCK_R rows and BLOCK_H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gelu_triton import gelu, normal
from ..._triton import DTYPES, Ahead, dot, launch, product
from . import tiles
from .rows import layer_norm, layer_norm_backward

# Of the GPU's memory for a hidden layer and its gradient, and the least of it in bytes: one slice for 96 clips of the
# base model with 80 GB. With 256 MiB it would be ten slices of a dozen launches, most of them too small to fill a GPU.
SHARE = 32
SCRATCH = 256 << 20

# Rows that LayerNorm takes at a time: a whole tile of them in float32 would not fit in the registers.
PART = tl.constexpr(16)


@triton.jit
def _columns(PART: tl.constexpr, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """Numbers of the columns of one part, and which of them are inside: those of the first all are."""
    if PART == 0:
        columns = tl.arange(0, HI)
        inside = (columns < c) | (c >= HI)
    else:
        columns = HI + tl.arange(0, LO)
        inside = (columns < c) | (c >= HI + LO)
    return columns, inside


@triton.jit
def _load_rows(ptr, rows, R, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """The rows of (R, c), zeros beyond it: a tuple of (len(rows), HI) and, where LO is not 0, (len(rows), LO)."""
    PARTS: tl.constexpr = 2 if LO else 1
    at = rows.to(tl.int64)[:, None] * c
    found = tl.tuple([])
    for part in tl.static_range(PARTS):
        columns, inside = _columns(part, c, HI, LO)
        found = found + (tl.load(ptr + at + columns, (rows < R)[:, None] & inside, 0.0),)
    return found


@triton.jit
def _store_rows(ptr, parts, rows, R, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    PARTS: tl.constexpr = 2 if LO else 1
    at = rows.to(tl.int64)[:, None] * c
    for part in tl.static_range(PARTS):
        columns, inside = _columns(part, c, HI, LO)
        tl.store(ptr + at + columns, parts[part], (rows < R)[:, None] & inside)


@triton.jit
def _load_vector(ptr, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """(c,) -> a tuple of (HI,) and (LO,) in float32, zeros beyond c."""
    PARTS: tl.constexpr = 2 if LO else 1
    found = tl.tuple([])
    for part in tl.static_range(PARTS):
        columns, inside = _columns(part, c, HI, LO)
        found = found + (tl.load(ptr + columns, inside, 0.0).to(tl.float32),)
    return found


@triton.jit
def _normalise(x, eps, c: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """(x - mean) * rstd of every row in float32, zeros beyond c."""
    PARTS: tl.constexpr = 2 if LO else 1
    mean = tl.sum(x[0].to(tl.float32), 1)
    if LO:
        mean += tl.sum(x[1].to(tl.float32), 1)
    mean = mean / c
    centred = tl.tuple([])
    squares = tl.zeros_like(mean)
    for part in tl.static_range(PARTS):
        _, inside = _columns(part, c, HI, LO)
        some = tl.where(inside, x[part].to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(some * some, 1)
        centred = centred + (some,)
    rstd = tl.rsqrt(squares / c + eps)
    found = tl.tuple([])
    for part in tl.static_range(PARTS):
        found = found + (centred[part] * rstd[:, None],)
    return found


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
    PARTS: tl.constexpr = 2 if LO else 1
    weight = _load_vector(ln_weight_ptr, c, HI, LO)
    bias = _load_vector(ln_bias_ptr, c, HI, LO)
    for part in range(0, BLOCK_R, PART):
        rows = first + part + tl.arange(0, PART)
        xhat = _normalise(_load_rows(x_ptr, rows, R, c, HI, LO), eps, c, HI, LO)
        xn = tl.tuple([])
        for i in tl.static_range(PARTS):
            xn = xn + (xhat[i] * weight[i] + bias[i],)
        _store_rows(xn_ptr, xn, rows, R, c, HI, LO)
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
    PARTS: tl.constexpr = 2 if LO else 1
    first = tl.program_id(0) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    # LN(x) goes through y's own rows, written for good at the end: Triton keeps a left operand in shared memory only
    # when it was loaded, and otherwise in registers, which the accumulators need.
    _layer_norm_rows(x_ptr, ln_weight_ptr, ln_bias_ptr, y_ptr, first, R, eps, c, HI, LO, BLOCK_R)
    xn = _load_rows(y_ptr, rows, R, c, HI, LO)
    tl.debug_barrier()

    sums = tl.tuple([])
    for part in tl.static_range(PARTS):
        columns, _ = _columns(part, c, HI, LO)
        sums = sums + (tl.zeros((BLOCK_R, columns.shape[0]), tl.float32),)
    for start in range(0, h, BLOCK_H):
        hs = start + tl.arange(0, BLOCK_H)
        in_h = (hs < h) | (h % BLOCK_H == 0)
        pre = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for part in tl.static_range(PARTS):
            columns, inside = _columns(part, c, HI, LO)
            fc1 = tl.load(fc1_ptr + hs * c + columns[:, None], in_h & inside[:, None], 0.0)
            pre = dot(xn[part], fc1, pre, "ieee")
        pre += tl.load(b1_ptr + hs, in_h, 0.0).to(tl.float32)
        hidden = gelu(pre).to(y_ptr.dtype.element_ty)
        added = tl.tuple([])
        for part in tl.static_range(PARTS):
            columns, inside = _columns(part, c, HI, LO)
            fc2 = tl.load(fc2_ptr + columns * h + hs[:, None], in_h[:, None] & inside, 0.0)
            added = added + (dot(hidden, fc2, sums[part], "ieee"),)
        sums = added

    # As before the loop, for who does not know that the second number is always 0: addresses are made anew, where the
    # compiler would otherwise keep them in registers, or out of them, all the way.
    first = (tl.program_id(0) + tl.program_id(1)) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    # The MLP's result too is stored and added to x a few rows at a time: beside the accumulators there is no room.
    _store_rows(y_ptr, sums, rows, R, c, HI, LO)
    tl.debug_barrier()
    bias = _load_vector(b2_ptr, c, HI, LO)
    for part in range(0, BLOCK_R, PART):
        some = first + part + tl.arange(0, PART)
        x = _load_rows(x_ptr, some, R, c, HI, LO)
        y = _load_rows(y_ptr, some, R, c, HI, LO)
        tl.debug_barrier()
        total = tl.tuple([])
        for i in tl.static_range(PARTS):
            total = total + (x[i] + (y[i] + bias[i]),)
        _store_rows(y_ptr, total, some, R, c, HI, LO)


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
    """(R, c) -> (R, c) in the dtype of fc1_weight (h, c) and fc2_weight (c, h)."""
    (R, c), h, dtype = x.shape, fc1_weight.shape[0], fc1_weight.dtype
    y = torch.empty_like(x, dtype=dtype)
    options = tiles.mlp(c, h, dtype, tiles.Chip.of(x.device))
    if options is None:
        for rows in _slices(R, h * x.element_size(), x.device):
            xn = layer_norm(x[rows], ln_weight, ln_bias, eps, dtype=dtype)
            hidden = torch.ops.aten.gelu_(torch.addmm(fc1_bias.to(dtype), xn, fc1_weight.t()))
            torch.addmm((x[rows] + fc2_bias).to(dtype), hidden, fc2_weight.t(), out=y[rows])
        return y
    HI, LO = tiles.split_width(c)
    tensors = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, y)
    sizes = {"c": c, "h": h, "HI": HI, "LO": LO}
    launch(_norm_mlp_residual, (triton.cdiv(R, options["BLOCK_R"]),), *tensors, R, eps, **sizes, **options)
    return y


def _slices(R: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Rows in slices of at most `scratch` bytes, whole tiles; at least one, empty where there are no rows."""
    size = max(128, scratch(device) // row_bytes // 128 * 128)
    for first in range(0, max(R, 1), size):
        yield slice(first, min(first + size, R))


def scratch(device: torch.device) -> int:
    """Bytes of hidden layer, and of its gradient, in memory at a time.

    A share of the GPU's memory, which is the same at every step and on all ranks; what is free is not. The backward of
    the stem is the last of a step, when what the rest has kept is free again.
    """
    return max(SCRATCH, tiles.Chip.of(device).memory // SHARE)


@triton.jit(do_not_specialize=["R"])
def _gelu_backward(
    pre_ptr,
    grad_ptr,
    hidden_ptr,
    dpre_ptr,
    sums_ptr,
    R,
    h: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # sums (row tiles, h): of each tile's rows.
    tiles_h: tl.constexpr = (h + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) // tiles_h
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    hs = tl.program_id(0) % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    at = rows.to(tl.int64)[:, None] * h + hs
    mask = (rows < R)[:, None] & (hs < h)
    pre = tl.load(pre_ptr + at, mask, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
    phi, density = normal(pre)
    dpre = grad * (phi + 0.3989422804014327 * pre * density)
    tl.store(hidden_ptr + at, pre * phi, mask)
    tl.store(dpre_ptr + at, dpre, mask)
    tl.store(sums_ptr + tile.to(tl.int64) * h + hs, tl.sum(dpre, 0), hs < h)


def gelu_backward(
    pre: Tensor, grad: Tensor, *, hidden: Tensor | None = None, dpre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in front of GELU and the gradient of its result, (R, h) -> hidden and dpre (R, h), db1 (h,) float32.

    hidden, dpre: where to write; ``pre`` and ``grad`` themselves will do."""
    R, h = pre.shape
    hidden = torch.empty_like(pre) if hidden is None else hidden
    dpre = torch.empty_like(grad) if dpre is None else dpre
    options = tiles.gelu_backward(h)
    tiles_r = triton.cdiv(R, options["BLOCK_R"])
    sums = pre.new_empty((tiles_r, h), dtype=torch.float32)
    grid = (tiles_r * triton.cdiv(h, options["BLOCK_H"]),)
    launch(_gelu_backward, grid, pre, grad, hidden, dpre, sums, R, h=h, **options)
    return hidden, dpre, sums.sum(0)


def mlp_hidden(
    xn: Tensor, grad: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x) and the gradient of the result, (R, c) -> hidden and dpre (R, h) in their dtype, db1 (h,) float32."""
    pre, dhidden = torch.addmm(fc1_bias.to(xn.dtype), xn, fc1_weight.t()), grad @ fc2_weight
    return gelu_backward(pre, dhidden, hidden=pre, dpre=dhidden)


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
    """Gradient of the result (R, c), and the inputs -> dx (R, c) in its dtype; in float32 and summed in a fixed order,
    dln_weight and dln_bias (c,), dfc1_weight (h, c), dfc1_bias (h,), dfc2_weight (c, h) and dfc2_bias (c,)."""
    h, dx = fc1_weight.shape[0], torch.empty_like(grad)
    total: list[Tensor] = []
    for rows in _slices(x.shape[0], 2 * h * grad.element_size(), x.device):
        xn = layer_norm(x[rows], ln_weight, ln_bias, eps, dtype=grad.dtype)
        hidden, dpre, db1 = mlp_hidden(xn, grad[rows], fc1_weight, fc1_bias, fc2_weight)
        dfc1, dfc2 = product(dpre.t(), xn), product(grad[rows].t(), hidden)
        dnorm = layer_norm_backward(dpre @ fc1_weight, x[rows], ln_weight, eps, grad[rows], out=dx[rows])[1]
        found = [*dnorm[:2], dfc1, db1, dfc2, dnorm[2]]
        total = list(torch._foreach_add(total, found)) if total else found
    return dx, *total


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model, with the tiles of ``architecture``."""
    norm = {"ln_weight_ptr": "*fp32", "ln_bias_ptr": "*fp32"}
    weights = {"fc1_ptr": f"*{dtype}", "b1_ptr": "*fp32", "fc2_ptr": f"*{dtype}", "b2_ptr": "*fp32"}
    x = {"x_ptr": f"*{'fp16' if dtype == 'bf16' else dtype}"}  # see `conv.middle_dtype`
    forward: dict[str, str] = x | norm | weights | {"y_ptr": f"*{dtype}", "R": "i32", "eps": "fp32"}
    backward = dict.fromkeys(("pre_ptr", "grad_ptr", "hidden_ptr", "dpre_ptr"), f"*{dtype}")
    backward |= {"sums_ptr": "*fp32", "R": "i32"}
    found, chip = [], tiles.Chip(architecture)
    for c in sorted({c for c, _ in tiles.STAGES}):
        h = 4 * c
        HI, LO = tiles.split_width(c)
        fused = tiles.mlp(c, h, DTYPES[dtype], chip)
        for name, kernel, signature, sizes, chosen in (
            (f"norm_mlp_residual c={c}", _norm_mlp_residual, forward, {"c": c, "h": h, "HI": HI, "LO": LO}, fused),
            (f"gelu_backward h={h}", _gelu_backward, backward, {"h": h}, tiles.gelu_backward(h)),
        ):
            if chosen is None:
                continue
            options = {option: chosen[option] for option in ("num_warps", "num_stages")}
            blocks: dict[str, Any] = {size: value for size, value in chosen.items() if size not in options}
            found.append(Ahead(name, kernel, signature, {**sizes, **blocks}, options))
    return found
