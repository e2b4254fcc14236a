"""The stem on the visible patches alone: the same tokens and gradients as the dense formula, at a fifth of the work.

Every operation of the stem but one acts on a single position or inside one patch. The one exception, the depthwise
convolution, reads neighbours, and there the mask has zeroed the invisible ones. So only rows of visible patches are
ever made; the depthwise convolution finds its neighbours through a table (`layout.halo_rows`).

Shapes: N = B * M clone rows, K visible patches each, S positions (p x p) in a patch of a stage, c channels.
``rows`` are (N*K*S, c), positions in block order (`layout.block_order`).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import block_order, halo_rows, in_block_order, patchify, strides
from .taps import convolved, piece_size
from .weights import ConvBlock, StemWeights

# Rows that a CPU takes at a time where nothing but the row is read: what is made on the way, a hidden layer four times
# as wide, stays in its cache. Measured on two cores, in turn with all rows at once, visible rows of 2 to 16 clips with
# gradients: tiny 1.04x, small 1.10x, base 1.07x.
PIECE = 1024


def patch_weight(conv: torch.nn.Conv2d, factors: tuple[int, ...]) -> Tensor:
    """Weights of a convolution with kernel = stride = prod(factors) as the matrix (D, S * c) that rows of S positions
    in block order are multiplied with."""
    positions = in_block_order(conv.weight.flatten(2).flatten(0, 1), factors).unflatten(0, conv.weight.shape[:2])
    return positions.movedim(1, -1).flatten(1)


def patch_linear(rows: Tensor, conv: torch.nn.Conv2d, factors: tuple[int, ...]) -> Tensor:
    """A convolution with kernel = stride = prod(factors) on rows in block order: one matrix product."""
    weight = patch_weight(conv, factors)
    return F.linear(rows.reshape(rows.numel() // weight.shape[1], weight.shape[1]), weight, conv.bias)


def masked_depthwise(rows: Tensor, taps: Tensor, bias: Tensor | None, halo: Tensor, order: Tensor) -> Tensor:
    """Depthwise convolution of the visible rows, everything else being zero.

    rows (R, c); taps (c, 1, kernel, kernel); halo (patches, (p + 2 radius)^2) row numbers, R for "zero"; order:
    `block_order` of the patch.
    """
    out = F.conv2d(_windows(_with_zero(rows), halo).permute(0, 3, 1, 2), taps, bias, groups=rows.shape[1])
    return out.permute(0, 2, 3, 1).flatten(1, 2)[:, order].flatten(0, 1)


def _with_zero(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, 1))


def _windows(rows: Tensor, halo: Tensor) -> Tensor:
    """Rows and the one of zeros behind them -> (patches, p + 2 radius, p + 2 radius, c)."""
    side = round(halo.shape[1] ** 0.5)
    return rows.index_select(0, halo.flatten()).unflatten(0, (halo.shape[0], side, side))


def _pieces(rows: Tensor, grad: Tensor, kernel: int, halo: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For the gradient of the taps (`taps.Pieces`): patches, and the gradients in their halos."""
    patches, side = halo.shape[0], round(halo.shape[1] ** 0.5) - kernel + 1
    rows_nSc, grad, places = rows.unflatten(0, (patches, side * side)), _with_zero(grad), order.argsort()
    size = piece_size(side * side * rows.shape[1], rows.device)
    for some, around in zip(rows_nSc.split(size), halo.split(size), strict=True):
        yield some[:, places].unflatten(1, (side, side)), _windows(grad, around)


def _depthwise(block: ConvBlock, rows: Tensor, halo: Tensor, order: Tensor) -> Tensor:
    convolve = partial(masked_depthwise, halo=halo, order=order)
    return convolved(rows, block.dwconv.weight, block.dwconv.bias, convolve, partial(_pieces, halo=halo, order=order))


def conv_block(block: ConvBlock, x: Tensor, depthwise: Callable[[Tensor], Tensor]) -> Tensor:
    """x + W2 . DW(m * (W1 . LN1(x) + b1)) + b2, then x + fc2(GELU(fc1(LN2(x)))), on rows; ``depthwise`` is DW."""
    y = depthwise(block.conv1(block.norm1(x)))

    def rest(x: Tensor, y: Tensor) -> Tensor:
        x = x + block.conv2(y)
        return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))

    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rest(x, y)
    return torch.cat([rest(*piece) for piece in zip(x.split(PIECE), y.split(PIECE), strict=True)])


def multires_conv_visible(stem: StemWeights, spec_BCTF: Tensor, visible_NK: Tensor) -> Tensor:
    """The stem on visible patches only. Returns (N, K, D)."""
    B, _, T, n_mels = spec_BCTF.shape
    P, (N, K) = stem.patch_size, visible_NK.shape
    H, W = T // P, n_mels // P
    clip = torch.arange(N, device=spec_BCTF.device) // (N // max(B, 1))
    x = patchify(spec_BCTF, stem.resolutions)[clip[:, None], visible_NK].flatten(0, -2)

    factors = strides(stem.resolutions)
    tokens = None
    for i, (embed, blocks, side) in enumerate(stem.levels()):
        x = embed.norm(patch_linear(x, embed.proj, (factors[i],)))
        if side is None:
            break
        coarser = factors[:i:-1]  # k_{n-1} .. k_{i+1}
        halo = halo_rows(visible_NK, (H, W), coarser, stem.kernel_size // 2)
        order = block_order(coarser, x.device)
        for block in blocks:
            x = conv_block(block, x, partial(_depthwise, block, halo=halo, order=order))
        side_tokens = patch_linear(x, side, coarser)
        tokens = side_tokens if tokens is None else tokens + side_tokens
    last = stem.proj(x)
    return (last if tokens is None else last + tokens).unflatten(0, (N, K))
