"""Inverse block masks: which fifth of the patches the student sees (arXiv 2601.21612, section on masking).

Blocks of *visible* patches are stamped around random centres, then random cells are added or removed until exactly K
are visible. Every draw is a pure function of (seed, step, clip, mask), through a counter-based generator: masks are the
same in a data worker and on a GPU, whatever the batch is split into.

Shapes: B clips, M masks a clip, N = B * M, H x W patch grid, L = H * W, K visible patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_kernels.philox import philox_words

STREAM = 0x6D61736B  # "mask": keeps these draws apart from every other use of the same seed


@dataclass(frozen=True)
class MaskConfig:
    """``ratio`` of the patches is masked, in ``num_masks`` masks a clip; ``block``: side of a visible block (patches).

    ``adjust``: share of the patches drawn on top of the visible share, because blocks overlap (released recipe).
    """

    ratio: float = 0.8
    num_masks: int = 4
    block: int = 5
    adjust: float = 0.07

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}; expected the masked share of the patches, in [0, 1)")
        if self.num_masks < 1:
            raise ValueError(f"num_masks={self.num_masks}; expected at least 1")
        if self.block < 1 or self.block % 2 == 0:
            raise ValueError(f"block={self.block}; expected a positive odd number of patches, e.g. 5")
        if not 0 <= self.adjust <= 1:
            raise ValueError(f"adjust={self.adjust}; expected a share of the patches, in [0, 1]")

    def visible_count(self, patches: int) -> int:
        """K = int(L * (1 - ratio)), at least one."""
        return max(1, int(patches * (1 - self.ratio)))


def inverse_block_masks(
    config: MaskConfig, grid: tuple[int, int], *, seed: int, step: int | Tensor, clips: Tensor
) -> Tensor:
    """Draw M masks for every clip.

    Args:
        config: shares and sizes.
        grid: (H, W) patches.
        seed: of the run.
        step: training step (epoch or 0 for masks that shall not change).
        clips: (B,) int64 numbers of the clips in their data set, below 2^32.

    Returns:
        (B*M, K) int64 visible patch indices, ascending, on the device of ``clips``; clip b owns rows b*M .. (b+1)*M-1.
    """
    H, W = grid
    L, M, B, device = H * W, config.num_masks, clips.numel(), clips.device
    if L == 0 or L >= 1 << 20:
        raise ValueError(f"grid={grid} has {L} patches; expected 1 to {(1 << 20) - 1}")
    K = config.visible_count(L)
    centres = int(L * (1 - config.ratio + config.adjust) / config.block**2)
    draws = torch.arange(math.ceil((centres + L) / 4), device=device)
    mask = torch.arange(M, device=device)
    # one Philox counter gives four words; counter = (draw, step, clip, mask), the stream's name is folded into the key
    words_NR = (
        torch.stack(
            philox_words(seed ^ (STREAM << 32), draws, step, clips.reshape(B, 1, 1), mask.reshape(1, M, 1)), dim=-1
        )
        .flatten(2)
        .flatten(0, 1)
    )

    centre = (words_NR[:, :centres] * L) >> 32
    reach = torch.arange(config.block, device=device) - config.block // 2
    rows = ((centre // W)[:, :, None] + reach).clamp(0, H - 1)
    columns = ((centre % W)[:, :, None] + reach).clamp(0, W - 1)
    cells = (rows[:, :, :, None] * W + columns[:, :, None, :]).flatten(1)
    stamped = torch.zeros(B * M, L, dtype=torch.int64, device=device).scatter(1, cells, 1)

    # The K largest keys are visible: stamped cells first, in random order within both kinds, the cell's number last so
    # that no two keys are equal. So too many stamped cells lose random ones, and too few gain random others.
    key = (stamped << 52) + (words_NR[:, centres : centres + L] << 20) + torch.arange(L, device=device)
    return key.topk(K, dim=1).indices.sort(dim=1).values
