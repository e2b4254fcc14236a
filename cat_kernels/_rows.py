"""Row gather and scatter on (B, L, D) tensors by (N, K) indices; clip b owns index rows b*M .. (b+1)*M - 1.

Shapes: B clips, N = B * M index rows, K indices a row, L rows a clip, D width.
"""

import torch
from torch import Tensor


def flat_rows(index_NK: Tensor, clips: int, length: int) -> Tensor:
    """Row numbers, (N * K,), of the patches in a tensor (B, L, D) seen as (B * L, D)."""
    N = index_NK.shape[0]
    clones = N // max(clips, 1)
    clip_N = torch.arange(N, device=index_NK.device) // max(clones, 1)
    return (clip_N[:, None] * length + index_NK).reshape(-1)


def gather_rows(x_BLD: Tensor, index_NK: Tensor) -> Tensor:
    """x[n // M, index[n, k]]: (N, K, D), a new contiguous tensor. Any strides; expanded inputs are not materialised."""
    B, L, D = x_BLD.shape
    N, K = index_NK.shape
    if x_BLD.is_contiguous():
        # index_select copies whole rows; on the CPU it is several times faster than advanced indexing.
        return x_BLD.view(B * L, D).index_select(0, flat_rows(index_NK, B, L)).view(N, K, D)
    clip_N = torch.arange(N, device=x_BLD.device) // max(N // max(B, 1), 1)
    return x_BLD[clip_N[:, None], index_NK].contiguous()
