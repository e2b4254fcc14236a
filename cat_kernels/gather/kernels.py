"""`gather_tokens` in Triton: rows gathered in one pass; and, for what goes the other way, a table of slots.

A gradient is summed by the row that receives it, clone after clone, so that the order is fixed and nothing is added
atomically. Where a patch's token went is looked up: the table tells its slot in every clone and, for lists that may
name a patch more than once, every slot's next one.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible patches, S rows out (K, and 1 for the CLS token),
D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Ahead, launch, padded

LOOKED_UP = 128  # entries of the table of slots that are made at once, by one program a clone
LISTED = 16  # visible patches that they are compared with at once


def config(D: int) -> dict[str, int]:
    """A tile of 2048 elements, 16 for each thread of 4 warps; 512 contiguous bytes a row in bf16."""
    BLOCK_D = min(256, padded(D))
    return {"BLOCK_S": 2048 // BLOCK_D, "BLOCK_D": BLOCK_D, "num_warps": 4}


def row_config(D: int) -> dict[str, int]:
    """A whole row a program, at most 16 elements a thread up to a width of 4096."""
    return {"BLOCK_D": padded(D), "num_warps": min(8, max(1, padded(D) // 512))}


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["L", "K", "M"])
def _gather(
    tokens_ptr,
    visible_ptr,
    positions_ptr,
    cls_ptr,
    out_ptr,
    tokens_n,
    tokens_l,
    tokens_d,
    L,
    K,
    M,
    D: tl.constexpr,
    SELECT: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_CLS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    FIRST: tl.constexpr = 1 if HAS_CLS else 0
    S = K + FIRST
    blocks = tl.cdiv(S, BLOCK_S)
    clone = tl.program_id(0) // CHUNKS // blocks
    n = clone.to(tl.int64)
    s = tl.program_id(0) // CHUNKS % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(0) % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)
    k = s - FIRST
    inside = (k >= 0) & (k < K)
    patch = k.to(tl.int64)
    if HAS_VISIBLE:
        patch = tl.load(visible_ptr + n * K + k, inside, 0)
        inside &= (patch >= 0) & (patch < L)
    row = patch if SELECT else k.to(tl.int64)
    source = (clone // M).to(tl.int64) * tokens_n + row * tokens_l
    mask = inside[:, None] & (d < D)
    # A patch that there is not reads nothing and gives NaN.
    x = tl.load(tokens_ptr + source[:, None] + d.to(tl.int64) * tokens_d, mask, float("nan"))
    if HAS_POSITIONS:
        x = x.to(tl.float32) + tl.load(positions_ptr + (patch * D)[:, None] + d, mask, 0.0).to(tl.float32)
    if HAS_CLS:
        cls = tl.load(cls_ptr + d, d < D, 0.0).to(tl.float32)
        x = tl.where((s == 0)[:, None], cls, x.to(tl.float32))
    tl.store(out_ptr + ((n * S + s) * D)[:, None] + d, x, (s < S)[:, None] & (d < D))


def gather(
    tokens: Tensor,
    visible: Tensor | None,
    positions: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    select: bool = True,
) -> Tensor:
    """(N, S, D) in the dtype of tokens, which may have any strides. See `cat_kernels.gather_tokens`."""
    N, K = tokens.shape[:2] if visible is None else visible.shape
    D = tokens.shape[2]
    select = select and visible is not None
    L = tokens.shape[1] if select or positions is None else positions.shape[0]
    S = K + (cls_token is not None)
    out = tokens.new_empty((N, S, D))
    options = config(D)
    launch(
        _gather,
        (N * triton.cdiv(S, options["BLOCK_S"]) * triton.cdiv(D, options["BLOCK_D"]),),
        tokens,
        tokens if visible is None else visible.contiguous(),
        tokens if positions is None else positions.contiguous(),
        tokens if cls_token is None else cls_token.contiguous(),
        out,
        *tokens.stride(),
        L,
        K,
        N // max(tokens.shape[0], 1) if select else 1,
        D=D,
        SELECT=select,
        # Without a selection, the patches' numbers say where their positions are, and nothing else.
        HAS_VISIBLE=visible is not None and (select or positions is not None),
        HAS_POSITIONS=positions is not None,
        HAS_CLS=cls_token is not None,
        **options,
    )
    return out


# --- from a patch to its slots ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["L", "K"])
def _slots(visible_ptr, table_ptr, L, K, CHAINED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    visible_ptr += n * K
    table_ptr += n * (L + K if CHAINED else L)
    for start in range(0, L, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        tl.store(table_ptr + patch, tl.full((BLOCK,), -1, tl.int32), patch < L)
    tl.debug_barrier()  # a thread now writes where another one has
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        patch = tl.load(visible_ptr + k, k < K, -1)
        first = (k < K) & (patch >= 0) & (patch < L)
        if CHAINED:
            following = tl.full((BLOCK,), K, tl.int32)
            before = tl.zeros((BLOCK,), tl.int32)
            for start_other in range(0, K, BLOCK_K):
                other = (start_other + tl.arange(0, BLOCK_K))[:, None]
                same = tl.load(visible_ptr + other, other < K, -1) == patch
                following = tl.minimum(following, tl.min(tl.where(same & (other > k), other, K), 0))
                before = tl.maximum(before, tl.max((same & (other < k)).to(tl.int32), 0))
            tl.store(table_ptr + L + k, tl.where(following < K, following, -1), k < K)
            first &= before == 0
        tl.store(table_ptr + patch, k, first)


def slots(visible: Tensor, L: int, *, chained: bool = False) -> Tensor:
    """(N, K) int64 -> (N, L) int32: the slot that names patch l, or -1.

    chained: for lists that may name a patch more than once, (N, L + K): the slot that names patch l first, then, for
        every slot, the next one that names the same patch, or -1."""
    N, K = visible.shape
    table = visible.new_empty((N, L + K if chained else L), dtype=torch.int32)
    launch(_slots, (N,), visible.contiguous(), table, L, K, CHAINED=chained, BLOCK=LOOKED_UP, BLOCK_K=LISTED)
    return table


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["L", "K", "M"])
def _sum_rows(grad_ptr, table_ptr, out_ptr, grad_n, grad_k, grad_d, L, K, M, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    l = tl.program_id(0) % L
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    first = (tl.program_id(0) // L).to(tl.int64) * M
    for m in range(M):
        entries_ptr = table_ptr + (first + m) * (L + K)
        slot = tl.load(entries_ptr + l)
        while slot >= 0:
            source = (first + m) * grad_n + slot.to(tl.int64) * grad_k
            total += tl.load(grad_ptr + source + d.to(tl.int64) * grad_d, d < D, 0.0).to(tl.float32)
            slot = tl.load(entries_ptr + L + slot)
    tl.store(out_ptr + row * D + d, total, d < D)


def sum_rows(grad: Tensor, visible: Tensor, clips: int, length: int, dtype: torch.dtype) -> Tensor:
    """Sum of grad[n, k] over the places (n // M, visible[n, k]): (clips, length, D) in dtype, summed in float32.

    grad: (N, K, D), any strides."""
    D = grad.shape[2]
    out = grad.new_empty((clips, length, D), dtype=dtype)
    table = slots(visible, length, chained=True)
    M = visible.shape[0] // max(clips, 1)
    sizes = (length, visible.shape[1], M)
    launch(_sum_rows, (clips * length,), grad, table, out, *grad.stride(), *sizes, D=D, **row_config(D))
    return out


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model: contiguous tokens, positions and CLS token in float32."""
    D = 768
    options = config(D)
    sizes: dict[str, Any] = {"D": D, **{name: options.pop(name) for name in ("BLOCK_S", "BLOCK_D")}}
    tensors = {"tokens_ptr": f"*{dtype}", "visible_ptr": "*i64", "positions_ptr": "*fp32", "cls_ptr": "*fp32"}
    tensors |= {"out_ptr": f"*{dtype}"} | dict.fromkeys(("L", "K", "M"), "i32")
    found = []
    for name, select, whole in (("gather", False, True), ("gather select", True, True), ("gather rows", True, False)):
        flags = {"SELECT": select, "HAS_VISIBLE": True, "HAS_POSITIONS": whole, "HAS_CLS": whole}
        contiguous = {"tokens_n": (512 if select else 102) * D, "tokens_l": D, "tokens_d": 1}
        if not whole:
            tensors = {**tensors, "positions_ptr": f"*{dtype}", "cls_ptr": f"*{dtype}"}
        found.append(Ahead(name, _gather, tensors, {**sizes, **contiguous, **flags}, options))
    listed = {"visible_ptr": "*i64", "table_ptr": "*i32", "L": "i32", "K": "i32"}
    for name, chained in (("slots", False), ("slots chained", True)):
        blocks = {"CHAINED": chained, "BLOCK": LOOKED_UP, "BLOCK_K": LISTED}
        found.append(Ahead(name, _slots, listed, blocks, {}))
    options = row_config(D)
    sizes = {"D": D, "BLOCK_D": options.pop("BLOCK_D"), "grad_n": 103 * D, "grad_k": D, "grad_d": 1}
    summed = {"grad_ptr": f"*{dtype}", "table_ptr": "*i32", "out_ptr": f"*{dtype}"}
    ends = dict.fromkeys(("L", "K", "M"), "i32")
    found.append(Ahead("sum_rows", _sum_rows, summed | ends, sizes, options))
    return found
