"""`grouped_conv2d` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: N images, H x W places, g groups of i channels in and o out, u x v taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1) -> Tensor:
    """See `cat_kernels.grouped_conv2d`."""
    k = weight.shape[2]
    padded = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    windows_NHWgiuv = padded.unfold(1, k, 1).unfold(2, k, 1).unflatten(3, (groups, weight.shape[1]))
    weight_goiuv = weight.to(x.dtype).unflatten(0, (groups, weight.shape[0] // groups))
    y_NHWO = torch.einsum("nhwgiuv,goiuv->nhwgo", windows_NHWgiuv, weight_goiuv).flatten(3)
    return y_NHWO if bias is None else y_NHWO + bias.to(x.dtype)
