"""`gather_tokens` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible patches, D width.
"""

import torch
from torch import Tensor


def gather_tokens_reference(
    tokens: Tensor, visible: Tensor | None, pos: Tensor, cls: Tensor, *, select: bool = True
) -> Tensor:
    """See `cat_kernels.gather_tokens`."""
    if visible is None:
        body_NKD = tokens + pos[: tokens.shape[1]]
    elif select:
        clones = visible.shape[0] // max(tokens.shape[0], 1)
        tokens_NLD = tokens.repeat_interleave(clones, dim=0)
        index_NKD = visible[:, :, None].expand(-1, -1, tokens.shape[2])
        body_NKD = tokens_NLD.gather(1, index_NKD) + pos[visible]
    else:
        body_NKD = tokens + pos[visible]
    cls_N1D = cls.expand(body_NKD.shape[0], 1, -1)
    return torch.cat((cls_N1D, body_NKD), dim=1).to(tokens.dtype)
