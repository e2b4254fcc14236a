"""`masked_regression_loss` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible ones, D width, T = N * (L - K) masked tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RegressionLoss(NamedTuple):
    """0-dim tensors, float32 (float64 when an input is); only `loss` carries a gradient."""

    loss: Tensor
    prediction_std: Tensor  # mean over channels of the deviation over masked tokens: collapse shows here first
    target_std: Tensor  # the same of the targets, each counted as often as a clone masks it


def masked_regression_loss_reference(
    prediction: Tensor, target: Tensor, visible: Tensor, *, beta: float = 0.0, reduction: str = "mean"
) -> RegressionLoss:
    """See `cat_kernels.masked_regression_loss`."""
    clones = prediction.shape[0] // max(target.shape[0], 1)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    mask_NL = torch.ones(prediction.shape[:2], dtype=torch.bool, device=visible.device).scatter(1, visible, False)
    prediction_TD = prediction.to(dtype)[mask_NL]
    target_TD = target.to(dtype).repeat_interleave(clones, dim=0)[mask_NL]
    if beta > 0:
        loss = F.smooth_l1_loss(prediction_TD, target_TD, reduction="sum", beta=beta)
    else:
        loss = (prediction_TD - target_TD).square().sum()
    loss = loss / math.sqrt(prediction.shape[2])
    if reduction == "mean":
        loss = loss / max(len(prediction_TD), 1)
    return RegressionLoss(loss, deviation(prediction_TD.detach()), deviation(target_TD.detach()))


def deviation(x_TD: Tensor) -> Tensor:
    """mean_d sqrt(var_d + 1e-6), the unbiased variance over tokens; 0 of fewer than two."""
    variance_D = (x_TD - x_TD.mean(0)).square().sum(0) / max(len(x_TD) - 1, 1)
    return (variance_D + 1e-6).sqrt().mean()
