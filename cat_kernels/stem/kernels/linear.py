"""LayerNorm and a linear layer in one pass: y = LN(x) @ weight.T + bias.

The normalised rows are never in memory. A tile of rows is read twice, for its statistics and as the operand, the
second time from the cache.

Shapes: R rows, c channels in, n channels out.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import DTYPES, Ahead, dot, launch
from . import tiles
from .rows import layer_norm


@triton.jit(do_not_specialize=["R", "eps"])
def _norm_linear(
    x_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    R,
    eps,
    c: tl.constexpr,
    n: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Column tiles of the same rows are neighbours, so that all but the first find the rows in the cache.
    tiles_n: tl.constexpr = (n + BLOCK_N - 1) // BLOCK_N
    rows = tl.program_id(0) // tiles_n * BLOCK_R + tl.arange(0, BLOCK_R)
    outs = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_at = rows.to(tl.int64)[:, None] * c
    inside = (rows < R)[:, None]

    # Mean and squares around it, of all columns so far, joined with those of the next ones (Chan et al.).
    mean = tl.zeros((BLOCK_R,), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    for k in range(0, c, BLOCK_K):
        x = tl.load(x_ptr + row_at + (k + ks), inside & (k + ks < c), 0.0).to(tl.float32)
        width = tl.minimum(c - k, BLOCK_K).to(tl.float32)
        piece = tl.sum(x, 1) / width
        centred = tl.where(k + ks < c, x - piece[:, None], 0.0)
        shift, share = piece - mean, width / (k + width)
        squares += tl.sum(centred * centred, 1) + shift * shift * k * share
        mean += shift * share
    rstd = tl.rsqrt(squares / c + eps)

    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for k in range(0, c, BLOCK_K):
        in_k = k + ks < c
        x = tl.load(x_ptr + row_at + (k + ks), inside & in_k, 0.0).to(tl.float32)
        ln_weight = tl.load(ln_weight_ptr + k + ks, in_k, 0.0).to(tl.float32)
        ln_bias = tl.load(ln_bias_ptr + k + ks, in_k, 0.0).to(tl.float32)
        normed = ((x - mean[:, None]) * rstd[:, None] * ln_weight + ln_bias).to(weight_ptr.dtype.element_ty)
        weight = tl.load(weight_ptr + outs * c + (k + ks)[:, None], (outs < n) & in_k[:, None], 0.0)
        acc = dot(normed, weight, acc, "ieee")
    acc += tl.load(bias_ptr + outs, outs < n, 0.0).to(tl.float32)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * n + outs, acc, inside & (outs < n))


def norm_linear(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """(R, c) -> (R, n) in the dtype of weight (n, c)."""
    R, c = x.shape
    n = weight.shape[0]
    options = tiles.norm_linear(c, n, weight.dtype)
    if options is None:
        return F.linear(layer_norm(x, ln_weight, ln_bias, eps), weight, bias.to(x.dtype))
    y = weight.new_empty(R, n)
    grid = (triton.cdiv(R, options["BLOCK_R"]) * triton.cdiv(n, options["BLOCK_N"]),)
    tensors = (x, ln_weight, ln_bias, weight, bias, y)
    launch(_norm_linear, grid, *tensors, R, eps, c=c, n=n, **options)
    return y


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model: a block's first 1x1."""
    found = []
    signature = {
        "x_ptr": f"*{dtype}",
        "ln_weight_ptr": "*fp32",
        "ln_bias_ptr": "*fp32",
        "weight_ptr": f"*{dtype}",
        "bias_ptr": "*fp32",
        "y_ptr": f"*{dtype}",
        "R": "i32",
        "eps": "fp32",
    }
    for c in sorted({c for c, _ in tiles.STAGES}):
        options = tiles.norm_linear(c, c, DTYPES[dtype])
        if options is not None:
            sizes: dict[str, Any] = {name: options.pop(name) for name in ("BLOCK_R", "BLOCK_N", "BLOCK_K")}
            found.append(Ahead(f"norm_linear c={c}", _norm_linear, signature, {"c": c, "n": c, **sizes}, options))
    return found
