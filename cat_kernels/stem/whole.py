"""The stem on whole spectrograms, where every patch is visible: the formula on rows, one a position, row-major.

No table of neighbours is needed, and no layout changes: channels are last everywhere, so that a 1x1 convolution is one
matrix product and LayerNorm reads what lies together.

Measured on two cores, in turn with the formula (`reference.py`), without gradients: tiny 1.20x (16 clips) and 1.08x
(one), small 1.29x, base 1.20x (4 clips), but 0.87x to 0.97x for a single clip of ten seconds.

Shapes: B clips, T frames, F mel bins, H x W positions of a stage, R = B * H * W rows, c channels, D embedding width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import strides
from .taps import convolved, piece_size
from .visible import conv_block, patch_linear
from .weights import ConvBlock, StemWeights


def multires_conv_whole(stem: StemWeights, spec_BCTF: Tensor) -> Tensor:
    """Tokens of all patches, (B, L, D)."""
    factors = strides(stem.resolutions)
    x_BHWc, tokens = spec_BCTF.permute(0, 2, 3, 1), None
    for i, (embed, blocks, side) in enumerate(stem.levels()):
        x_BHWc = embed.norm(_patch_embed(x_BHWc, embed.proj, factors[i]))
        if side is None:
            break
        for block in blocks:
            x_BHWc = _conv_block(block, x_BHWc)
        side_tokens = _patch_embed(x_BHWc, side, stem.patch_size // stem.resolutions[i])
        tokens = side_tokens if tokens is None else tokens + side_tokens
    last = stem.proj(x_BHWc)
    return (last if tokens is None else last + tokens).flatten(1, 2)


def _patch_embed(x_BHWc: Tensor, conv: torch.nn.Conv2d, k: int) -> Tensor:
    """A convolution with kernel = stride = k: (B, H/k, W/k, c_out)."""
    B, H, W, _ = x_BHWc.shape
    patches = x_BHWc.unflatten(2, (W // k, k)).unflatten(1, (H // k, k)).transpose(2, 3).flatten(3)
    return patch_linear(patches, conv, (k,)).unflatten(0, (B, H // k, W // k))


def _conv_block(block: ConvBlock, x_BHWc: Tensor) -> Tensor:
    dwconv, grid = block.dwconv, x_BHWc.shape[:3]

    def depthwise(y: Tensor) -> Tensor:
        return convolved(y.unflatten(0, grid), dwconv.weight, dwconv.bias, _convolve, _pieces).flatten(0, 2)

    return conv_block(block, x_BHWc.flatten(0, 2), depthwise).unflatten(0, grid)


def _convolve(x_BHWc: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    c, _, kernel, _ = taps.shape
    return F.conv2d(x_BHWc.permute(0, 3, 1, 2), taps, bias, padding=kernel // 2, groups=c).permute(0, 2, 3, 1)


def _pieces(x_BHWc: Tensor, grad_BHWc: Tensor, kernel: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For the gradient of the taps (`taps.Pieces`): lines of one clip, and the gradients around them."""
    _, H, W, c = x_BHWc.shape
    radius, lines = kernel // 2, piece_size(W * c, x_BHWc.device)
    for x_1HWc, grad_1HWc in zip(x_BHWc.split(1), grad_BHWc.split(1), strict=True):
        around = F.pad(grad_1HWc, (0, 0, radius, radius, radius, radius))
        for first in range(0, H, lines):
            x = x_1HWc[:, first : first + lines]
            yield x, around[:, first : first + x.shape[1] + 2 * radius]
