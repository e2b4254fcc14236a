"""`masked_regression_loss` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: B clips, M masks a clip, N = B * M, L patches, D width.
"""

import math

import torch
from torch import Tensor


def masked_regression_loss_reference(pred: Tensor, targets: Tensor, mask: Tensor, *, reduction: str = "mean") -> Tensor:
    """See `cat_kernels.masked_regression_loss`."""
    clones = pred.shape[0] // max(targets.shape[0], 1)
    dtype = torch.promote_types(torch.promote_types(pred.dtype, targets.dtype), torch.float32)
    targets_NLD = targets.to(dtype).repeat_interleave(clones, dim=0)
    squares = (pred.to(dtype)[mask] - targets_NLD[mask]).square()
    loss = squares.sum() / math.sqrt(pred.shape[2])
    return loss / mask.sum().clamp(min=1) if reduction == "mean" else loss
