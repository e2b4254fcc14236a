"""The depthwise convolution in training without Triton, with gradients of our own: PyTorch's of the taps are slow on a
CPU, in bf16 three to four times as slow as in fp32, and of many small patches on a GPU: on an H100 that of 39,168
patches of 4 x 4 with 256 channels did not end within 40 s. (How long this one takes there is not measured yet.)

The gradient of the taps is summed tap by tap, products of rows and shifted gradients, in float32 and unrounded. That of
the input is the convolution of the gradients with the taps reversed: whoever reads a row is read by it. The backward
keeps the rows, not the windows that they are copied into, four to nine times as large.

Forward and backward in turn with PyTorch's gradients, on one core:

    patches of positions, channels  400 of 4x4, 48  400 of 2x2, 96  200 of 4x4, 128  408 of 4x4, 256  408 of 2x2, 384
    fp32                                     1.15x           1.50x            1.36x            1.73x            1.53x
    bf16                                     2.64x           4.60x            3.37x            3.18x            5.44x

    whole grids, channels           4 of 64x32, 48  4 of 32x16, 96  2 of 256x32, 256  2 of 128x16, 384
    fp32                                     1.11x           1.07x             1.92x             1.45x
    bf16                                     2.18x           1.92x             4.74x             4.99x

So it is taken for every shape. (The gradient as a convolution that has patches for channels and rows for taps is up to
1.15x faster still, but where PyTorch has no oneDNN it would go channel by channel.)

Shapes: c channels, k x k taps; pieces of m times h x w positions.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._eager import records_gradients

# (x, taps (c, 1, k, k), bias (c,) or None) -> the convolution of x, in its layout and dtype
Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# (x, gradients of the result, k) -> pieces: x (m, h, w, c), and gradients around it (m, h + k - 1, w + k - 1, c)
Pieces = Callable[[Tensor, Tensor, int], Iterable[tuple[Tensor, Tensor]]]

# Elements of a piece for each thread, 1 MiB in float32: its gradients stay in the cache. At each shape above within a
# twentieth of the fastest of 2^15 to 2^18. On a GPU 256 MiB: few launches.
PIECE_ELEMENTS = 1 << 18
GPU_ELEMENTS = 1 << 26


def convolved(x: Tensor, taps: Tensor, bias: Tensor | None, convolve: Convolve, pieces: Pieces) -> Tensor:
    """``convolve(x, taps, bias)``, in training with gradients of our own.

    Compiled, exported and transformed (`torch.func`, forward mode) it is ``convolve`` itself.
    """
    device = x.device.type
    if device not in ("cpu", "cuda") or not records_gradients():
        return convolve(x, taps, bias)
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return _Depthwise.apply(x, taps, bias, convolve, pieces)


def piece_size(elements: int, device: torch.device) -> int:
    """How many things of so many elements make a piece."""
    whole = PIECE_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else GPU_ELEMENTS
    return max(1, whole // max(1, elements))


class _Depthwise(torch.autograd.Function):
    """Its backward is made of PyTorch's operations, so that it has derivatives itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, convolve: Convolve, pieces: Pieces) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.convolve, ctx.pieces = convolve, pieces
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x, taps.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        need_x, need_taps, need_bias = ctx.needs_input_grad[:3]
        dx = dtaps = dbias = None
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                dx = ctx.convolve(grad, taps.to(grad.dtype).flip(2, 3), None)
            if need_taps:
                dtaps = _tap_sums(ctx.pieces(x, grad.to(wide), taps.shape[2]), taps.to(wide)).to(taps.dtype)
            if need_bias:
                dbias = grad.flatten(0, -2).sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, dtaps, dbias, None, None


def _tap_sums(pieces: Iterable[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """The gradient of the taps, in the shape and dtype of ``like`` (c, 1, k, k)."""
    k = like.shape[2]
    total = like.new_zeros(k * k, like.shape[0])
    for x_mhwc, around in pieces:
        x_mhwc, (h, w) = x_mhwc.to(like.dtype), x_mhwc.shape[1:3]
        sums = [(x_mhwc * around[:, u : u + h, v : v + w]).sum((0, 1, 2)) for u in range(k) for v in range(k)]
        total = total + torch.stack(sums)
    return total.flip(0).t().reshape(like.shape)  # what a position reads with tap u, v lies the other way round
