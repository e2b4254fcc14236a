"""Tiles of the stem's kernels: the one place that chooses them, by rule from width, dtype and chip.

Nothing is tried out at run time, so all ranks of a job choose alike, and neither a new batch nor a new T compiles
anything. A rule returns the constexpr sizes of a kernel (BLOCK_...) and the compiler's options (num_warps, num_stages);
None where the fused kernel does not fit, or is no gain: float32 products, which are not for the matrix units, are
PyTorch's everywhere but in the first embedding.

The rules rest on the compiler's table of registers and shared memory (README.md) and, for widths 256 and 384 in
bfloat16, on what an H100 takes for these tiles and for others.
"""

from __future__ import annotations

import math

import torch

from ..._triton import Chip, padded

Tiles = dict[str, int]


def layer_norm(c: int) -> Tiles:
    """About 4096 elements: 32 for each thread of 4 warps."""
    return {"BLOCK_R": max(1, 4096 // padded(c)), "num_warps": 4, "num_stages": 2}


def layer_norm_backward(c: int) -> Tiles:
    """Small programs, 16 elements for each thread: three accumulators as large as the tile stay in registers, and many
    programs are on a multiprocessor. (c = 256 and 384 on an H100: 1.45 and 1.55 times as fast as twice the warps.)"""
    return {"BLOCK_R": max(1, 1024 // padded(c)), "num_warps": 2, "num_stages": 2}


def norm_linear(c: int, n: int, dtype: torch.dtype) -> Tiles | None:
    """All of a row's columns in one tile up to 256, so that its norm is computed once; few rows, so that a
    multiprocessor holds two programs, and one's norm is computed beside the other's product. (On an H100 0.73 and 0.82
    of the time of 128 x 128, for c = 256 and 384.)"""
    if dtype == torch.float32:
        return None
    sizes = {"BLOCK_R": 64, "BLOCK_N": min(256, padded(n)), "BLOCK_K": min(64, padded(c))}
    return {**sizes, "num_warps": 8, "num_stages": 2}


def halo_rows(cells: int) -> Tiles:
    """2048 cells: 16 for each thread of 4 warps."""
    columns = min(256, padded(cells))
    return {"BLOCK_R": 2048 // columns, "BLOCK_C": columns, "num_warps": 4, "num_stages": 1}


def depthwise(c: int, p: int, dtype: torch.dtype) -> Tiles:
    """A thread gets half of one load's worth of channels of a group of G rows, 4 in half precision. (On an H100 0.83
    and 0.88 of the time of twice the groups.)"""
    return depthwise_weight(c, p, dtype) | {"BLOCK_R": 8 * math.gcd(p, 4)}


def depthwise_weight(c: int, p: int, dtype: torch.dtype) -> Tiles:
    """A thread gets one group of G rows and one load's worth of channels, 8 in half precision."""
    G = math.gcd(p, 4)
    chunk = 32 if dtype == torch.float32 else 64
    return {"G": G, "BLOCK_R": 16 * G, "BLOCK_C": min(chunk, padded(c)), "num_warps": 4, "num_stages": 1}


def conv_linear(c: int, p: int, dtype: torch.dtype, chip: Chip) -> Tiles | None:
    """DW(y) of the tile's rows, all channels, stays in shared memory beside the tiles of the weight that stream past
    it: about 100 KB at c = 256, so that a multiprocessor of an H200 holds two programs.

    Chunks of channels are unrolled; in wide kernels they are two loads wide (6 chunks made ptxas spill at c = 384 for
    sm_100). On Hopper, whose product of 64 x 16 waits for its operands, four programs of 4 warps each at c = 384.
    """
    if dtype == torch.float32 or c > 1024:
        return None
    G = math.gcd(p, 4)
    if chip.hopper and 256 < c <= 384:
        return {"G": G, "BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1}
    rows = 128 if c <= 256 else 64 if c <= 384 else 32
    return {
        "G": G,
        "BLOCK_R": rows,
        "BLOCK_N": min(32 if c <= 512 else 16, padded(c)),
        "BLOCK_C": min(64 if c <= 256 else 128, padded(c)),
        "num_warps": 8 if rows // G >= 32 else 4,
        "num_stages": 2,
    }


def split_width(c: int) -> tuple[int, int]:
    """c -> HI, LO: the largest power of two in c, and the tile that holds the rest, at least 16; 0 where nothing is
    left."""
    HI = 1 << (c.bit_length() - 1)
    return HI, padded(c - HI) if c > HI else 0


def mlp(c: int, h: int, dtype: torch.dtype, chip: Chip) -> Tiles | None:
    """A tile of rows stays in shared memory while the weights pass by, accumulators as wide as c stay in registers.
    There is no room for them above c = 384.

    128 rows where the accumulators fit: all weights pass by every tile, and with 64 rows the L2 cache, not the matrix
    units, would say how long that takes. Hopper's product of 64 x 32 waits for its operands in shared memory; 64 hidden
    columns at a time, where there is room.
    """
    width = sum(split_width(c))
    if dtype == torch.float32 or width > 384 or (width > 256 and chip.shared_kib < 128):
        return None
    if chip.hopper and width > 256:  # measured: half the rows and warps and one stage more, 0.93 to 0.96 of the time
        return {"BLOCK_R": 64, "BLOCK_H": min(32, padded(h)), "num_warps": 4, "num_stages": 3}
    rows = 64 if chip.architecture < 90 or chip.shared_kib < 128 else 128
    hidden = 64 if chip.hopper else 32
    return {"BLOCK_R": rows, "BLOCK_H": min(hidden, padded(h)), "num_warps": 8, "num_stages": 2}


def gelu_backward(h: int) -> Tiles:
    """4096 elements: 32 for each thread of 4 warps. (Twice as many take an H100 a fifth longer.)"""
    return {"BLOCK_R": 64, "BLOCK_H": min(64, padded(h)), "num_warps": 4, "num_stages": 1}


WHOLE = 512  # columns of a row that one tile of `pixels` holds


def pixels(c: int, inner: int, dtype: torch.dtype) -> dict[str, Tiles]:
    """Of the four kernels: BLOCK_R rows, BLOCK_C channels, BLOCK_K inner indices at a time, and BLOCK_J of them in a
    tile of a gradient.

    Rows of up to 512 channels are held whole: 32 numbers a thread in the forward, 64 in the gradient of the weight.
    Float32 products are not for matrix units, and take operands into registers: smaller tiles.
    """
    half = dtype != torch.float32
    columns, depth = padded(c), padded(inner)
    if columns <= WHOLE:
        embed = {"BLOCK_R": _between(16, 8192 // columns, 128), "BLOCK_C": columns}
        statistics = {"BLOCK_R": _between(16, 8192 // columns, 128), "BLOCK_C": columns}
    else:
        embed = {"BLOCK_R": 64 if half else 32, "BLOCK_C": 128, "BLOCK_K": min(32 if half else 16, depth)}
        statistics = {"BLOCK_R": 64 if half else 32, "BLOCK_C": 128}
    if columns <= WHOLE and columns * depth <= (8192 if half else 4096):
        rows = _between(16, (16384 if half else 4096) // columns, 64)  # of 64 rows, c = 256: 0.42 of the time of 16
        weight = {"BLOCK_R": rows, "BLOCK_C": columns, "BLOCK_J": depth}
    else:
        weight = {
            "BLOCK_R": 64 if half else 32,
            "BLOCK_C": min(64, columns),
            "BLOCK_J": min(128 if half else 64, depth),
        }
    gradient = {
        "BLOCK_R": 128 if half else 32,
        "BLOCK_C": min(64, columns),
        "BLOCK_J": min(128 if half else 64, depth),
    }
    common = {"BLOCK_K": min(64 if half else 16, depth), "num_warps": 8, "num_stages": 2}
    kernels = {"embed": embed, "statistics": statistics, "weight": weight, "pixels": gradient}
    return {name: {**common, **sizes} for name, sizes in kernels.items()}


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


# What is compiled ahead: (channels, positions a side) of every conv stage of the resolution sets of the paper, and
# (r_0, P, channels) of their first embeddings.
STAGES = ((256, 4), (384, 2), (256, 8), (384, 4), (768, 2))
FIRST = ((4, 16, 256), (4, 16, 384), (16, 16, 768), (2, 16, 256), (8, 16, 384))
