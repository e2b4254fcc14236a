"""The depthwise convolution of visible rows: fused with the linear layer behind it, alone, and its weight's gradient.

    DW(y)[row, ch] = sum over taps (u, v) of  y[halo[patch, i + u, j + v], ch] * weight[ch, u, v]

with (i, j) the place of the row in its p x p patch, and 0 where the halo says -1: masked, or beyond the border.

Rows are computed in groups of G horizontal neighbours of one patch: a tap row reads G + kk - 1 cells of the halo, each
once, where G separate rows would read G * kk. At p = 4 and kk = 5 that is 8 reads instead of 20.

Shapes: R = patches * S rows, S = p * p positions in a patch, c channels, kk x kk the kernel, G rows in a group,
R / G groups; the halo of a patch has side x side cells, side = p + kk - 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import DTYPES, Ahead, dot, launch
from . import tiles

SHARES = 128  # of the rows in `depthwise_backward_weight`; times tap rows and channel chunks: thousands of programs


@triton.jit
def _group_cells(group, G: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr):
    """First halo cell that a group reads, as an index into the table of all patches (int64)."""
    per_row: tl.constexpr = P // G
    patch, inside = group // (P * per_row), group % (P * per_row)
    return patch.to(tl.int64) * (SIDE * SIDE) + inside // per_row * SIDE + inside % per_row * G


@triton.jit
def _group_row(group, g, place_ptr, mask, G: tl.constexpr, P: tl.constexpr):
    """Row (int64) of the g-th member of a group; place_ptr: block place of every row-major position."""
    per_patch: tl.constexpr = P * P // G
    place = tl.load(place_ptr + group % per_patch * G + g, mask, 0)
    return (group // per_patch).to(tl.int64) * (P * P) + place


@triton.jit
def _read_cells(y_ptr, cell_ptr, mask, channels, c: tl.constexpr, COUNT: tl.constexpr):
    """Rows of y under COUNT neighbouring halo cells of every group, in float32: a tuple of (groups, channels)."""
    cells = tl.tuple([])
    for t in tl.static_range(COUNT):
        row = tl.load(cell_ptr + t, mask, -1)
        at = row.to(tl.int64)[:, None] * c + channels
        cell = tl.load(y_ptr + at, (row >= 0)[:, None] & (channels < c), 0.0)
        cells = cells + (cell.to(tl.float32),)
    return cells


@triton.jit
def _depthwise_groups(
    y_ptr,
    halo_ptr,
    taps_ptr,
    dw_bias_ptr,
    group,
    mask,
    channels,
    c: tl.constexpr,
    KK: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """DW(y) + bias: for every member of the groups (groups, channels) float32, a tuple of G. taps (kk * kk, c)."""
    bias = tl.zeros((channels.shape[0],), tl.float32)
    if HAS_BIAS:
        bias += tl.load(dw_bias_ptr + channels, channels < c, 0.0).to(tl.float32)
    start = tl.zeros((group.shape[0], channels.shape[0]), tl.float32) + bias
    sums = tl.tuple([])
    for _ in tl.static_range(G):
        sums = sums + (start,)
    SIDE: tl.constexpr = P + KK - 1
    cell_ptr = halo_ptr + _group_cells(group, G, P, SIDE)
    for u in range(KK):
        cells = _read_cells(y_ptr, cell_ptr + u * SIDE, mask, channels, c, G + KK - 1)
        for v in tl.static_range(KK):
            tap = u * KK + v
            if FLIP:
                tap = KK * KK - 1 - tap
            weight = tl.load(taps_ptr + tap * c + channels, channels < c, 0.0).to(tl.float32)
            added = tl.tuple([])
            for g in tl.static_range(G):
                added = added + (sums[g] + cells[g + v] * weight,)
            sums = added
    return sums


@triton.jit
def _stack_groups(sums, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, G: tl.constexpr):
    """G tiles of one row of every group -> one tile (BLOCK_R, BLOCK_C) of all rows, group after group."""
    if G == 1:
        return sums[0]
    elif G == 2:
        return tl.join(sums[0], sums[1]).permute(0, 2, 1).reshape(BLOCK_R, BLOCK_C)
    else:
        pairs = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))
        return pairs.permute(0, 3, 2, 1).reshape(BLOCK_R, BLOCK_C)


@triton.jit(do_not_specialize=["R"])
def _conv_linear_residual(
    x_ptr,
    y_ptr,
    halo_ptr,
    place_ptr,
    taps_ptr,
    dw_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    R,
    c: tl.constexpr,
    KK: tl.constexpr,
    P: tl.constexpr,
    SATURATE: tl.constexpr,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # DW(y) + dw_bias of the tile's rows, chunk of channels after chunk: the product's operand, already rounded.
    CHUNKS: tl.constexpr = (c + BLOCK_C - 1) // BLOCK_C
    groups: tl.constexpr = BLOCK_R // G
    group = tl.program_id(0) * groups + tl.arange(0, groups)
    chunk = tl.arange(0, BLOCK_C)
    operand = tl.tuple([])
    for k in tl.static_range(CHUNKS):
        sums = _depthwise_groups(
            y_ptr,
            halo_ptr,
            taps_ptr,
            dw_bias_ptr,
            group,
            group < R // G,
            k * BLOCK_C + chunk,
            c,
            KK,
            P,
            G,
            False,
            True,
        )
        tile = _stack_groups(sums, BLOCK_R, BLOCK_C, G).to(weight_ptr.dtype.element_ty)
        operand = operand + (tile,)

    member = tl.arange(0, BLOCK_R)
    group = tl.program_id(0) * groups + member // G
    inside = group < R // G
    row_at = _group_row(group, member % G, place_ptr, inside, G, P)[:, None] * c
    for n in range(0, c, BLOCK_N):
        outs = n + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (outs < c)
        acc = tl.load(x_ptr + row_at + outs, mask, 0.0).to(tl.float32)
        acc += tl.load(bias_ptr + outs, outs < c, 0.0).to(tl.float32)
        for k in tl.static_range(CHUNKS):
            ks = k * BLOCK_C + chunk
            weight = tl.load(weight_ptr + outs * c + ks[:, None], (outs < c) & (ks < c)[:, None], 0.0)
            acc = dot(operand[k], weight, acc, "ieee")
        if SATURATE:
            acc = tl.maximum(acc, -65504.0, propagate_nan=tl.PropagateNan.ALL)
            acc = tl.minimum(acc, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + row_at + outs, acc, mask)


def middle_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a block's middle, the rows between its two residuals, where they are alone in having it.

    float16 for bfloat16 rows: eight times as close at the same size, and saturating where it has no such number.
    """
    return torch.float16 if dtype == torch.bfloat16 else dtype


