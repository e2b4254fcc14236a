"""FLOPs of one operation: products, convolutions and attention, two a multiply-add.

By the formulas of `cat.training.flops`, and by its own for what is one operation on a GPU and many elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from cat.training.flops import FORMULAS
from cat_kernels._ops import ops

aten = torch.ops.aten


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Of one call of an operator (`torch._ops.OpOverload`), by the shapes of its tensors."""
    packet = func._overloadpacket
    if packet in WHOLE:
        return int(WHOLE[packet](*args))
    formula = shape_wrapper(FORMULAS[packet]) if packet in FORMULAS else flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _embed_pixels(spec: Tensor, visible_NK: Tensor, weight: Tensor, *arguments: Any) -> int:
    resolutions = arguments[3]
    return 2 * visible_NK.numel() * (resolutions[-1] // resolutions[0]) ** 2 * weight.numel()


def _embed_pixels_backward(grad_Rc: Tensor, spec: Tensor, visible: Tensor, weight: Tensor, *arguments: Any) -> int:
    """Of the weight, and of the spectrogram where that is asked for."""
    return 2 * grad_Rc.shape[0] * weight.numel() * (1 + bool(arguments[-1]))


def _conv_block(x_Rc: Tensor, halo: Tensor, places: Tensor, weights: list[Tensor], *_: Any) -> int:
    """1x1, depthwise, 1x1, and an MLP of two layers: every weight of them meets every row."""
    return 2 * x_Rc.shape[0] * sum(weight.numel() for weight in weights if weight.ndim == 2)


def _conv_block_backward(grad_Rc: Tensor, *arguments: Any) -> int:
    """Twice the forward, the MLP's first layer again and, where nothing was kept, what is in front of it."""
    weights, keep = arguments[5], arguments[7]
    _, _, conv1, _, taps, _, conv2, *_ = weights
    again = [weights[10], *(() if keep else (conv1, taps, conv2))]
    forward = _conv_block(grad_Rc, grad_Rc, grad_Rc, weights)
    return 2 * forward + 2 * grad_Rc.shape[0] * sum(weight.numel() for weight in again)


def _add_product(total: Tensor | None, x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * x.shape[0] * weight.numel()


def _add_product_backward(grad: Tensor, x: Tensor, weight: Tensor, *wanted: bool) -> int:
    return _add_product(None, x, weight) * sum(wanted[:2])


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


WHOLE: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    ops.stem_embed_pixels: _embed_pixels,
    ops.stem_embed_pixels_backward: _embed_pixels_backward,
    ops.stem_conv_block: _conv_block,
    ops.stem_conv_block_backward: _conv_block_backward,
    ops.stem_add_product: _add_product,
    ops.stem_add_product_backward: _add_product_backward,
}
