"""`average_targets` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: B clips, L patches, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def average_targets_reference(
    layers: Sequence[Tensor], *, partial: Tensor | None = None, num_layers: int | None = None, eps: float = 1e-5
) -> Tensor:
    """See `cat_kernels.average_targets`."""
    tensors = [*layers] if partial is None else [*layers, partial]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    total_BLD = torch.zeros_like(tensors[0], dtype=dtype) if partial is None else partial.to(dtype)
    for layer_BLD in layers:
        total_BLD = total_BLD + normalise(layer_BLD.to(dtype), dim=1, eps=eps)
    return total_BLD if num_layers is None else normalise(total_BLD / num_layers, dim=2, eps=eps)


def normalise(x: Tensor, dim: int, eps: float) -> Tensor:
    """Mean 0, variance 1 along `dim`; biased variance, no affine part."""
    mean = x.mean(dim, keepdim=True)
    variance = (x - mean).square().mean(dim, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps)
