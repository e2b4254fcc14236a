"""`restore_tokens` in Triton: the whole grid in one pass, a token where the table of slots has one, else noise.

The noise is `tl.randn4x`'s, and costs more than writing it: in the time in which an H200 writes four elements in bf16
(4.3 TB/s), a thread can issue some 80 instructions; `tl.randn4x` compiles to more than 400. So

- a product of Philox's is one of 64 bits, not a low and a high one of 32;
- a row is drawn by as many threads as it has counters, where these are a multiple of 32; a visible row draws nothing;
- the standard deviation is a factor of Box-Muller's radius;
- noise that is rounded to 16 bits uses the hardware's log2, sine and cosine. In float32 sine and cosine are
  polynomials: the library's take an angle of any size, and a stack for it.

Shapes: N clip-clones, K visible patches, L patches, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from .._triton import _INTERPRETED, Ahead, launch, padded
from ..gather.kernels import slots

ROWS = 8  # of a program, R = N * L in all: what it does but once is little beside that


def counters(D: int) -> int:
    """Counters, of four elements each, that a row of the grid takes from. It may begin anywhere in the first one, but
    not where D is a multiple of 4."""
    return D // 4 if D % 4 == 0 else (D + 6) // 4


def config(D: int) -> dict[str, int]:
    """A counter a thread, and 1, 2 or 4 warps: what leaves the fewest threads idle at the end of a row."""
    count = counters(D)
    num_warps = min((4, 2, 1), key=lambda warps: triton.cdiv(count, 32 * warps) * warps)
    return {"BLOCK_R": ROWS, "BLOCK_C": 32 * num_warps, "num_warps": num_warps}


# --- noise ------------------------------------------------------------------------------------------------------------


@triton.jit
def _words(k0, k1, counter):
    """`tl.randint4x(seed, counter)` for an int64 counter; the words of the seed are uint32."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _sine_and_cosine(angle):
    """Of an angle in [0, 2 pi], to about 1e-7: reduced to the nearest quarter turn, then Cephes' polynomials."""
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - quarter * 1.5703125 - quarter * 4.837512969970703e-4 - quarter * 7.549789948768648e-8
    y = x * x
    sine = ((-1.9515295891e-4 * y + 8.3321608736e-3) * y - 1.6666654611e-1) * y * x + x
    cosine = ((2.443315711809948e-5 * y - 1.388731625493765e-3) * y + 4.166664568298827e-2) * y * y - 0.5 * y + 1
    turn = quarter.to(tl.int32)
    odd = (turn & 1) == 1
    upper = (turn & 2) == 0
    right = ((turn + 1) & 2) == 0
    sine, cosine = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(upper, sine, -sine), tl.where(right, cosine, -cosine)


@triton.jit
def _pair(w1, w2, std, FAST: tl.constexpr):
    """std * `tl.pair_uniform_to_normal` of the uniforms that two words make; FAST: as exact as 16 bits need it."""
    u1 = tl.maximum(tl.uint_to_uniform_float(w1), 1.0e-7)
    if FAST:
        # One factor, the uniform's and 2 pi, and not two.
        w2 = w2.to(tl.int32, bitcast=True)
        angle = tl.where(w2 < 0, -w2 - 1, w2) * (6.283185307179586 * 4.6566127342e-10)
        if _INTERPRETED:
            log2, sine, cosine = tl.log2(u1), tl.sin(angle), tl.cos(angle)
        else:
            log2, sine, cosine = libdevice.fast_log2f(u1), libdevice.fast_sinf(angle), libdevice.fast_cosf(angle)
        # log2's error is absolute: near 1 it may have the wrong sign. The factor is sqrt(2 ln 2).
        radius = std * 1.1774100225154747 * tl.sqrt(tl.abs(log2))
    else:
        radius = std * tl.sqrt(-2.0 * tl.log(u1))
        sine, cosine = _sine_and_cosine(6.283185307179586 * tl.uint_to_uniform_float(w2))
    return radius * cosine, radius * sine


@triton.jit
def _noise(k0, k1, counter, std, FAST: tl.constexpr):
    """std * `tl.randn4x(seed, counter)`, lane after lane: (BLOCK_C,) int64 -> (4 * BLOCK_C,) float32."""
    w0, w1, w2, w3 = _words(k0, k1, counter)
    z0, z1 = _pair(w0, w1, std, FAST)
    z2, z3 = _pair(w2, w3, std, FAST)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# --- the grid ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "L", "std"])
def _restore(
    tokens_ptr,
    slots_ptr,
    seed_ptr,
    offset_ptr,
    out_ptr,
    tokens_n,
    tokens_k,
    tokens_d,
    R,
    L,
    std,
    D: tl.constexpr,
    COUNTERS: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Of 32 bits each: halves of a 64-bit seed would turn all that is made with them into 64-bit arithmetic.
    k0 = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    k1 = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    offset = tl.load(offset_ptr)
    column = tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * BLOCK_R
    for row in range(first, tl.minimum(first + BLOCK_R, R)):
        slot = tl.load(slots_ptr + row)
        start = tl.full((), row, tl.int64) * D
        if slot >= 0:
            n = tl.full((), row // L, tl.int64)
            source = n * tokens_n + slot.to(tl.int64) * tokens_k + column.to(tl.int64) * tokens_d
            tl.store(out_ptr + start + column, tl.load(tokens_ptr + source, column < D), column < D)
        else:
            lane = 0 if D % 4 == 0 else start % 4
            for c in tl.static_range(0, COUNTERS, BLOCK_C):
                noise = _noise(k0, k1, offset + start // 4 + c + tl.arange(0, BLOCK_C), std, FAST)
                d = 4 * c + tl.arange(0, 4 * BLOCK_C) - lane
                tl.store(out_ptr + start + d, noise, (d >= 0) & (d < D))


def restore(tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor, noise_std: float) -> Tensor:
    """(N, num_patches, D) in the dtype of tokens, which may have any strides. See `cat_kernels.restore_tokens`."""
    N, _, D = tokens.shape
    L = num_patches
    seed = seed.contiguous()
    out = tokens.new_empty((N, L, D))
    launch(
        _restore,
        (triton.cdiv(N * L, ROWS),),
        tokens,
        slots(visible, L),
        seed.view(torch.int32),
        seed[1:],
        out,
        *tokens.stride(),
        N * L,
        L,
        noise_std,
        D=D,
        COUNTERS=counters(D),
        FAST=tokens.dtype != torch.float32,
        BLOCK_D=padded(D),
        **config(D),
    )
    return out


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model: tokens behind a CLS row."""
    D = 768
    options = config(D)
    sizes: dict[str, Any] = {"D": D, "COUNTERS": counters(D), "FAST": dtype != "fp32", "BLOCK_D": padded(D)}
    sizes |= {name: options.pop(name) for name in ("BLOCK_R", "BLOCK_C")}
    sizes |= {"tokens_n": 103 * D, "tokens_k": D, "tokens_d": 1}
    tensors = {
        "tokens_ptr": f"*{dtype}",
        "slots_ptr": "*i32",
        "seed_ptr": "*i32",
        "offset_ptr": "*i64",
        "out_ptr": f"*{dtype}",
    }
    return [Ahead("restore", _restore, {**tensors, "R": "i32", "L": "i32", "std": "fp32"}, sizes, options)]
