"""The operators of the fused stem (`fused.py`), composed of PyTorch's: what `torch.func` and forward mode go through.

Shapes: N clone rows, K visible patches each, S positions in a patch of a stage, R = N * K * S rows, c channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import patchify
from .visible import masked_depthwise


def embed_pixels(
    spec: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    resolutions: Sequence[int],
    eps: float,
) -> Tensor:
    pixels_BLSC = patchify(spec, tuple(resolutions))
    clip_N = torch.arange(visible.shape[0], device=spec.device) // (visible.shape[0] // max(spec.shape[0], 1) or 1)
    rows = pixels_BLSC[clip_N[:, None], visible].flatten(0, -2)
    return layer_norm(linear(rows, weight, bias), ln_weight, ln_bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return wide.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def conv_block(
    x: Tensor, halo: Tensor, places: Tensor, weights: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n1w, n1b, c1w, c1b, taps, taps_bias, c2w, c2b, n2w, n2b, f1w, f1b, f2w, f2b = weights
    kernel = round(taps.shape[1] ** 0.5)
    taps = taps.unflatten(1, (1, kernel, kernel)).to(x.dtype)
    halo = torch.where(halo < 0, x.shape[0], halo.long())
    y = linear(layer_norm(x, n1w, n1b, eps), c1w, c1b)
    middle = x + linear(masked_depthwise(y, taps, taps_bias.to(x.dtype), halo, places.long().argsort()), c2w, c2b)
    out = middle + linear(F.gelu(linear(layer_norm(middle, n2w, n2b, eps), f1w, f1b)), f2w, f2b)
    nothing = x.new_empty(0, x.shape[1])  # `keep` is for the operator's own backward
    return out, nothing, nothing.clone()
