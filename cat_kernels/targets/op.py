"""`average_targets`: the teacher's targets, block by block or at once. Formula: README.md; oracle: reference.py.

Shapes: B clips, L patches, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._library import register
from .._ops import ops
from .reference import average_targets_reference

OPERATOR = "average_targets"


def average_targets(
    layers: Sequence[Tensor],
    *,
    partial: Tensor | None = None,
    num_layers: int | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Sum of instance-normed block outputs; with `num_layers`, their average, layer-normed: the regression targets.

    layers: block outputs (B, L, D), any floating dtype and strides (views with the CLS row cut off, as they come). May
        be empty when `partial` is given.
    partial: (B, L, D) running sum of an earlier call, float32 (float64); it is not changed.
    num_layers: None returns the running sum. A number, the count of all blocks that went in, divides the sum by it and
        layer-norms over D: give it with the last block.
    eps: of both norms.
    Returns (B, L, D) float32; float64 when any input is float64.

    Source: arXiv 2601.21612, teacher targets. Differentiable in layers and partial. Raises TypeError or ValueError.
    """
    if isinstance(layers, Tensor):
        raise TypeError(f"{OPERATOR}: layers must be a list of tensors (B, L, D), got one tensor; wrap it: [tensor]")
    layers = list(layers)
    named = [(f"layers[{i}]", layer) for i, layer in enumerate(layers)]
    if partial is not None:
        named.append(("partial", partial))
    if not named:
        raise ValueError(f"{OPERATOR}: layers is empty and partial is None; give at least one block's output")
    first_name, first = named[0]
    for name, tensor in named:
        check.check_tensor(OPERATOR, name, tensor, "(B, L, D)")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{OPERATOR}: {name} has shape {tuple(tensor.shape)} and {first_name} {tuple(first.shape)}; "
                "all blocks must agree"
            )
        check.check_device(OPERATOR, name, tensor, first_name, first)
    if partial is not None and partial.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{OPERATOR}: partial must be the float32 or float64 sum of an earlier call, got {partial.dtype}; "
            "a running sum in low precision loses the blocks"
        )
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"{OPERATOR}: num_layers={num_layers} must be the number of blocks in the sum, at least 1")
    if not eps > 0:
        raise ValueError(f"{OPERATOR}: eps={eps} must be positive")
    return ops.average_targets(layers, partial, num_layers, eps, backend=backend)


def _accumulator(layers: Sequence[Tensor], partial: Tensor | None) -> torch.dtype:
    tensors = [*layers] if partial is None else [*layers, partial]
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _instance_norm_parts(x_BLD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x - mean over L (a new tensor) and the inverse deviation (B, 1, D)."""
    # Two passes rather than var_mean: over a dimension that is not the last, that is several times slower on the CPU.
    centred = x_BLD - x_BLD.mean(1, keepdim=True)
    return centred, torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)


def _sum(layers: Sequence[Tensor], partial: Tensor | None, eps: float) -> Tensor:
    dtype = _accumulator(layers, partial)
    template = layers[0] if partial is None else partial
    total_BLD = torch.empty(template.shape, dtype=dtype, device=template.device)
    if partial is None:
        total_BLD.zero_()
    else:
        total_BLD.copy_(partial)
    # An empty batch has no statistics; PyTorch would warn about them.
    for layer in layers if total_BLD.numel() else ():
        centred, inverse_deviation = _instance_norm_parts(layer.to(dtype), eps)
        total_BLD.addcmul_(centred, inverse_deviation)
    return total_BLD


def _forward(layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float) -> Tensor:
    total_BLD = _sum(layers, partial, eps)
    if num_layers is None:
        return total_BLD
    return F.layer_norm(total_BLD.div_(num_layers), total_BLD.shape[-1:], eps=eps)


def _forward_triton(layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float) -> Tensor:
    from . import kernels

    out = _fake(layers, partial, num_layers, eps)
    kernels.forward(layers, partial, num_layers, eps, out)
    return out


def _composite(layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float) -> Tensor:
    return average_targets_reference(layers, partial=partial, num_layers=num_layers, eps=eps)


def _why_not_triton(layers: Sequence[Tensor], partial: Tensor | None, *_: Any) -> str | None:
    return "float64 input" if _accumulator(layers, partial) == torch.float64 else None


def _fake(layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float) -> Tensor:
    template = layers[0] if partial is None else partial
    return template.new_empty(template.shape, dtype=_accumulator(layers, partial))


def _backward_impl(
    grad: Tensor, layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the sum (new, contiguous), and of every layer in its dtype."""
    if grad.numel() == 0:
        return _backward_fake(grad, layers, partial, num_layers, eps)
    if num_layers is None:
        grad_sum = grad.clone(memory_format=torch.contiguous_format)
    else:
        mean_BLD = _sum(layers, partial, eps).div_(num_layers)
        variance, mean = torch.var_mean(mean_BLD, dim=2, correction=0, keepdim=True)
        inverse_deviation = torch.rsqrt(variance + eps)
        normed = mean_BLD.sub_(mean).mul_(inverse_deviation)
        grad_sum = grad - grad.mean(2, keepdim=True) - normed * (grad * normed).mean(2, keepdim=True)
        grad_sum = grad_sum.mul_(inverse_deviation / num_layers).contiguous()
    grads = []
    for layer in layers:
        centred, inverse_deviation = _instance_norm_parts(layer.to(grad_sum.dtype), eps)
        normed = centred.mul_(inverse_deviation)
        grad_BLD = grad_sum - grad_sum.mean(1, keepdim=True) - normed * (grad_sum * normed).mean(1, keepdim=True)
        grads.append(grad_BLD.mul_(inverse_deviation).to(layer.dtype, memory_format=torch.contiguous_format))
    return grad_sum, grads


def _backward_fake(
    grad: Tensor, layers: Sequence[Tensor], partial: Tensor | None, num_layers: int | None, eps: float
) -> tuple[Tensor, list[Tensor]]:
    return grad.new_empty(grad.shape), [layer.new_empty(layer.shape) for layer in layers]


_backward_op = register(
    OPERATOR,
    "average_targets_backward(Tensor grad, Tensor[] layers, Tensor? partial, SymInt? num_layers, float eps, *, "
    'str backend="auto") -> (Tensor, Tensor[])',
    # The teacher is not differentiated: there are no kernels for it.
    {"triton": _backward_impl, "torch": _backward_impl},
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    layers, partial, ctx.num_layers, ctx.eps = inputs
    ctx.has_partial = partial is not None
    ctx.save_for_backward(*layers, *([partial] if ctx.has_partial else []))


def _backward(ctx: Any, grad_BLD: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    layers, partial = (saved[:-1], saved[-1]) if ctx.has_partial else (saved, None)
    grad_sum, grads = _backward_op(grad_BLD, list(layers), partial, ctx.num_layers, ctx.eps, backend=ctx.backend)
    grad_partial = None if partial is None else grad_sum.to(partial.dtype)
    return grads, grad_partial, None, None


# No defaults in this schema: PyTorch drops arguments that equal theirs, and its autograd for lists of tensors then
# expects as many gradients as arguments were left.
register(
    OPERATOR,
    'average_targets(Tensor[] layers, Tensor? partial, SymInt? num_layers, float eps, *, str backend="auto") -> Tensor',
    {"triton": _forward_triton, "torch": _forward},
    fake=_fake,
    refuses={"triton": _why_not_triton},
    setup_context=_save,
    backward=_backward,
    composite=_composite,
)
