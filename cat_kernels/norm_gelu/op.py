"""`layer_norm_gelu`: LayerNorm, GELU, residual. Formula: README.md; oracle: reference.py.

Shapes: D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _norm as norm
from .._library import register
from .._ops import ops
from ..backends import resolve

OPERATOR = "layer_norm_gelu"


def layer_norm_gelu(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    low_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """residual + GELU(LayerNorm(x)), over the last dimension: y, and y once more for the product that follows.

    x: (..., D); what a channels-last convolution gives, with its channels moved to the end, is read as it lies.
    residual: of x's shape, or None. weight, bias: (D,), or None.
    low_dtype: torch.bfloat16 or torch.float16: y is float32 (float64), so that the residual is not rounded in every
        block, and a second result is y rounded to this dtype. None: y, in the wider of the inputs' dtypes, is both.
    Returns (y, low), of x's shape. GELU is the exact one, by the error function.

    Differentiable in x, residual, weight and bias. Triton reads inputs as they are, under autocast too. "torch" is
    PyTorch's own operations, with all that autocast, compilers and exporters make of them. Raises TypeError or
    ValueError.
    """
    norm.check_rows(OPERATOR, "x", x)
    if residual is not None:
        norm.check_alike(OPERATOR, "residual", residual, "x", x)
    norm.check_affine(OPERATOR, x, weight, bias, eps, low_dtype)
    if resolve(OPERATOR, backend, x.device.type) == "torch":
        y, low = _in_torch(x, residual, weight, bias, eps, low_dtype)
    else:
        y, low = ops.layer_norm_gelu(x, residual, weight, bias, eps, low_dtype, backend=backend)
    return y, y if low_dtype is None else low


# --- forward ----------------------------------------------------------------------------------------------------------


def _in_torch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    low_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if low_dtype is not None:
        x = x.to(norm.result_dtype([x], low_dtype))
    y = F.gelu(norm.layer_norm(x, weight, bias, eps))
    y = y if residual is None else residual + y
    return y, norm.lowered(y, low_dtype)


def _forward_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    low_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    from . import kernels

    y, low = _fake(x, residual, weight, bias, eps, low_dtype)
    kernels.forward(x, residual, weight, bias, eps, y, low if low_dtype else None)
    return y, low


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    low_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return norm.new_results(x, norm.result_dtype([x, residual], low_dtype), low_dtype)


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward_in_torch(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sums: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = norm.sums_dtype(*(t for t in (grad, grad_low, x) if t is not None))
    total, wide = norm.total_gradient((grad, grad_low), dtype), x.to(dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    dh = torch.ops.aten.gelu_backward(total, norm.layer_norm(wide, weight, bias, eps))
    dx, found = norm.layer_norm_backward(dh, wide, weight, bias, eps, sums)
    dresidual = total.to(residual_dtype, copy=True) if residual_dtype else total.new_empty(0)
    return dx.to(x.dtype), dresidual, found


def _backward_triton(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sums: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernels

    dx, dresidual, _ = _backward_fake(grad, grad_low, x, weight, bias, eps, False, residual_dtype)
    found = kernels.backward(grad, grad_low, x, weight, bias, eps, dx, dresidual if residual_dtype else None, sums)
    return dx, dresidual, found


def _backward_fake(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sums: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = norm.sums_dtype(*(t for t in (grad, grad_low, x) if t is not None))
    dresidual = x.new_empty(x.shape if residual_dtype else (0,), dtype=residual_dtype or dtype)
    return x.new_empty(x.shape), dresidual, x.new_empty((2, x.shape[-1]) if sums else (0,), dtype=dtype)


# Gradient of x; of the residual, where `residual_dtype` asks for it; sums for weight and bias.
_backward_op = register(
    OPERATOR,
    "layer_norm_gelu_backward(Tensor? grad, Tensor? grad_low, Tensor x, Tensor? weight, Tensor? bias, float eps, "
    'bool sums, ScalarType? residual_dtype, *, str backend="auto") -> (Tensor, Tensor, Tensor)',
    {"triton": _backward_triton, "torch": _backward_in_torch},
    refuses={"triton": norm.why_not_triton},
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.eps, low_dtype = inputs
    ctx.set_materialize_grads(False)  # no zeros for a result that is not used
    if low_dtype is None:
        ctx.mark_non_differentiable(output[1])
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor | None, grad_low: Tensor | None) -> tuple[Tensor | None, ...]:
    given = [g for g in (grad, grad_low) if g is not None]
    if not given:
        return (None,) * 6
    x, weight, bias = ctx.saved_tensors
    for_x, for_residual, for_weight, for_bias = ctx.needs_input_grad[:4]
    # The sum of two gradients is the kernel's to write; a single one is the residual's already.
    wanted = ctx.residual_dtype if for_residual and len(given) == 2 else None
    found: tuple[Any, ...] = (None, None, None)
    if for_x or for_weight or for_bias or wanted:
        arguments = (grad, grad_low, x, weight, bias, ctx.eps, for_weight or for_bias, wanted)
        found = _backward_op(*arguments, backend=ctx.backend)
    dx, dresidual, sums = found
    if for_residual and not wanted:
        dresidual = given[0].to(ctx.residual_dtype)
    return (
        dx if for_x else None,
        dresidual if for_residual else None,
        sums[0].to(weight.dtype) if for_weight else None,
        sums[1].to(bias.dtype) if for_bias else None,
        None,
        None,
    )


register(
    OPERATOR,
    "layer_norm_gelu(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, ScalarType? low_dtype, *, "
    'str backend="auto") -> (Tensor, Tensor)',
    {"triton": _forward_triton, "torch": _in_torch},
    refuses={"triton": norm.why_not_triton},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    composite=_in_torch,
)
