"""The weights of the multi-resolution convolution stem, which its formulations compute with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from .layout import strides
from .norm import LayerNorm


class Embed(nn.Module):
    """Conv2d with kernel = stride, then LayerNorm over the channels of each position."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, stride, stride)
        self.norm = LayerNorm(out_channels, eps=1e-5)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))


class ConvBlock(nn.Module):
    """Weights of one conv block; 1x1 convolutions are kept as Linear layers, which PyTorch initialises the same way."""

    def __init__(self, channels: int, mlp_ratio: float, kernel_size: int) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.norm1 = LayerNorm(channels, eps=1e-5)
        self.conv1 = nn.Linear(channels, channels)
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.conv2 = nn.Linear(channels, channels)
        self.norm2 = LayerNorm(channels, eps=1e-5)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)


class StemWeights(nn.Module):
    """All parameters of the stem, initialised, and their sizes; see `MultiResConv`, which computes with them."""

    def __init__(
        self,
        resolutions: tuple[int, ...],
        channels: tuple[int, ...],
        embed_dim: int,
        in_chans: int,
        depth: int,
        mlp_ratio: float,
        kernel_size: int,
    ) -> None:
        super().__init__()
        self.resolutions = resolutions
        self.channels = channels
        self.embed_dim = embed_dim
        self.in_chans = in_chans
        self.kernel_size = kernel_size
        self.patch_size = resolutions[-1]

        widths = (*channels, embed_dim)
        self.embeds = nn.ModuleList(
            Embed(c_in, c_out, k)
            for c_in, c_out, k in zip((in_chans, *channels), widths, strides(resolutions), strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvBlock(c, mlp_ratio, kernel_size) for _ in range(depth)) for c in channels
        )
        self.sides = nn.ModuleList(
            nn.Conv2d(c, embed_dim, self.patch_size // r, self.patch_size // r)
            for c, r in zip(channels, resolutions[:-1], strict=True)
        )
        self.proj = nn.Linear(embed_dim, embed_dim)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def levels(self) -> list[tuple[Embed, Sequence[ConvBlock], nn.Conv2d | None]]:
        """Embedding, conv blocks and side output of each resolution, finest first; the last has only the embedding."""
        stages = [*self.stages, ()]
        sides = [*self.sides, None]
        return [cast(Any, level) for level in zip(self.embeds, stages, sides, strict=True)]
