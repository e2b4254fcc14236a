"""`residual_layer_norm` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: D width.
"""

import torch
from torch import Tensor

from .._norm import layer_norm


def residual_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    low_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cat_kernels.residual_layer_norm`."""
    s = x + branch
    if low_dtype is not None:
        s = s.to(torch.promote_types(s.dtype, torch.float32))
    y = layer_norm(s, weight, bias, eps)
    return y, y if low_dtype is None else y.to(low_dtype)
