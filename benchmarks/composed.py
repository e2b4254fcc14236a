"""What the stem's kernels compute, by PyTorch's operations: what `benchmarks.kernels` compares them with.

Arguments are those of the kernels' own functions (`cat_kernels.stem.kernels`), all in one floating-point dtype.

Shapes: R rows, c channels, p x p positions a patch, side = p + 4 cells of its halo.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_kernels.stem.layout import patchify

EPS = 1e-5  # of every LayerNorm
aten = torch.ops.aten


def embed_pixels(
    spec: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, resolutions: Any
) -> Tensor:
    pre = F.linear(_pixels(spec, visible, resolutions), weight, bias)
    return layer_norm(pre, ln_weight, ln_bias)


def embed_pixels_backward(
    grad: Tensor, spec: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, resolutions: Any
) -> tuple[Tensor, ...]:
    """dweight, dbias, dln_weight, dln_bias; the embedding is computed again."""
    pixels = _pixels(spec, visible, resolutions)
    dpre, dln_weight, dln_bias = _norm_backward(grad, F.linear(pixels, weight, bias), ln_weight)
    return weight_gradient(dpre, pixels), dpre.sum(0), dln_weight, dln_bias


def _pixels(spec: Tensor, visible: Tensor, resolutions: tuple[int, ...]) -> Tensor:
    """Pixels of the visible patches: (R, r0 * r0)."""
    N, B = visible.shape[0], spec.shape[0]
    clip = torch.arange(N, device=spec.device) // (N // B)
    return patchify(spec, resolutions)[clip[:, None], visible].flatten(0, -2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], weight, bias, EPS)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """dx with the residual's gradient added; sums over the rows: dweight, dbias, the residual's."""
    dx, dweight, dbias = _norm_backward(grad, x, weight)
    return dx + residual, torch.stack([dweight, dbias, residual.sum(0)])


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = list(x.shape[1:])
    _, mean, rstd = aten.native_layer_norm(x, c, weight, weight, EPS)
    return aten.native_layer_norm_backward(grad, x, c, mean, rstd, weight, weight, [True] * 3)


def norm_linear(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(layer_norm(x, ln_weight, ln_bias), weight, bias)


def conv_linear_residual(
    x: Tensor, y: Tensor, halo: Tensor, places: Tensor, taps: Tensor, taps_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return x + F.linear(depthwise(y, halo, places, taps, taps_bias), weight, bias)


def depthwise(y: Tensor, halo: Tensor, places: Tensor, taps: Tensor, taps_bias: Tensor | None) -> Tensor:
    kernel = _kernel(taps)
    out = F.conv2d(_windows(y, halo), kernel, taps_bias, groups=y.shape[1])
    return out.permute(0, 2, 3, 1).flatten(1, 2)[:, places.argsort()].flatten(0, 1)


def depthwise_transposed(grad: Tensor, halo: Tensor, places: Tensor, taps: Tensor) -> Tensor:
    return depthwise(grad, halo, places, taps.flip(1), None)


def depthwise_backward_weight(grad: Tensor, y: Tensor, halo: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    p = math.isqrt(places.numel())
    grid = grad.unflatten(0, (-1, p * p))[:, places].unflatten(1, (p, p)).permute(0, 3, 1, 2)
    windows = _windows(y, halo)
    taps = range(windows.shape[2] - p + 1)
    # Tap by tap: of so many small images `aten.convolution_backward` did not end within 40 s on an H100.
    sums = [(windows[..., u : u + p, v : v + p] * grid).sum((0, 2, 3)) for u in taps for v in taps]
    return torch.stack(sums, 1), grad.sum(0)


def _windows(y: Tensor, halo: Tensor) -> Tensor:
    """The halo of every patch, (patches, c, side, side) as a view of rows; -1 is a row of zeros."""
    side = math.isqrt(halo.shape[1])
    rows = F.pad(y, (0, 0, 1, 0)).index_select(0, halo.flatten() + 1)
    return rows.unflatten(0, (halo.shape[0], side, side)).permute(0, 3, 1, 2)


def _kernel(taps: Tensor) -> Tensor:
    side = math.isqrt(taps.shape[1])
    return taps.unflatten(1, (1, side, side))


def norm_mlp_residual(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor
) -> Tensor:
    return x + F.linear(F.gelu(norm_linear(x, ln_weight, ln_bias, fc1, b1)), fc2, b2)


def norm_mlp_backward(
    grad: Tensor, x: Tensor, ln_weight: Tensor, ln_bias: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor
) -> tuple[Tensor, ...]:
    """dx, dln_weight, dln_bias, dfc1, db1, dfc2, db2; the hidden layer is computed again."""
    xn = layer_norm(x, ln_weight, ln_bias)
    hidden, dpre, db1 = mlp_hidden(xn, grad, fc1, b1, fc2)
    dx, (dln_weight, dln_bias, db2) = layer_norm_backward(dpre @ fc1, x, ln_weight, grad)
    return dx, dln_weight, dln_bias, weight_gradient(dpre, xn), db1, weight_gradient(grad, hidden), db2


def mlp_hidden(xn: Tensor, grad: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gelu_backward(F.linear(xn, fc1, b1), grad @ fc2)


def gelu_backward(pre: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dpre = aten.gelu_backward(grad, pre)
    return F.gelu(pre), dpre, dpre.sum(0)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x, in float32 where the library can put that out."""
    if grad.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.t() @ x
