"""Products of rows with a matrix in the fused stem. They are PyTorch's; the matrix's gradient, a sum over many rows,
stays in float32 (`_triton.product`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import register

OPERATOR = "MultiResConv"


def add_product(total: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """total + x @ weight.T, (R, n) in x's dtype, to which ``weight`` (n, m) is cast; ``total`` (R, n) or (n,)."""
    return _stem_add_product(total, x, weight, backend="triton")


def _add_product(total: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    matrix = weight.to(x.dtype).t()
    return x @ matrix if total is None else torch.addmm(total.to(x.dtype), x, matrix)


def _add_product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    from .._triton import product

    grad, x = grad.contiguous(), x.contiguous()
    dx = grad @ weight.to(grad.dtype) if need_x else grad.new_empty(0)
    dweight = product(grad.t(), x).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, dweight


def _add_product_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    total, x, weight = inputs
    ctx.save_for_backward(x, weight)
    ctx.total = None if total is None else (total.ndim, total.dtype)


def _add_product_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_total, *wanted = ctx.needs_input_grad
    grads = _stem_add_product_backward(grad, *ctx.saved_tensors, *wanted, backend=ctx.backend)
    dtotal = None
    if need_total:
        dimensions, dtype = ctx.total
        dtotal = (grad if dimensions == 2 else grad.sum(0, dtype=torch.float32)).to(dtype)
    return dtotal, *(g if want else None for g, want in zip(grads, wanted, strict=True))


_stem_add_product_backward = register(
    OPERATOR,
    "stem_add_product_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, *, "
    'str backend="auto") -> (Tensor, Tensor)',
    {"triton": _add_product_backward},
    fake=lambda grad, x, weight, need_x, need_weight: (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    ),
)
_stem_add_product = register(
    OPERATOR,
    'stem_add_product(Tensor? total, Tensor x, Tensor weight, *, str backend="auto") -> Tensor',
    {"triton": _add_product},
    fake=lambda total, x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    setup_context=_add_product_save,
    backward=_add_product_formula,
    composite=_add_product,
)
