"""Order of the positions inside a patch, and who is next to whom.

A patch of P x P pixels holds S_i = (P / r_i)^2 positions at resolution r_i. They are kept in *recursive block order*:
with k_i = r_i / r_{i-1}, the index of a position is written in mixed radix, one digit d_j in [0, k_j^2) for every
coarser resolution j = n-1 .. i+1, most significant first, each digit row-major over its k_j x k_j block. (For factors
of 2 this is the Z-order curve.) Two things follow:

- the k_i^2 positions that one coarser position is made of are adjacent rows, so an embedding with kernel = stride is
  ``rows.reshape(-1, k^2 * c) @ W`` and a side output is ``rows.reshape(patches, S_i * c) @ W``;
- nothing has to be permuted between stages.

Shapes: B clips, M masks a clip, N = B * M, H x W the patch grid, L = H * W, K visible patches, S positions in a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def strides(resolutions: tuple[int, ...]) -> tuple[int, ...]:
    """k_i = r_i / r_{i-1} with r_{-1} = 1: kernel and stride of every embedding."""
    return tuple(r // previous for r, previous in zip(resolutions, (1, *resolutions[:-1]), strict=True))


def block_order(factors: tuple[int, ...], device: torch.device) -> Tensor:
    """Row-major index, in a p x p patch with p = prod(factors), of every position in block order.

    ``factors`` are k_{n-1}, ..., k_{i+1}, coarsest first. Returns (p*p,) int64: ``row_major[block_order]`` is in block
    order.
    """
    return in_block_order(torch.arange(math.prod(factors) ** 2, device=device)[None], factors).reshape(-1)


def in_block_order(row_major: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(X, p*p) positions of p x p patches -> (X, k, k, ...), the same in block order; a view, whose gradient is one too
    (that of an index is a sort)."""
    n = len(factors)
    interleaved = [axis for j in range(n) for axis in (1 + j, 1 + n + j)]
    return row_major.reshape(-1, *factors, *factors).permute(0, *interleaved)


def block_places(factors: tuple[int, ...], device: torch.device) -> Tensor:
    """`block_order` undone: the place in block order of every row-major position, (p*p,) int64."""
    n = len(factors)
    squares = [k for factor in factors for k in (factor, factor)]
    places = torch.arange(math.prod(squares), device=device).reshape(squares)
    return places.permute([*range(0, 2 * n, 2), *range(1, 2 * n, 2)]).reshape(-1)


def patchify(spec_BCTF: Tensor, resolutions: tuple[int, ...]) -> Tensor:
    """Cut a spectrogram into patches: (B, C, T, F) -> (B, L, S_0, r_0 * r_0 * C), positions in block order.

    The last dimension is (row, column, channel) inside one r_0 x r_0 cell: the input row of embedding 0.
    """
    B, C, T, F = spec_BCTF.shape
    P, n = resolutions[-1], len(resolutions)
    factors = strides(resolutions)[::-1]  # coarsest first; the last one is r_0
    pieces = spec_BCTF.reshape(B, C, T // P, *factors, F // P, *factors)
    row, column = 3, 4 + n  # first axis of the row factors and of the column factors
    interleaved = [axis for j in range(n) for axis in (row + j, column + j)]
    pieces = pieces.permute(0, 2, column - 1, *interleaved, 1)
    cell = resolutions[0] ** 2
    return pieces.reshape(B, (T // P) * (F // P), (P * P) // cell, cell * C)


def unpatchify(pixels_BLSC: Tensor, size: tuple[int, int], in_chans: int, resolutions: tuple[int, ...]) -> Tensor:
    """`patchify` undone: (B, L, ...) pixels in its order -> (B, C, T, F)."""
    (T, F), P, n = size, resolutions[-1], len(resolutions)
    B, factors = pixels_BLSC.shape[0], strides(resolutions)[::-1]
    squares = [k for factor in factors for k in (factor, factor)]
    pieces = pixels_BLSC.reshape(B, T // P, F // P, *squares, in_chans)
    rows, columns = [3 + 2 * j for j in range(n)], [4 + 2 * j for j in range(n)]
    return pieces.permute(0, 3 + 2 * n, 1, *rows, 2, *columns).reshape(B, in_chans, T, F)


def slot_table(visible_NK: Tensor, grid: tuple[int, int], reach: int) -> Tensor:
    """Patch grid -> place in the flat list of visible patches, or -1: (N, (H + 2 reach) * (W + 2 reach)) int64.

    The border of ``reach`` patches is the zero padding: never visible.
    """
    N, K = visible_NK.shape
    H, W = grid
    wide = W + 2 * reach
    place = (visible_NK // W + reach) * wide + visible_NK % W + reach
    slots = torch.full((N, (H + 2 * reach) * wide), -1, dtype=torch.int64, device=visible_NK.device)
    numbers = torch.arange(N * K, dtype=torch.int64, device=visible_NK.device).reshape(N, K)
    return slots.scatter(1, place, numbers)


def halo_rows(visible_NK: Tensor, grid: tuple[int, int], factors: tuple[int, ...], radius: int) -> Tensor:
    """Rows that the halo of every visible patch reads: (N*K, (p + 2 radius)^2) int64, row-major inside the halo.

    Row s + S * slot is position s of the visible patch ``slot``; N*K*S stands for "not visible": a row of zeros there
    makes the convolution exactly the masked one with zero padding.
    """
    N, K = visible_NK.shape
    _H, W = grid
    device = visible_NK.device
    side = math.prod(factors)
    reach = (side - 1 + radius) // side  # patches the halo reaches into, on either side
    places = block_places(factors, device)

    halo = torch.arange(-radius, side + radius, device=device)
    patch_offset = torch.div(halo, side, rounding_mode="floor")
    inside = halo - patch_offset * side
    position_hw = places[inside[:, None] * side + inside]
    rows = (visible_NK // W)[:, :, None] + patch_offset + reach
    columns = (visible_NK % W)[:, :, None] + patch_offset + reach
    place = rows[:, :, :, None] * (W + 2 * reach) + columns[:, :, None, :]
    slot = slot_table(visible_NK, grid, reach).gather(1, place.flatten(1)).reshape(N * K, position_hw.numel())
    return torch.where(slot < 0, N * K * side * side, slot * (side * side) + position_hw.flatten())
