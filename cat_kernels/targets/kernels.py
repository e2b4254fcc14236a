"""`average_targets` in Triton: instance norms into a running sum, in one pass where a clip's patches fit on the chip.

Shapes: B clips, L patches, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._triton import Ahead, launch, padded

HELD = 512  # patches that one program holds, 16 channels of them: 10 s of audio at 16-pixel patches


def in_one_pass(layers: Sequence[Tensor], final: bool) -> bool:
    """Whether a program reads all patches of some channels once, normalises and adds them.

    Not where they do not fit. Nor before the final norm where the blocks are few bytes: it needs whole rows, so the sum
    would be written and read (8 bytes an element); going row by row at once reads the blocks a second time instead.
    """
    fits = bool(layers) and layers[0].shape[1] <= HELD
    return fits and not (final and sum(layer.element_size() for layer in layers) <= 8)


@triton.jit
def _pick(pointers, i, COUNT: tl.constexpr):
    """pointers[i], of a tuple. A loop unrolled over the tuple would ask for all blocks at once, and spill."""
    picked = pointers[0]
    for j in tl.static_range(1, COUNT):
        picked = tl.where(i == j, pointers[j], picked)
    return picked


# --- some channels of a clip ------------------------------------------------------------------------------------------


def config_add() -> dict[str, int]:
    """32 elements a thread, two more blocks' tiles on their way. With twice as many channels one program fits on a
    multiprocessor, and nothing is under way while it normalises the only block of a call."""
    return {"BLOCK_L": HELD, "BLOCK_D": 16, "STAGES": 3, "num_warps": 8}


@triton.jit(do_not_specialize=["L", "eps"])
def _add(
    out_ptr,
    partial_ptr,
    layers,
    L,
    eps,
    partial_b,
    partial_l,
    partial_d,
    x_b,
    x_l,
    x_d,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    l = tl.arange(0, BLOCK_L).to(tl.int64)
    d = (tl.program_id(0) % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = (l < L)[:, None] & (d < D)
    if HAS_PARTIAL:
        at = (b * partial_b + l * partial_l)[:, None] + d * partial_d
        total = tl.load(partial_ptr + at, inside, 0.0)
    else:
        total = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    x_at = (b * x_b + l * x_l)[:, None] + d * x_d
    for i in tl.range(0, COUNT, num_stages=STAGES):
        x = tl.load(_pick(layers, i, COUNT) + x_at, inside, 0.0).to(tl.float32)
        centred = tl.where(inside, x - tl.sum(x, 0) / L, 0.0)
        total += centred * tl.rsqrt(tl.sum(centred * centred, 0) / L + eps)
    tl.store(out_ptr + ((b * L + l) * D)[:, None] + d, total, inside)


# --- statistics, then rows --------------------------------------------------------------------------------------------


def config_statistics(D: int) -> dict[str, int]:
    """A tile of 1024 elements, three more on their way."""
    BLOCK_D = min(64, padded(D))
    return {"BLOCK_L": 1024 // BLOCK_D, "BLOCK_D": BLOCK_D, "STAGES": 4, "num_warps": 4}


@triton.jit(do_not_specialize=["L", "eps"])
def _statistics(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    L,
    eps,
    x_b,
    x_l,
    x_d,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each place of the tile keeps a mean and a sum of squared deviations (Welford), merged at the end. Means are taken
    from a channel's mean over the first tile, so that they are as exact as deviations where a channel is far from zero.
    """
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    d = (tl.program_id(0) % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    l = tl.arange(0, BLOCK_L).to(tl.int64)
    start = tl.load(x_ptr + (b * x_b + l * x_l)[:, None] + d * x_d, (l < L)[:, None] & (d < D), 0.0).to(tl.float32)
    start = tl.sum(start, 0) / tl.minimum(L, BLOCK_L)
    mean = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for tile in tl.range(0, tl.cdiv(L, BLOCK_L), num_stages=STAGES):
        l = tile * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)
        inside = (l < L)[:, None] & (d < D)
        x = tl.load(x_ptr + (b * x_b + l * x_l)[:, None] + d * x_d, inside, 0.0).to(tl.float32)
        x = tl.where(inside, x - start, 0.0)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1 / (tile + 1))
        squares += delta * (x - mean)
    count = tl.cdiv(tl.maximum(L - tl.arange(0, BLOCK_L), 0), BLOCK_L).to(tl.float32)[:, None]
    total = tl.sum(mean * count, 0) / L
    apart = mean - total
    variance = tl.sum(squares + count * apart * apart, 0) / L
    tl.store(mean_ptr + b * D + d, start + total, d < D)
    tl.store(rstd_ptr + b * D + d, tl.rsqrt(variance + eps), d < D)


