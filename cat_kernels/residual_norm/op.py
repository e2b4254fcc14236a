"""`residual_layer_norm`: x + branch, layer-normed. Formula: README.md; oracle: reference.py.

Shapes: D width.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _norm as norm
from .._library import register
from .._ops import ops
from ..backends import resolve

OPERATOR = "residual_layer_norm"


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    low_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm of the sum of a residual and what a transformer block's branch adds to it: y, and y once more for the
    product that follows.

    x, branch: (..., D), of one shape.
    weight, bias: (D,), or None.
    low_dtype: torch.bfloat16 or torch.float16: y is float32 (float64), so that the residual is not rounded from norm to
        norm, and a second result is y rounded to this dtype. None: y, in the wider of the inputs' dtypes, is both.
    Returns (y, low), of the inputs' shape.

    Differentiable in x, branch, weight and bias. Triton reads inputs as they are, under autocast too. "torch" is
    PyTorch's own operations, with all that autocast, compilers and exporters make of them. Raises TypeError or
    ValueError.
    """
    norm.check_rows(OPERATOR, "x", x)
    norm.check_alike(OPERATOR, "branch", branch, "x", x)
    norm.check_affine(OPERATOR, x, weight, bias, eps, low_dtype)
    if resolve(OPERATOR, backend, x.device.type) == "torch":
        y, low = _in_torch(x, branch, weight, bias, eps, low_dtype)
    else:
        y, low = ops.residual_layer_norm(x, branch, weight, bias, eps, low_dtype, backend=backend)
    return y, y if low_dtype is None else low


# --- forward ----------------------------------------------------------------------------------------------------------


def _in_torch(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, low_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    s = x + branch
    if low_dtype is not None:
        s = s.to(norm.result_dtype([x, branch], low_dtype))
    y = norm.layer_norm(s, weight, bias, eps)
    return y, norm.lowered(y, low_dtype)


def _forward_triton(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, low_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    from . import kernels

    y, low = _fake(x, branch, weight, bias, eps, low_dtype)
    kernels.forward(x, branch, weight, bias, eps, y, low if low_dtype else None)
    return y, low


def _fake(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, low_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    return norm.new_results(x, norm.result_dtype([x, branch], low_dtype), low_dtype)


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward_in_torch(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = norm.sums_dtype(x, branch)
    total = norm.total_gradient((grad, grad_low), dtype)
    ds, found = norm.layer_norm_backward(total, x.to(dtype) + branch.to(dtype), weight, None, eps, sums)
    dbranch = branch.new_empty(0) if x.dtype == branch.dtype else ds.to(branch.dtype)
    return ds.to(x.dtype), dbranch, found


def _backward_triton(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernels

    dx, dbranch, _ = _backward_fake(grad, grad_low, x, branch, weight, eps, False)
    apart = None if x.dtype == branch.dtype else dbranch
    found = kernels.backward(grad, grad_low, x, branch, weight, eps, dx, apart, sums)
    return dx, dbranch, found


def _backward_fake(
    grad: Tensor | None,
    grad_low: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = norm.sums_dtype(x, branch)
    dbranch = x.new_empty((0,) if x.dtype == branch.dtype else x.shape, dtype=branch.dtype)
    return x.new_empty(x.shape), dbranch, x.new_empty((2, x.shape[-1]) if sums else (0,), dtype=dtype)


# Gradient of x; of branch, where that is of another dtype, and empty where the two are one tensor; sums for weight and
# bias.
_backward_op = register(
    OPERATOR,
    "residual_layer_norm_backward(Tensor? grad, Tensor? grad_low, Tensor x, Tensor branch, Tensor? weight, float eps, "
    'bool sums, *, str backend="auto") -> (Tensor, Tensor, Tensor)',
    {"triton": _backward_triton, "torch": _backward_in_torch},
    refuses={"triton": norm.why_not_triton},
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, weight, bias, ctx.eps, low_dtype = inputs
    ctx.set_materialize_grads(False)  # no zeros for a result that is not used
    if low_dtype is None:
        ctx.mark_non_differentiable(output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, branch, weight)


def _backward(ctx: Any, grad: Tensor | None, grad_low: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_low is None:
        return (None,) * 6
    x, branch, weight = ctx.saved_tensors
    for_x, for_branch, for_weight, for_bias = ctx.needs_input_grad[:4]
    arguments = (grad, grad_low, x, branch, weight, ctx.eps, for_weight or for_bias)
    dx, dbranch, sums = _backward_op(*arguments, backend=ctx.backend)
    return (
        dx if for_x else None,
        (dx if x.dtype == branch.dtype else dbranch) if for_branch else None,
        sums[0].to(weight.dtype) if for_weight else None,
        sums[1].to(ctx.bias_dtype) if for_bias else None,
        None,
        None,
    )


register(
    OPERATOR,
    "residual_layer_norm(Tensor x, Tensor branch, Tensor? weight, Tensor? bias, float eps, ScalarType? low_dtype, *, "
    'str backend="auto") -> (Tensor, Tensor)',
    {"triton": _forward_triton, "torch": _in_torch},
    refuses={"triton": norm.why_not_triton},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    composite=_in_torch,
)
