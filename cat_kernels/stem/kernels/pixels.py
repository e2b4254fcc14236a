"""The first embedding: pixels of visible patches straight from the spectrogram, a linear layer, LayerNorm.

    pre = pixels @ weight.T + bias,  y = LN(pre) * ln_weight + ln_bias

A row of ``pixels`` is one r0 x r0 cell of the spectrogram in the order (row, column, channel); it is gathered with the
spectrogram's strides and exists in registers only. Neither ``pre`` nor anything else as large as y is in memory. The
backward computes ``pre`` again; with xhat = (pre - mean) * rstd and u = dy * ln_weight

    dpre = rstd * (u - mean(u) - xhat * mean(u * xhat)),
    dweight = dpre.T @ pixels,  dpixels = dpre @ weight,
    dbias = sum dpre,  dln_weight = sum dy * xhat,  dln_bias = sum dy  over the rows

Rows wider than a tile are taken in pieces, and their moments merged (Chan, Golub and LeVeque, 1983).

Shapes: B clips, T frames, F mel bins, C channels, N clone rows, K visible patches, H x W patches of P x P pixels,
p = P / r0 cells a side, S = p * p, R = N * K * S rows, c channels out, inner = r0 * r0 * C.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import DTYPES, Ahead, dot, input_precision, launch
from ..layout import block_order, strides
from . import tiles

PROGRAMS = 256  # that share the weight's gradient: about two on every multiprocessor


@functools.cache
def cell_order(resolutions: tuple[int, ...], device: torch.device) -> Tensor:
    """(S,) int32: row-major index, in a patch of p x p cells, of every place in block order."""
    # A tensor made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return block_order(strides(resolutions)[:0:-1], torch.device("cpu")).to(device, torch.int32)


@triton.jit
def _cells(
    rows,
    R,
    visible_ptr,
    order_ptr,
    K,
    clones,
    W,
    stride_b,
    stride_t,
    stride_f,
    p: tl.constexpr,
    r0: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
):
    """Where in the spectrogram the cell of every row begins: (BLOCK_R,) int64."""
    slot = rows // (p * p)
    clip = slot // K
    if HAS_VISIBLE:
        patch = tl.load(visible_ptr + slot, rows < R, 0).to(tl.int32)
        clip = clip // clones
    else:
        patch = slot % K
    place = tl.load(order_ptr + rows % (p * p))
    t = (patch // W * p + place // p) * r0
    f = (patch % W * p + place % p) * r0
    return clip.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t + f.to(tl.int64) * stride_f


@triton.jit
def _pixels(spec_ptr, cells, inside, js, stride_c, stride_t, stride_f, r0: tl.constexpr, channels: tl.constexpr):
    """Columns ``js`` of the pixels of every row: (BLOCK_R, len(js))."""
    offsets = (js // (r0 * channels)).to(tl.int64) * stride_t + (js // channels % r0).to(tl.int64) * stride_f
    offsets += (js % channels).to(tl.int64) * stride_c
    return tl.load(spec_ptr + cells[:, None] + offsets, inside[:, None] & (js < r0 * r0 * channels), 0.0)


@triton.jit
def _pre(
    spec_ptr,
    cells,
    inside,
    weight_ptr,
    bias_ptr,
    columns,
    stride_c,
    stride_t,
    stride_f,
    c: tl.constexpr,
    r0: tl.constexpr,
    channels: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns ``columns`` of pixels @ weight.T + bias: (BLOCK_R, BLOCK_C) float32, zero beyond c."""
    inner: tl.constexpr = r0 * r0 * channels
    acc = tl.zeros((cells.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, inner, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        pixels = _pixels(spec_ptr, cells, inside, ks, stride_c, stride_t, stride_f, r0, channels)
        mask = (columns < c) & (ks < inner)[:, None]
        acc = dot(pixels, tl.load(weight_ptr + columns * inner + ks[:, None], mask, 0.0), acc, PRECISION)
    return acc + tl.load(bias_ptr + columns, columns < c, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R", "K", "clones", "W", "eps"])
def _embed(
    spec_ptr,
    visible_ptr,
    order_ptr,
    weight_ptr,
    bias_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    y_ptr,
    R,
    K,
    clones,
    W,
    stride_b,
    stride_c,
    stride_t,
    stride_f,
    eps,
    c: tl.constexpr,
    p: tl.constexpr,
    r0: tl.constexpr,
    channels: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    cells = _cells(rows, R, visible_ptr, order_ptr, K, clones, W, stride_b, stride_t, stride_f, p, r0, HAS_VISIBLE)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, c, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        pre = _pre(
            spec_ptr, cells, inside, weight_ptr, bias_ptr, columns, stride_c, stride_t, stride_f,
            c, r0, channels, PRECISION, BLOCK_K,
        )  # fmt: skip
        width = tl.minimum(c - first, BLOCK_C).to(tl.float32)
        piece_mean = tl.sum(pre, 1) / width
        centred = tl.where(columns < c, pre - piece_mean[:, None], 0.0)
        shift, share = piece_mean - mean, width / (first + width)
        mean += shift * share
        squares += tl.sum(centred * centred, 1) + shift * shift * first * share
    rstd = tl.rsqrt(squares / c + eps)

    # With one piece this is the same `pre`, and the compiler makes it once.
    for first in range(0, c, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        pre = _pre(
            spec_ptr, cells, inside, weight_ptr, bias_ptr, columns, stride_c, stride_t, stride_f,
            c, r0, channels, PRECISION, BLOCK_K,
        )  # fmt: skip
        ln_weight = tl.load(ln_weight_ptr + columns, columns < c, 0.0).to(tl.float32)
        ln_bias = tl.load(ln_bias_ptr + columns, columns < c, 0.0).to(tl.float32)
        y = (pre - mean[:, None]) * rstd[:, None] * ln_weight + ln_bias
        at = rows.to(tl.int64)[:, None] * c + columns
        tl.store(y_ptr + at, y, inside[:, None] & (columns < c))


def embed_pixels(
    spec: Tensor,
    visible: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    resolutions: tuple[int, ...],
    eps: float,
) -> Tensor:
    """Spectrogram (B, C, T, F) of any strides, visible patches (N, K) int64, or None for all -> (N*K*S, c) in the
    spectrogram's dtype, which weight (c, r0*r0*C) has too; its columns are ordered as `layout.patchify` orders them."""
    where, sizes, R = _geometry(spec, visible, resolutions)
    c, inner = weight.shape
    y = spec.new_empty(R, c)
    options = tiles.pixels(c, inner, spec.dtype)["embed"]
    grid = (triton.cdiv(R, options["BLOCK_R"]),)
    tensors = (spec, *where, weight, bias, ln_weight, ln_bias, y)
    launch(_embed, grid, *tensors, *_counts(spec, visible, resolutions, R), eps, c=c, **sizes, **options)
    return y


def _geometry(
    spec: Tensor, visible: Tensor | None, resolutions: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor], dict[str, Any], int]:
    """The tables that say where a row's cell is; sizes that the kernels are compiled for; R."""
    B, C, T, F = spec.shape
    P, r0 = resolutions[-1], resolutions[0]
    order = cell_order(resolutions, spec.device)
    patches = B * (T // P) * (F // P) if visible is None else visible.numel()
    sizes = {
        "p": P // r0,
        "r0": r0,
        "channels": C,
        "HAS_VISIBLE": visible is not None,
        "PRECISION": input_precision(spec.dtype),
    }
    return (order if visible is None else visible.contiguous(), order), sizes, patches * order.numel()


def _counts(spec: Tensor, visible: Tensor | None, resolutions: tuple[int, ...], R: int) -> tuple[int, ...]:
    """Arguments R, K, clones, W and the four strides. With one channel its stride does not matter."""
    B, C, T, F = spec.shape
    P = resolutions[-1]
    W = F // P
    K = T // P * W if visible is None else visible.shape[1]
    clones = 1 if visible is None else visible.shape[0] // max(B, 1)
    stride_b, stride_c, stride_t, stride_f = spec.stride()
    return R, K, clones, W, stride_b, stride_c if C > 1 else 0, stride_t, stride_f


@triton.jit(do_not_specialize=["R", "K", "clones", "W", "eps"])
def _row_statistics(
    spec_ptr,
    visible_ptr,
    order_ptr,
    weight_ptr,
    bias_ptr,
    ln_weight_ptr,
    grad_ptr,
    statistics_ptr,
    R,
    K,
    clones,
    W,
    stride_b,
    stride_c,
    stride_t,
    stride_f,
    eps,
    c: tl.constexpr,
    p: tl.constexpr,
    r0: tl.constexpr,
    channels: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # mean and rstd of pre, mean(u) and mean(u * xhat): (4, R) float32.
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    cells = _cells(rows, R, visible_ptr, order_ptr, K, clones, W, stride_b, stride_t, stride_f, p, r0, HAS_VISIBLE)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    mean_u = tl.zeros((BLOCK_R,), tl.float32)
    products = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, c, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        pre = _pre(
            spec_ptr, cells, inside, weight_ptr, bias_ptr, columns, stride_c, stride_t, stride_f,
            c, r0, channels, PRECISION, BLOCK_K,
        )  # fmt: skip
        at = rows.to(tl.int64)[:, None] * c + columns
        u = tl.load(grad_ptr + at, inside[:, None] & (columns < c), 0.0).to(tl.float32)
        u *= tl.load(ln_weight_ptr + columns, columns < c, 0.0).to(tl.float32)
        width = tl.minimum(c - first, BLOCK_C).to(tl.float32)
        piece_mean = tl.sum(pre, 1) / width
        centred = tl.where(columns < c, pre - piece_mean[:, None], 0.0)
        shift, share = piece_mean - mean, width / (first + width)
        shift_u = tl.sum(u, 1) / width - mean_u
        mean += shift * share
        mean_u += shift_u * share
        squares += tl.sum(centred * centred, 1) + shift * shift * first * share
        products += tl.sum(centred * u, 1) + shift * shift_u * first * share
    rstd = tl.rsqrt(squares / c + eps)
    tl.store(statistics_ptr + rows, mean, inside)
    tl.store(statistics_ptr + R + rows, rstd, inside)
    tl.store(statistics_ptr + 2 * R + rows, mean_u, inside)
    tl.store(statistics_ptr + 3 * R + rows, products * rstd / c, inside)


@triton.jit
def _load_statistics(statistics_ptr, rows, R):
    inside = rows < R
    mean = tl.load(statistics_ptr + rows, inside, 0.0)
    rstd = tl.load(statistics_ptr + R + rows, inside, 0.0)
    mean_u = tl.load(statistics_ptr + 2 * R + rows, inside, 0.0)
    return mean, rstd, mean_u, tl.load(statistics_ptr + 3 * R + rows, inside, 0.0)


@triton.jit
def _pre_transposed(
    spec_ptr,
    cells,
    inside,
    weight_ptr,
    bias_ptr,
    columns,
    stride_c,
    stride_t,
    stride_f,
    c: tl.constexpr,
    r0: tl.constexpr,
    channels: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`_pre` as (BLOCK_C, BLOCK_R)."""
    inner: tl.constexpr = r0 * r0 * channels
    acc = tl.zeros((columns.shape[0], cells.shape[0]), tl.float32)
    for k in range(0, inner, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        pixels = _pixels(spec_ptr, cells, inside, ks, stride_c, stride_t, stride_f, r0, channels)
        mask = (columns < c)[:, None] & (ks < inner)
        weight = tl.load(weight_ptr + columns[:, None] * inner + ks, mask, 0.0)
        acc = dot(weight, tl.trans(pixels), acc, PRECISION)
    return acc + tl.load(bias_ptr + columns, columns < c, 0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["R", "K", "clones", "W", "eps"])
def _backward_weight(
    spec_ptr,
    visible_ptr,
    order_ptr,
    weight_ptr,
    bias_ptr,
    ln_weight_ptr,
    grad_ptr,
    statistics_ptr,
    dweight_ptr,
    sums_ptr,
    R,
    K,
    clones,
    W,
    stride_b,
    stride_c,
    stride_t,
    stride_f,
    eps,
    c: tl.constexpr,
    p: tl.constexpr,
    r0: tl.constexpr,
    channels: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Program (tile, share): one tile of dweight, from every shares-th tile of rows. Tiles of a share are neighbours,
    # so that all but the first find its rows in the cache.
    inner: tl.constexpr = r0 * r0 * channels
    tiles_j: tl.constexpr = (inner + BLOCK_J - 1) // BLOCK_J
    js = tl.program_id(0) % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    columns = tl.program_id(0) // tiles_j * BLOCK_C + tl.arange(0, BLOCK_C)
    ln_weight = tl.load(ln_weight_ptr + columns, columns < c, 0.0).to(tl.float32)

    # Tiles are (BLOCK_C, BLOCK_R): then dpre leaves one product as it enters the next, without shared memory, and sums
    # over rows are cheap.
    dweight = tl.zeros((BLOCK_C, BLOCK_J), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    dln_weight = tl.zeros((BLOCK_C,), tl.float32)
    dln_bias = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(tl.program_id(1) * BLOCK_R, R, tl.num_programs(1) * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        inside = rows < R
        cells = _cells(rows, R, visible_ptr, order_ptr, K, clones, W, stride_b, stride_t, stride_f, p, r0, HAS_VISIBLE)
        at = rows.to(tl.int64) * c + columns[:, None]
        grad = tl.load(grad_ptr + at, inside & (columns < c)[:, None], 0.0).to(tl.float32)
        pre = _pre_transposed(
            spec_ptr, cells, inside, weight_ptr, bias_ptr, columns, stride_c, stride_t, stride_f,
            c, r0, channels, PRECISION, BLOCK_K,
        )  # fmt: skip
        u = grad * ln_weight[:, None]
        if c <= BLOCK_C:
            mean = tl.sum(pre, 0) / c
            centred = tl.where((columns < c)[:, None], pre - mean, 0.0)
            rstd = tl.where(inside, tl.rsqrt(tl.sum(centred * centred, 0) / c + eps), 0.0)
            xhat = centred * rstd
            mean_u = tl.sum(u, 0) / c
            mean_product = tl.sum(u * xhat, 0) / c
        else:
            mean, rstd, mean_u, mean_product = _load_statistics(statistics_ptr, rows, R)
            xhat = (pre - mean) * rstd
        dpre = (u - mean_u - xhat * mean_product) * rstd
        dbias += tl.sum(dpre, 1)
        dln_weight += tl.sum(grad * xhat, 1)
        dln_bias += tl.sum(grad, 1)
        pixels = _pixels(spec_ptr, cells, inside, js, stride_c, stride_t, stride_f, r0, channels)
        dweight = dot(dpre.to(pixels.dtype), pixels, dweight, PRECISION)

    out = tl.program_id(1).to(tl.int64) * c
    mask = (columns < c)[:, None] & (js < inner)
    tl.store(dweight_ptr + out * inner + columns[:, None] * inner + js, dweight, mask)
    if tl.program_id(0) % tiles_j == 0:
        tl.store(sums_ptr + out * 3 + columns, dbias, columns < c)
        tl.store(sums_ptr + out * 3 + c + columns, dln_weight, columns < c)
        tl.store(sums_ptr + out * 3 + 2 * c + columns, dln_bias, columns < c)


@triton.jit(do_not_specialize=["R", "K", "clones", "W"])
def _backward_pixels(
    spec_ptr,
    visible_ptr,
    order_ptr,
    weight_ptr,
    bias_ptr,
    ln_weight_ptr,
    grad_ptr,
    statistics_ptr,
    dpixels_ptr,
    R,
    K,
    clones,
    W,
    stride_b,
    stride_c,
    stride_t,
    stride_f,
    c: tl.constexpr,
    p: tl.constexpr,
    r0: tl.constexpr,
    channels: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    inner: tl.constexpr = r0 * r0 * channels
    tiles_j: tl.constexpr = (inner + BLOCK_J - 1) // BLOCK_J
    js = tl.program_id(0) % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    rows = tl.program_id(0) // tiles_j * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    cells = _cells(rows, R, visible_ptr, order_ptr, K, clones, W, stride_b, stride_t, stride_f, p, r0, HAS_VISIBLE)
    mean, rstd, mean_u, mean_product = _load_statistics(statistics_ptr, rows, R)
    acc = tl.zeros((BLOCK_R, BLOCK_J), tl.float32)
    for first in range(0, c, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        pre = _pre(
            spec_ptr, cells, inside, weight_ptr, bias_ptr, columns, stride_c, stride_t, stride_f,
            c, r0, channels, PRECISION, BLOCK_K,
        )  # fmt: skip
        at = rows.to(tl.int64)[:, None] * c + columns
        u = tl.load(grad_ptr + at, inside[:, None] & (columns < c), 0.0).to(tl.float32)
        u *= tl.load(ln_weight_ptr + columns, columns < c, 0.0).to(tl.float32)
        xhat = (pre - mean[:, None]) * rstd[:, None]
        dpre = (u - mean_u[:, None] - xhat * mean_product[:, None]) * rstd[:, None]
        mask = (columns < c)[:, None] & (js < inner)
        weight = tl.load(weight_ptr + columns[:, None] * inner + js, mask, 0.0)
        acc = dot(dpre.to(weight.dtype), weight, acc, PRECISION)
    tl.store(dpixels_ptr + rows.to(tl.int64)[:, None] * inner + js, acc, inside[:, None] & (js < inner))


def embed_pixels_backward(
    grad: Tensor,
    spec: Tensor,
    visible: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    resolutions: tuple[int, ...],
    eps: float,
    need_pixels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradient (R, c) of the result, and the inputs -> dweight (c, inner), dbias, dln_weight and dln_bias (c,) in
    float32, summed in a fixed order; dpixels (R, inner) in the spectrogram's dtype, or None where it is not needed."""
    where, sizes, R = _geometry(spec, visible, resolutions)
    c, inner = weight.shape
    options = tiles.pixels(c, inner, spec.dtype)
    tensors = (spec, *where, weight, bias, ln_weight, grad)
    counts = _counts(spec, visible, resolutions, R)

    statistics = spec.new_empty((4, R), dtype=torch.float32)
    parts = triton.cdiv(c, options["weight"]["BLOCK_C"]) * triton.cdiv(inner, options["weight"]["BLOCK_J"])
    if need_pixels or c > options["weight"]["BLOCK_C"]:
        grid: tuple[int, ...] = (triton.cdiv(R, options["statistics"]["BLOCK_R"]),)
        launch(_row_statistics, grid, *tensors, statistics, *counts, eps, c=c, **sizes, **options["statistics"])

    shares = min(max(1, PROGRAMS // parts), triton.cdiv(R, options["weight"]["BLOCK_R"]))
    dweight = spec.new_empty((shares, c, inner), dtype=torch.float32)
    sums = spec.new_empty((shares, 3, c), dtype=torch.float32)
    outputs = (statistics, dweight, sums)
    launch(_backward_weight, (parts, shares), *tensors, *outputs, *counts, eps, c=c, **sizes, **options["weight"])

    dpixels = spec.new_empty(R, inner) if need_pixels else None
    if dpixels is not None:
        grid = (triton.cdiv(R, options["pixels"]["BLOCK_R"]) * triton.cdiv(inner, options["pixels"]["BLOCK_J"]),)
        launch(_backward_pixels, grid, *tensors, statistics, dpixels, *counts, c=c, **sizes, **options["pixels"])
    dbias, dln_weight, dln_bias = sums.sum(0)
    return dweight.sum(0), dbias, dln_weight, dln_bias, dpixels


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model's stem, and of the stem with one resolution."""
    counts = dict.fromkeys(("R", "K", "clones", "W", "stride_b", "stride_c", "stride_t"), "i32")
    tensors = {"spec_ptr": f"*{dtype}", "visible_ptr": "*i64", "order_ptr": "*i32", "weight_ptr": f"*{dtype}"}
    tensors |= {"bias_ptr": "*fp32", "ln_weight_ptr": "*fp32"}
    backward = {**tensors, "grad_ptr": f"*{dtype}", "statistics_ptr": "*fp32"}
    kernels: dict[str, tuple[Any, dict[str, str]]] = {
        "embed": (_embed, {**tensors, "ln_bias_ptr": "*fp32", "y_ptr": f"*{dtype}", **counts, "eps": "fp32"}),
        "statistics": (_row_statistics, {**backward, **counts, "eps": "fp32"}),
        "weight": (
            _backward_weight,
            {**backward, "dweight_ptr": "*fp32", "sums_ptr": "*fp32", **counts, "eps": "fp32"},
        ),
        "pixels": (_backward_pixels, {**backward, "dpixels_ptr": f"*{dtype}", **counts}),
    }
    found = []
    for r0, P, c in tiles.FIRST:
        for name, options in tiles.pixels(c, r0 * r0, DTYPES[dtype]).items():
            kernel, signature = kernels[name]
            sizes: dict[str, Any] = {"c": c, "p": P // r0, "r0": r0, "channels": 1, "HAS_VISIBLE": True}
            sizes |= {"PRECISION": "ieee", "stride_f": 1}
            sizes |= {key: value for key, value in options.items() if key.startswith("BLOCK")}
            compiler = {key: options[key] for key in ("num_warps", "num_stages")}
            found.append(Ahead(f"{kernel.__name__[1:]} r0={r0} c={c}", kernel, signature, sizes, compiler))
    return found
