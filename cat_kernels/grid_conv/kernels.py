"""`grouped_conv2d` in Triton: an implicit matrix product for groups that are too narrow for the library's kernels.

A tile of rows is one line h of many images: BLOCK_R places (n, w). A program walks down its lines. Of each it reads
the kk shifts along w once, and adds their products with all kk * kk taps to the kk output lines that they touch: an
input is read kk times, not kk * kk. The group's weights are read once a program and stay in shared memory.

The gradient of the input is the same sum with the taps in reverse and the channels exchanged. That of the weight is a
product over the rows; shares of them are added afterwards in a fixed order.

Shapes: N images of H lines of W places, G groups of I channels in and O out, kk x kk the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import DTYPES, Ahead, Chip, dot, launch, padded

Tiles = dict[str, int]

WIDEST = 64  # channels of a group, in or out
ROOM = 9 * 64 * 64  # taps of a group, channels padded: in 2 bytes in shared memory, or as sums in registers
PROGRAMS = 512  # fewer, and the lines are shared out: two for each multiprocessor of an H200, twice


def _fits(I: int, O: int, KK: int, dtype: torch.dtype, chip: Chip) -> bool:
    """float32 products are not for the matrix units, and wide groups fill the library's tiles. On datacenter Blackwell
    Triton gives the sums of each product a place of their own in tensor memory, which has not as many for 5 x 5."""
    fits = max(I, O) <= WIDEST and KK * KK * padded(I) * padded(O) <= ROOM
    return fits and dtype != torch.float32 and (KK <= 3 or not chip.tensor_memory)


def conv_tiles(I: int, O: int, KK: int, dtype: torch.dtype, chip: Chip) -> Tiles | None:
    """None where the kernel does not fit, or is no gain. Groups of 48 channels are read as 32 and 16, not as 64.

    On Hopper operands of products stay in shared memory, and kk tiles of 64 x 64 sums in registers; elsewhere operands
    go through registers too."""
    if not _fits(I, O, KK, dtype, chip):
        return None
    HI = padded(I) if I <= 16 or padded(I) == I else padded(I) // 2
    columns = min(padded(O), 64 if chip.hopper else 32)
    return {
        "HI": HI,
        "LO": padded(max(I - HI, 1)),
        "BLOCK_R": 64,
        "BLOCK_O": columns,
        "num_warps": 4,
        "num_stages": 2,
    }


def weight_tiles(I: int, O: int, KK: int, dtype: torch.dtype, chip: Chip) -> Tiles | None:
    """None as above. On Hopper a program has the sums of all 3 x 3 taps, in the registers of 8 warps; elsewhere those
    of one row of taps: U rows."""
    if not _fits(I, O, KK, dtype, chip):
        return None
    blocks = {"BLOCK_I": padded(I), "BLOCK_O": padded(O)}
    if chip.hopper and KK <= 3:
        return {"U": KK, "BLOCK_R": 64, **blocks, "num_warps": 8, "num_stages": 3}
    return {"U": 1, "BLOCK_R": 64 if chip.tensor_memory else 32, **blocks, "num_warps": 4, "num_stages": 2}


@triton.jit
def _read(x_ptr, row, mask, channels, end, C: tl.constexpr):
    """(rows, channels) of x (R, C), 0 where there is nothing."""
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * C + channels, mask[:, None] & (channels < end), 0.0)


@triton.jit(do_not_specialize=["N", "H", "W", "LINES"])
def _conv(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    H,
    W,
    LINES,
    G: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    KK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # weight (G, kk, kk, I, O). Groups of the same rows are neighbours: together they read whole lines of memory.
    TILES: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    g = tl.program_id(0) // TILES % G
    rows = tl.program_id(0) // (TILES * G) * BLOCK_R + tl.arange(0, BLOCK_R)
    n, w = rows // W, rows % W
    inside = n < N
    first = tl.program_id(1) * LINES
    end = tl.minimum(first + LINES, H)
    hi, lo = tl.arange(0, HI), HI + tl.arange(0, LO)
    outs = tl.program_id(0) % TILES * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_ptr += g * (KK * KK * I * O)
    weights_hi = tl.tuple([])
    weights_lo = tl.tuple([])
    for tap in tl.static_range(KK * KK):
        at_ptr = weight_ptr + tap * (I * O) + outs
        weights_hi = weights_hi + (tl.load(at_ptr + hi[:, None] * O, (outs < O) & (hi < I)[:, None], 0.0),)
        if HI < I:
            weights_lo = weights_lo + (tl.load(at_ptr + lo[:, None] * O, (outs < O) & (lo < I)[:, None], 0.0),)
    bias = tl.zeros((BLOCK_O,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + g * O + outs, outs < O, 0.0).to(tl.float32)
    start = tl.zeros((BLOCK_R, BLOCK_O), tl.float32) + bias
    sums = tl.tuple([])  # of the lines h - kk // 2 .. h + kk // 2
    for _ in tl.static_range(KK):
        sums = sums + (start,)
    for h in range(first - KK // 2, end + KK // 2):
        row = (n * H + h) * W + w
        for v in tl.static_range(KK):
            shift = v - KK // 2
            mask = inside & (h >= 0) & (h < H) & (w + shift >= 0) & (w + shift < W)
            x_hi = _read(x_ptr, row + shift, mask, g * I + hi, g * I + I, G * I)
            added = tl.tuple([])
            for j in tl.static_range(KK):
                added = added + (dot(x_hi, weights_hi[(KK - 1 - j) * KK + v], sums[j], "ieee"),)
            sums = added
            if HI < I:
                x_lo = _read(x_ptr, row + shift, mask, g * I + lo, g * I + I, G * I)
                added = tl.tuple([])
                for j in tl.static_range(KK):
                    added = added + (dot(x_lo, weights_lo[(KK - 1 - j) * KK + v], sums[j], "ieee"),)
                sums = added
        done = h - KK // 2
        at = ((n * H + done) * W + w).to(tl.int64)[:, None] * (G * O) + (g * O + outs)
        tl.store(out_ptr + at, sums[0], (inside & (done >= first) & (done < end))[:, None] & (outs < O))
        moved = tl.tuple([])
        for j in tl.static_range(KK - 1):
            moved = moved + (sums[j + 1],)
        sums = moved + (start,)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, tiles: Tiles) -> Tensor:
    """(N, H, W, G * I) -> (N, H, W, G * O) in x's dtype; weight (G * O, I, kk, kk), bias (G * O,) of any dtype."""
    taps = weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1)
    return _convolved(x, taps, bias, tiles)


