"""`layer_norm_gelu` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._norm import layer_norm


def layer_norm_gelu_reference(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    low_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cat_kernels.layer_norm_gelu`."""
    if low_dtype is not None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = F.gelu(layer_norm(x, weight, bias, eps))
    if residual is not None:
        y = residual + y
    return y, y if low_dtype is None else y.to(low_dtype)