def conv_linear_residual(
    x: Tensor,
    y: Tensor,
    halo: Tensor,
    places: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """x + (DW(y) + dw_bias) @ weight.T + bias, DW(y) never in memory where the fused kernel has room for it.

    Args:
        x, y: (R, c) rows of visible patches, positions in block order.
        halo: (patches, side * side) int32, the row of y that each cell reads, -1 for zeros.
        places: (S,) int32, `layout.block_places` of a patch.
        dw_weight: (c, kk * kk). dw_bias: (c,). bias: (c,); any float dtype.
        weight: (c, c), out x in, in the rows' dtype.

    Returns:
        (R, c) in `middle_dtype` of the rows'.
    """
    R, c = x.shape
    p, kk = _sides(halo, places)
    options = tiles.conv_linear(c, p, x.dtype, tiles.Chip.of(x.device))
    dtype = middle_dtype(x.dtype)
    if options is None:
        found = torch.addmm(x + bias.to(x.dtype), depthwise(y, halo, places, dw_weight, dw_bias), weight.t())
        return found if dtype == x.dtype else found.float().clamp(-65504, 65504).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    grid = (triton.cdiv(R, options["BLOCK_R"]),)
    tensors = (x, y, halo, places, _taps(dw_weight), dw_bias, weight, bias, out)
    sizes = {"c": c, "KK": kk, "P": p, "SATURATE": dtype != x.dtype}
    launch(_conv_linear_residual, grid, *tensors, R, **sizes, **options)
    return out


@triton.jit(do_not_specialize=["R"])
def _depthwise(
    y_ptr,
    halo_ptr,
    place_ptr,
    taps_ptr,
    dw_bias_ptr,
    out_ptr,
    R,
    c: tl.constexpr,
    KK: tl.constexpr,
    P: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Chunks of the same rows are neighbours: they share the halo and whole lines of y.
    CHUNKS: tl.constexpr = (c + BLOCK_C - 1) // BLOCK_C
    groups: tl.constexpr = BLOCK_R // G
    group = tl.program_id(0) // CHUNKS * groups + tl.arange(0, groups)
    mask = group < R // G
    channels = tl.program_id(0) % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = _depthwise_groups(y_ptr, halo_ptr, taps_ptr, dw_bias_ptr, group, mask, channels, c, KK, P, G, FLIP, HAS_BIAS)
    for g in tl.static_range(G):
        at = _group_row(group, g, place_ptr, mask, G, P)[:, None] * c + channels
        tl.store(out_ptr + at, sums[g], mask[:, None] & (channels < c))


def depthwise(
    y: Tensor, halo: Tensor, places: Tensor, dw_weight: Tensor, dw_bias: Tensor | None, *, transpose: bool = False
) -> Tensor:
    """DW(y) + dw_bias -> (R, c); arguments as in `conv_linear_residual`.

    ``transpose``: the adjoint instead, from the gradient of DW(y) to the gradient of y. Being neighbours is mutual, so
    it is the same sum with the taps in reverse.
    """
    R, c = y.shape
    p, kk = _sides(halo, places)
    out = torch.empty_like(y)
    options = tiles.depthwise(c, p, y.dtype)
    grid = (triton.cdiv(R, options["BLOCK_R"]) * triton.cdiv(c, options["BLOCK_C"]),)
    taps = _taps(dw_weight)
    tensors = (y, halo, places, taps, taps if dw_bias is None else dw_bias, out)
    sizes = {"c": c, "KK": kk, "P": p, "FLIP": transpose, "HAS_BIAS": dw_bias is not None}
    launch(_depthwise, grid, *tensors, R, **sizes, **options)
    return out


@triton.jit(do_not_specialize=["R"])
def _depthwise_backward_weight(
    grad_ptr,
    y_ptr,
    halo_ptr,
    place_ptr,
    dtaps_ptr,
    dbias_ptr,
    R,
    c: tl.constexpr,
    KK: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A program owns one tap row, one chunk of channels and a share of the groups. Its kk sums stay apart for every
    # group of the tile until the end. Programs that differ in the tap row read the same gradients at the same time.
    CHUNKS: tl.constexpr = (c + BLOCK_C - 1) // BLOCK_C
    SIDE: tl.constexpr = P + KK - 1
    groups: tl.constexpr = BLOCK_R // G
    u = tl.program_id(0) % KK
    channels = tl.program_id(0) // KK % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    share = tl.program_id(0) // (KK * CHUNKS)
    shares = tl.num_programs(0) // (KK * CHUNKS)

    zeros = tl.zeros((groups, BLOCK_C), tl.float32)
    total = zeros
    sums = tl.tuple([])
    for _ in tl.static_range(KK):
        sums = sums + (zeros,)
    for first in range(share * groups, R // G, shares * groups):
        group = first + tl.arange(0, groups)
        mask = group < R // G
        cell_ptr = halo_ptr + _group_cells(group, G, P, SIDE) + u * SIDE
        cells = _read_cells(y_ptr, cell_ptr, mask, channels, c, G + KK - 1)
        for g in tl.static_range(G):
            at = _group_row(group, g, place_ptr, mask, G, P)[:, None] * c + channels
            grad = tl.load(grad_ptr + at, mask[:, None] & (channels < c), 0.0).to(tl.float32)
            if u == 0:
                total += grad
            added = tl.tuple([])
            for v in tl.static_range(KK):
                added = added + (sums[v] + cells[g + v] * grad,)
            sums = added
    for v in tl.static_range(KK):
        out = (share * KK * KK + u * KK + v) * c + channels
        tl.store(dtaps_ptr + out, tl.sum(sums[v], 0), channels < c)
    if u == 0:
        tl.store(dbias_ptr + share * c + channels, tl.sum(total, 0), channels < c)


def depthwise_backward_weight(
    grad: Tensor, y: Tensor, halo: Tensor, places: Tensor, kernel_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (c, kk * kk) and of the bias (c,), float32, summed in a fixed order.

    ``grad`` (R, c) is the gradient of DW(y); the other arguments as in `conv_linear_residual`.
    """
    R, c = y.shape
    p, kk = _sides(halo, places, kernel_size)
    options = tiles.depthwise_weight(c, p, y.dtype)
    shares = min(SHARES, triton.cdiv(R, options["BLOCK_R"]))
    dtaps = y.new_empty((shares, kk * kk, c), dtype=torch.float32)
    dbias = y.new_empty((shares, c), dtype=torch.float32)
    grid = (shares * kk * triton.cdiv(c, options["BLOCK_C"]),)
    tensors = (grad, y, halo, places, dtaps, dbias)
    launch(_depthwise_backward_weight, grid, *tensors, R, c=c, KK=kk, P=p, **options)
    return dtaps.sum(0).t().contiguous(), dbias.sum(0)


def _sides(halo: Tensor, places: Tensor, kernel_size: int | None = None) -> tuple[int, int]:
    """p and the kernel size, from the sizes of a patch and of its halo."""
    p, side = math.isqrt(places.numel()), math.isqrt(halo.shape[1])
    kk = side - p + 1
    if p * p != places.numel() or side * side != halo.shape[1] or kernel_size not in (None, kk):
        raise ValueError(
            f"halo {tuple(halo.shape)} and places {tuple(places.shape)} must be (patches, (p + kk - 1)^2) and (p^2,)"
            + (f" with kk = {kernel_size}" if kernel_size is not None else "")
        )
    return p, kk


def _taps(dw_weight: Tensor) -> Tensor:
    """(c, kk * kk) -> (kk * kk, c): the channels of a tap adjacent, as the kernels read them. A view where they are."""
    return dw_weight.t().contiguous()


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model."""
    ends = {"halo_ptr": "*i32", "place_ptr": "*i32", "taps_ptr": "*fp32", "dw_bias_ptr": "*fp32"}
    weights = {"weight_ptr": f"*{dtype}", "bias_ptr": "*fp32"}
    out = {"out_ptr": f"*{dtype}", "R": "i32"}
    plain = {"y_ptr": f"*{dtype}", **ends, **out}
    fused = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", **ends, **weights, **out}
    backward = {"grad_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "halo_ptr": "*i32", "place_ptr": "*i32"}
    backward |= {"dtaps_ptr": "*fp32", "dbias_ptr": "*fp32", "R": "i32"}

    middle = {"out_ptr": "*fp16" if dtype == "bf16" else f"*{dtype}"}
    found, chip = [], tiles.Chip(architecture)
    for c, p in tiles.STAGES:
        sizes = {"c": c, "KK": 5, "P": p}
        plain_tiles, sums = tiles.depthwise(c, p, DTYPES[dtype]), tiles.depthwise_weight(c, p, DTYPES[dtype])
        for name, kernel, signature, more, chosen in (
            (
                "conv_linear_residual",
                _conv_linear_residual,
                fused | middle,
                {"SATURATE": dtype == "bf16"},
                tiles.conv_linear(c, p, DTYPES[dtype], chip),
            ),
            ("depthwise", _depthwise, plain, {"FLIP": False, "HAS_BIAS": True}, plain_tiles),
            ("depthwise transposed", _depthwise, plain, {"FLIP": True, "HAS_BIAS": False}, plain_tiles),
            ("depthwise_backward_weight", _depthwise_backward_weight, backward, {}, sums),
        ):
            if chosen is None:
                continue
            options = {option: chosen[option] for option in ("num_warps", "num_stages")}
            blocks = {size: value for size, value in chosen.items() if size not in options}
            found.append(Ahead(f"{name} c={c} p={p}", kernel, signature, {**sizes, **more, **blocks}, options))
    return found
