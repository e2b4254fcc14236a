"""The multi-resolution convolution stem as its formula reads, on every position of every clone: the oracle.

Source: arXiv 2601.21612 (multi-resolution block) and the code its authors released.

Shapes: B clips, M masks a clip, N = B * M, T frames, F mel bins, P patch, H x W = T/P x F/P patches, L = H * W,
K visible patches, c channels of a stage, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import ConvBlock, StemWeights


def layer_norm_2d(x_NCHW: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of every position."""
    return norm(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv1x1(x_NCHW: Tensor, linear: torch.nn.Linear) -> Tensor:
    return F.conv2d(x_NCHW, linear.weight[:, :, None, None], linear.bias)


def conv_block(block: ConvBlock, x_NCHW: Tensor, m_N1HW: Tensor | None) -> Tensor:
    """x + W2 . DW(m * (W1 . LN1(x) + b1)) + b2, then x + fc2(GELU(fc1(LN2(x))))."""
    y = conv1x1(layer_norm_2d(x_NCHW, block.norm1), block.conv1)
    if m_N1HW is not None:
        y = y * m_N1HW
    x = x_NCHW + conv1x1(block.dwconv(y), block.conv2)
    hidden = F.gelu(conv1x1(layer_norm_2d(x, block.norm2), block.fc1))
    return x + conv1x1(hidden, block.fc2)


def multires_conv_dense(stem: StemWeights, spec_BCTF: Tensor, visible_NK: Tensor | None = None) -> Tensor:
    """The stem over all positions; with ``visible``, of every clone, and only then the visible patches are read.

    Returns (B, L, D), or (N, K, D) with ``visible`` (N, K).
    """
    B, _, T, n_mels = spec_BCTF.shape
    P = stem.patch_size
    H, W = T // P, n_mels // P
    visible_mask = None
    if visible_NK is not None:
        N, K = visible_NK.shape
        spec_BCTF = spec_BCTF.repeat_interleave(N // max(B, 1), dim=0)
        visible_mask = torch.zeros(N, H * W, dtype=spec_BCTF.dtype, device=spec_BCTF.device)
        visible_mask = visible_mask.scatter(1, visible_NK, 1.0).reshape(N, 1, H, W)

    x, tokens = spec_BCTF, None
    for (embed, blocks, side), r in zip(stem.levels(), stem.resolutions, strict=True):
        x = layer_norm_2d(embed.proj(x), embed.norm)
        if side is None:
            break
        m = None
        if visible_mask is not None:
            m = visible_mask.repeat_interleave(P // r, dim=2).repeat_interleave(P // r, dim=3)
        for block in blocks:
            x = conv_block(block, x, m)
        tokens = side(x) if tokens is None else tokens + side(x)

    last = stem.proj(x.flatten(2).transpose(1, 2))
    tokens_BLD = last if tokens is None else last + tokens.flatten(2).transpose(1, 2)
    if visible_NK is None:
        return tokens_BLD
    return tokens_BLD.gather(1, visible_NK[:, :, None].expand(N, K, tokens_BLD.shape[-1]))
