"""What the operators around a LayerNorm share: checks, the dtypes of their results, and the norm in PyTorch.

Shapes: D width; rows are all dimensions before it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check

LOW = (torch.bfloat16, torch.float16)
WIDEST = 8192  # columns of a row, which Triton's kernels hold whole: 16 warps


def check_rows(operator: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor (..., D), got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{operator}: {name} must be a floating-point tensor, got {value.dtype}; convert it, e.g. with .float()"
        )
    if value.ndim < 2:
        raise ValueError(
            f"{operator}: {name} must have rows of width D, (..., D), got shape {tuple(value.shape)}; add a dimension"
        )
    if value.shape[-1] == 0:
        raise ValueError(f"{operator}: {name} has shape {tuple(value.shape)}; expected a width D of 1 or more")


def check_alike(operator: str, name: str, value: Any, reference_name: str, reference: Tensor) -> None:
    check_rows(operator, name, value)
    if value.shape != reference.shape:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(value.shape)} and {reference_name} {tuple(reference.shape)}; they "
            "must agree: expand the smaller one"
        )
    check.check_device(operator, name, value, reference_name, reference)


def check_affine(operator: str, x: Tensor, weight: Any, bias: Any, eps: float, low_dtype: object) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check.check_tensor(operator, name, value, "(D,)")
            check.check_size(operator, name, 0, value, x.shape[-1], "the width D of x")
            check.check_device(operator, name, value, "x", x)
    if not eps > 0:
        raise ValueError(f"{operator}: eps={eps} must be a positive number, such as 1e-5")
    if low_dtype not in (None, *LOW):
        raise TypeError(f"{operator}: low_dtype={low_dtype} must be torch.bfloat16, torch.float16 or None")


def result_dtype(tensors: Sequence[Tensor | None], low_dtype: torch.dtype | None) -> torch.dtype:
    """Of sum and result: the widest of the tensors', and at least float32 where it is given in low precision too."""
    dtypes = [t.dtype for t in tensors if t is not None]
    dtype = dtypes[0] if low_dtype is None else torch.promote_types(dtypes[0], torch.float32)
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def sums_dtype(*tensors: Tensor) -> torch.dtype:
    """Of the gradients of weight and bias, before they are rounded to the parameters'."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def new_results(x: Tensor, dtype: torch.dtype, low_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Of an operator: the second is empty where it is not asked for."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape if low_dtype else (0,), dtype=low_dtype or dtype)


def lowered(y: Tensor, low_dtype: torch.dtype | None) -> Tensor:
    return y.new_empty(0) if low_dtype is None else y.to(low_dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's, which wants weights in the input's dtype; on the CPU both in float32 will do as well."""
    dtypes = [t.dtype for t in (weight, bias) if t is not None]
    if set(dtypes) <= {x.dtype} or (x.device.type == "cpu" and dtypes == [torch.float32] * 2):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)


def total_gradient(grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    first, *rest = [grad.to(dtype) for grad in grads if grad is not None]
    return first + rest[0] if rest else first


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sums: bool
) -> tuple[Tensor, Tensor]:
    """dx, and (2, D) the sums for weight and bias; all of one dtype."""
    D = x.shape[-1:]
    weight = x.new_ones(D) if weight is None else weight.to(x.dtype)
    bias = x.new_zeros(D) if bias is None else bias.to(x.dtype)
    _, mean, rstd = torch.native_layer_norm(x, D, weight, bias, eps)
    arguments = (grad.contiguous(), x, D, mean, rstd, weight, bias, (True, sums, sums))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(*arguments)
    return dx, torch.stack((dweight, dbias)) if sums else x.new_empty(0)


def why_not_triton(*args: Any) -> str | None:
    for arg in args:
        if isinstance(arg, Tensor) and arg.dtype not in (torch.float32, *LOW):
            return f"its kernels take float32, bfloat16 and float16, not {arg.dtype}"
        if isinstance(arg, Tensor) and arg.shape[-1] > WIDEST:
            return f"its kernels hold whole rows, up to a width of {WIDEST}, not {arg.shape[-1]}"
    return None