def conv_backward(grad: Tensor, weight: Tensor, groups: int, tiles: Tiles) -> Tensor:
    """The gradient of the input, in grad's dtype; ``tiles``: of O channels in and I out."""
    taps = weight.flip(2, 3).unflatten(0, (groups, -1)).permute(0, 3, 4, 1, 2)
    return _convolved(grad, taps, None, tiles)


def _convolved(x: Tensor, taps: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """taps: (G, kk, kk, I, O), any strides."""
    (N, H, W, _), (G, KK, _, I, O) = x.shape, taps.shape
    x, taps = x.contiguous(), taps.to(x.dtype).contiguous()
    out = x.new_empty(N, H, W, G * O)
    programs = triton.cdiv(N * W, tiles["BLOCK_R"]) * G * triton.cdiv(O, tiles["BLOCK_O"])
    lines = max(min(H, 8), triton.cdiv(H, triton.cdiv(PROGRAMS, max(programs, 1))))
    grid = (programs, triton.cdiv(H, max(lines, 1)))
    tensors = (x, taps, taps if bias is None else bias.contiguous(), out)
    launch(_conv, grid, *tensors, N, H, W, lines, G=G, I=I, O=O, KK=KK, HAS_BIAS=bias is not None, **tiles)
    return out


@triton.jit(do_not_specialize=["N", "H", "W"])
def _backward_weight(
    x_ptr,
    grad_ptr,
    dweight_ptr,
    dbias_ptr,
    N,
    H,
    W,
    G: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    KK: tl.constexpr,
    U: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # dweight (shares, G, kk, kk, I, O), dbias (shares, G, O). An input line, shifted along w, meets the lines of
    # gradients that it was added to: all kk of them, or the one of this program's row of taps.
    g = tl.program_id(0) % G
    first = tl.program_id(0) // G % (KK // U) * U
    share = tl.program_id(0) // (G * (KK // U))
    shares = tl.num_programs(0) // (G * (KK // U))
    ins, outs = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    zeros = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    sums = tl.tuple([])
    for _ in tl.static_range(KK * U):
        sums = sums + (zeros,)
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for step in range(share, tl.cdiv(N * W, BLOCK_R) * H, shares):
        h = step % H
        rows = step // H * BLOCK_R + tl.arange(0, BLOCK_R)
        n, w = rows // W, rows % W
        grads = tl.tuple([])
        for j in tl.static_range(U):
            line = h + KK // 2 - (first + j)
            mask = (n < N) & (line >= 0) & (line < H)
            grads = grads + (_read(grad_ptr, (n * H + line) * W + w, mask, g * O + outs, g * O + O, G * O),)
        if HAS_BIAS:
            total += grads[U // 2].to(tl.float32)
        added = tl.tuple([])
        for v in tl.static_range(KK):
            shifted = w + v - KK // 2
            inside = (n < N) & (shifted >= 0) & (shifted < W)
            x = tl.trans(_read(x_ptr, (n * H + h) * W + shifted, inside, g * I + ins, g * I + I, G * I))
            for j in tl.static_range(U):
                added = added + (dot(x, grads[j], sums[v * U + j], "ieee"),)
        sums = added
    dweight_ptr += (share * G + g).to(tl.int64) * (KK * KK * I * O)
    for j in tl.static_range(U):
        for v in tl.static_range(KK):
            at = ((first + j) * KK + v) * (I * O) + ins[:, None] * O + outs
            tl.store(dweight_ptr + at, sums[v * U + j], (ins < I)[:, None] & (outs < O))
    if HAS_BIAS and first + U // 2 == KK // 2:  # whose gradients were the line itself, once
        tl.store(dbias_ptr + (share * G + g) * O + outs, tl.sum(total, 0), outs < O)


def backward_weight(
    grad: Tensor, x: Tensor, groups: int, KK: int, tiles: Tiles, *, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight (G * O, I, kk, kk) and of the bias (G * O,), float32, summed in a fixed order."""
    N, H, W, C = x.shape
    G, I, O = groups, C // groups, grad.shape[3] // groups
    programs = G * (KK // tiles["U"])
    # One program fills a Hopper's multiprocessor; elsewhere it has room for two.
    room = Chip.of(x.device).multiprocessors * (1 if tiles["U"] == KK else 2)
    shares = max(1, min(room // programs, triton.cdiv(N * W, tiles["BLOCK_R"]) * H))
    dweight = x.new_empty((shares, G, KK, KK, I, O), dtype=torch.float32)
    dbias = x.new_empty((shares, G * O if with_bias else 0), dtype=torch.float32)
    tensors = (x.contiguous(), grad.contiguous(), dweight, dbias)
    launch(_backward_weight, (programs * shares,), *tensors, N, H, W, G=G, I=I, O=O, KK=KK, HAS_BIAS=with_bias, **tiles)
    summed = dweight.sum(0).permute(0, 4, 3, 1, 2).flatten(0, 1)
    return summed.contiguous(), dbias.sum(0) if with_bias else None


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model's decoder, with the tiles of ``architecture``."""
    G, I, KK, chip = 16, 48, 3, Chip(architecture)
    sizes: dict[str, Any] = {"G": G, "I": I, "O": I, "KK": KK}
    ends = dict.fromkeys(("N", "H", "W"), "i32")
    forward = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "bias_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    transposed = {**forward, "bias_ptr": f"*{dtype}"}
    sums = {"x_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
    found = []
    for name, kernel, signature, with_bias, chosen in (
        ("conv", _conv, forward | ends | {"LINES": "i32"}, True, conv_tiles(I, I, KK, DTYPES[dtype], chip)),
        ("conv transposed", _conv, transposed | ends | {"LINES": "i32"}, False,
         conv_tiles(I, I, KK, DTYPES[dtype], chip)),
        ("backward_weight", _backward_weight, sums | ends, True, weight_tiles(I, I, KK, DTYPES[dtype], chip)),
    ):  # fmt: skip
        if chosen is None:
            continue
        options = {option: chosen[option] for option in ("num_warps", "num_stages")}
        blocks = {size: value for size, value in chosen.items() if size not in options}
        found.append(Ahead(name, kernel, signature, {**sizes, "HAS_BIAS": with_bias, **blocks}, options))
    return found
