"""timm's plain transformer block, which Audio-MAE and Dasheng are made of, under the names of their files.

Shapes: B clips, L tokens, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm in both


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, real_BL: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if real_BL is None else real_BL[:, None, None]
        out_BHLd = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.proj(out_BHLd.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm. Where `real_BL` is False there is no token to attend to."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x_BLD: Tensor, real_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD), real_BL)
        x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
        return x_BLD


def real_tokens(tokens_B: Tensor, longest: int, device: torch.device) -> Tensor | None:
    """(B, longest): where clips have tokens; None where all have so many. Counts are on the CPU: a GPU would be waited
    for."""
    real_BL = torch.arange(longest, device="cpu") < tokens_B[:, None]
    return None if bool(real_BL.all()) else real_BL.to(device)
