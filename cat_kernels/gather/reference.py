"""`gather_tokens` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible patches, D width.
"""

import torch
from torch import Tensor


def gather_tokens_reference(
    tokens: Tensor,
    visible: Tensor | None,
    positions: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    select: bool = True,
) -> Tensor:
    """See `cat_kernels.gather_tokens`."""
    body_NKD = tokens
    if visible is not None and select:
        clones = visible.shape[0] // max(tokens.shape[0], 1)
        tokens_NLD = tokens.repeat_interleave(clones, dim=0)
        body_NKD = tokens_NLD.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
    if positions is not None:
        body_NKD = body_NKD + (positions[: tokens.shape[1]] if visible is None else positions[visible])
    if cls_token is not None:
        cls_N1D = cls_token.expand(body_NKD.shape[0], 1, -1)
        body_NKD = torch.cat((cls_N1D, body_NKD), dim=1)
    return body_NKD.to(tokens.dtype)