def config_rows(D: int) -> dict[str, int]:
    """Rows of a tile, so that a tile has about 4096 elements: 32 for each thread of 4 warps."""
    return {"BLOCK_L": max(1, 4096 // padded(D)), "num_warps": 4}


@triton.jit(do_not_specialize=["L", "eps", "num_layers"])
def _rows(
    out_ptr,
    partial_ptr,
    layers,
    statistics_ptr,
    L,
    eps,
    num_layers,
    partial_b,
    partial_l,
    partial_d,
    x_b,
    x_l,
    x_d,
    D: tl.constexpr,
    P: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    tiles = tl.cdiv(L, BLOCK_L)
    clips = tl.num_programs(0) // tiles
    # From the end, where the kernel before has just been: some of that is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    l = program % tiles * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)
    d = tl.arange(0, P).to(tl.int64)
    inside = (l < L)[:, None] & (d < D)
    if HAS_PARTIAL:
        at = (b * partial_b + l * partial_l)[:, None] + d * partial_d
        total = tl.load(partial_ptr + at, inside, 0.0)
    else:
        total = tl.zeros((BLOCK_L, P), tl.float32)
    x_at = (b * x_b + l * x_l)[:, None] + d * x_d
    for i in range(COUNT):
        x = tl.load(_pick(layers, i, COUNT) + x_at, inside, 0.0).to(tl.float32)
        mean_ptr = statistics_ptr + (2 * i * clips + b) * D
        mean = tl.load(mean_ptr + d, d < D, 0.0)
        rstd = tl.load(mean_ptr + clips * D + d, d < D, 0.0)
        total += (x - mean) * rstd
    if FINAL:
        total = total / num_layers
        centred = tl.where(d < D, total - (tl.sum(total, 1) / D)[:, None], 0.0)
        total = centred * tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
    tl.store(out_ptr + ((b * L + l) * D)[:, None] + d, total, inside)


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float, out: Tensor) -> None:
    """Running sum or targets into `out`, (B, L, D) float32 and contiguous. layers and partial: any strides."""
    # Blocks of one dtype and the same strides share a pass, as all of a teacher's do.
    groups = [tuple(found) for _, found in itertools.groupby(layers, key=lambda t: (t.dtype, t.stride()))] or [()]
    for group in groups:
        _forward(group, partial, num_layers if group is groups[-1] else None, eps, out)
        partial = out


def _forward(
    layers: tuple[Tensor, ...], partial: Tensor | None, num_layers: int | None, eps: float, out: Tensor
) -> None:
    """One group; partial may be out: a program writes what it has read."""
    B, L, D = out.shape
    held = in_one_pass(layers, num_layers is not None)
    base = out if partial is None else partial
    read = layers or (out,)
    strides = (*base.stride(), *read[0].stride())
    sizes: dict[str, Any] = {"D": D, "COUNT": len(layers), "HAS_PARTIAL": partial is not None}
    if held:
        options = config_add()
        grid = (B * triton.cdiv(D, options["BLOCK_D"]),)
        launch(_add, grid, out, base, read, L, eps, *strides, **sizes, **options)
        if num_layers is not None:
            _forward((), out, num_layers, eps, out)
        return
    statistics = out.new_empty((len(layers), 2, B, D))
    options = config_statistics(D)
    grid = (B * triton.cdiv(D, options["BLOCK_D"]),)
    for layer, (mean, rstd) in zip(layers, statistics, strict=True):
        launch(_statistics, grid, layer, mean, rstd, L, eps, *layer.stride(), D=D, **options)
    options = config_rows(D)
    grid = (B * triton.cdiv(L, options["BLOCK_L"]),)
    final = {"P": padded(D), "FINAL": num_layers is not None}
    count = float(num_layers or 1)
    launch(_rows, grid, out, base, read, statistics, L, eps, count, *strides, **sizes, **final, **options)


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model: one block onto the sum, the last one, and eleven at once."""
    L, D = 512, 768
    strides = {"x_b": (1 + L) * D, "x_l": D, "x_d": 1}
    onto = {"partial_b": L * D, "partial_l": D, "partial_d": 1, "HAS_PARTIAL": True}
    fresh = {**onto, "HAS_PARTIAL": False}
    ends = {"L": "i32", "eps": "fp32"}
    tensors: dict[str, Any] = {"out_ptr": "*fp32", "partial_ptr": "*fp32", "statistics_ptr": "*fp32", **ends}
    found = []
    for count, sizes in ((1, onto), (11, fresh)):
        add = config_add()
        options = {"num_warps": add.pop("num_warps")}
        signature = {**tensors, "layers": (f"*{dtype}",) * count}
        constexprs = {**add, **strides, **sizes, "D": D, "COUNT": count}
        found.append(Ahead(f"add blocks={count}", _add, signature, constexprs, options))
    statistics = config_statistics(D)
    options = {"num_warps": statistics.pop("num_warps")}
    signature = {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", **ends}
    found.append(Ahead("statistics", _statistics, signature, {**statistics, **strides, "D": D}, options))
    for count in (0, 1):
        rows = config_rows(D)
        options = {"num_warps": rows.pop("num_warps")}
        signature = {**tensors, "layers": (f"*{dtype}",), "num_layers": "fp32"}
        constexprs = {**rows, **strides, **onto, "D": D, "P": padded(D), "COUNT": count, "FINAL": True}
        found.append(Ahead(f"rows blocks={count}", _rows, signature, constexprs, options))
    return found
