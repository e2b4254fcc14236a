"""Who is next to whom: the rows that the halo of every visible patch reads (`layout.halo_rows`), in one pass.

A table per clone, patch -> place in the flat list of visible patches or -1, is PyTorch's; a halo's cells look up theirs
in it. What lies beyond the border is -1 as what is masked.

Shapes: N clones, K visible patches each of H x W, p x p positions in a patch; a halo has side x side cells,
side = p + 2 radius.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Ahead, launch
from . import tiles


@triton.jit(do_not_specialize=["patches", "K", "H", "W"])
def _halo_rows(
    visible_ptr,
    slots_ptr,
    places_ptr,
    halo_ptr,
    patches,
    K,
    H,
    W,
    P: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    SIDE: tl.constexpr = P + 2 * RADIUS
    patch = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cell = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = tl.load(visible_ptr + patch, patch < patches, 0).to(tl.int32)
    row = (own // W * P)[:, None] + cell // SIDE - RADIUS
    column = (own % W * P)[:, None] + cell % SIDE - RADIUS
    mask = (patch < patches)[:, None] & (cell < SIDE * SIDE)
    inside = mask & (row >= 0) & (row < H * P) & (column >= 0) & (column < W * P)
    clone = (patch // K).to(tl.int64)[:, None] * (H * W)
    slot = tl.load(slots_ptr + clone + row // P * W + column // P, inside, -1)
    place = tl.load(places_ptr + row % P * P + column % P, inside, 0)
    at = patch.to(tl.int64)[:, None] * (SIDE * SIDE) + cell
    tl.store(halo_ptr + at, tl.where(slot < 0, -1, slot * (P * P) + place), mask)


def halo_rows(visible: Tensor, places: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Visible patches (N, K) int64 and `layout.block_places` of a patch, int32 -> (N * K, side * side) int32, -1 where
    nothing is visible."""
    (N, K), (H, W) = visible.shape, grid
    p = math.isqrt(places.numel())
    slots = torch.full((N, H * W), -1, dtype=torch.int32, device=visible.device)
    numbers = torch.arange(N * K, dtype=torch.int32, device=visible.device)
    slots.scatter_(1, visible, numbers.view(N, K))
    cells = (p + 2 * radius) ** 2
    halo = places.new_empty(N * K, cells)
    options = tiles.halo_rows(cells)
    blocks = triton.cdiv(N * K, options["BLOCK_R"]), triton.cdiv(cells, options["BLOCK_C"])
    tensors = (visible.contiguous(), slots, places, halo)
    launch(_halo_rows, blocks, *tensors, N * K, K, H, W, P=p, RADIUS=radius, **options)
    return halo


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model; there is no dtype in it."""
    if dtype != "bf16":
        return []
    signature = {"visible_ptr": "*i64", **dict.fromkeys(("slots_ptr", "places_ptr", "halo_ptr"), "*i32")}
    signature |= dict.fromkeys(("patches", "K", "H", "W"), "i32")
    found = []
    for p in sorted({p for _, p in tiles.STAGES}):
        chosen = tiles.halo_rows((p + 4) ** 2)
        options = {option: chosen[option] for option in ("num_warps", "num_stages")}
        blocks = {size: value for size, value in chosen.items() if size not in options}
        found.append(Ahead(f"halo_rows p={p}", _halo_rows, signature, {"P": p, "RADIUS": 2, **blocks}, options))
    return found
