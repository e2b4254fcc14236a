"""`LayerNorm`, whose gradients are as exact on a CPU as on a GPU.

PyTorch's CPU kernel sums the gradients of weight and bias in the dtype of the rows. In bfloat16, whatever the weights
are in, such a sum soon stands still: of 400 random rows of 256 the largest error is 4 % of the largest gradient, of
4,000 rows 13 %, of 40,000 a third (one thread; torch 2.13). Summed in float32, as below, it is 2e-7. Under autocast the
rows behind every product are in low precision.

Forward and backward take 1.5 to 2 times as long as PyTorch's (bf16, 1,600 to 26,000 rows of 48 to 768, one core).

Shapes: R rows, of any shape that is normalised over.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._eager import records_gradients
from .._norm import LOW

# Elements of a piece for each thread, whose products in float32 stay in the cache. Of 2^15 to 2^18 the fastest.
PIECE_ELEMENTS = 1 << 17


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`: the same arguments, state dict and results. Only in training on a CPU, of bfloat16 and
    float16 rows, are the gradients of weight and bias others: summed in float32 and rounded once, where PyTorch rounds
    at every row. (Derivatives of these gradients, `create_graph=True`, are PyTorch's, and so are the gradients then.)
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and input.dtype in LOW and self.elementwise_affine and records_gradients():
            result: Tensor = _SummedWide.apply(input, self.normalized_shape, self.weight, self.bias, self.eps)
            return result
        return super().forward(input)


class _SummedWide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, *_wide(weight, bias), eps)  # mean and rstd are float32 too
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, *parameters = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad[:4]
        own = any(need) and not torch.is_grad_enabled()
        outputs = (need_x, *(not own and needed for needed in need))
        arguments = (grad.contiguous(), x, ctx.shape, mean, rstd, *_wide(*parameters), outputs)
        dx, *sums = torch.ops.aten.native_layer_norm_backward(*arguments)
        if own:
            sums = _sums(grad, x, mean, rstd, ctx.shape)
        dweight, dbias = (s.to(p.dtype) if n else None for s, p, n in zip(sums, parameters, need, strict=True))
        return dx, None, dweight, dbias, None


def _wide(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.float(), None if bias is None else bias.float()


def _sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Gradients of weight and bias, in float32."""
    ones = (1,) * len(shape)
    rows = max(1, PIECE_ELEMENTS * torch.get_num_threads() // max(1, math.prod(shape)))
    pieces = (t.reshape(-1, *s).split(rows) for t, s in ((grad, shape), (x, shape), (mean, ones), (rstd, ones)))
    dweight, dbias = torch.zeros(shape), torch.zeros(shape)
    for grad_R, x_R, mean_R, rstd_R in zip(*pieces, strict=True):
        wide = grad_R.float()
        dbias += wide.sum(0)
        dweight += (x_R - mean_R).mul_(rstd_R).mul_(wide).sum(0)
    return [dweight, dbias]
