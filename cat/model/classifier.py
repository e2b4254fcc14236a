"""A CAT encoder with a classification head: of the clip, or of its frames (sound events).

Read top to bottom: configuration, `Classifier`, its heads. The clip head is the released recipe's: the CLS token of the
last block, LayerNorm, Linear.

Shapes: B clips, T frames, F mel bins, P patch, H x W = T/P x F/P patches, L = H * W, D embedding width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cat.model.encoder import Encoder, ModelConfig

CLIP_POOLINGS = ("cls", "mean")
FRAME_POOLINGS = ("linear", "attention", "max")


@dataclass(frozen=True)
class HeadConfig:
    """What is put on the encoder, and what its logits mean.

    ``kind`` "clip" gives logits of the whole clip, "frames" of every row of patches (P frames: 160 ms), for events.
    ``pooling``: of a clip head, the "cls" token or the "mean" of the patches; of a frame head, how the clip's
    probability comes from its rows': "linear" softmax (sum p^2 / sum p; Wang et al., arXiv 1810.09050), "attention", or
    "max". ``loss``: with "ce" classes exclude each other (softmax), with "bce" each has a probability of its own
    (sigmoid).
    """

    kind: Literal["clip", "frames"] = "clip"
    pooling: str = "cls"
    loss: Literal["ce", "bce"] = "ce"

    def __post_init__(self) -> None:
        poolings = CLIP_POOLINGS if self.kind == "clip" else FRAME_POOLINGS
        if self.pooling not in poolings:
            raise ValueError(
                f"pooling is {self.pooling!r}; expected one of {', '.join(map(repr, poolings))} for kind={self.kind!r}"
            )
        if self.kind == "frames" and self.loss != "bce":
            raise ValueError("kind='frames' with loss='ce'; expected loss='bce': events overlap")


class ClassifierOutput(NamedTuple):
    """``clip``: (B, C) logits; of a frame head, the logarithm of the odds of the pooled probability. ``frames``: (B, H,
    C) logits of a frame head, else None; those of rows behind a clip's end mean nothing."""

    clip: Tensor
    frames: Tensor | None


class Classifier(nn.Module):
    """Encoder and head. State dict: ``encoder.*``, ``head.*``."""

    def __init__(self, model: ModelConfig, head: HeadConfig, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes={classes}; expected at least 1")
        self.config, self.classes = head, classes
        self.encoder = Encoder(model)
        self.head: ClipHead | FrameHead = (ClipHead if head.kind == "clip" else FrameHead)(model, head, classes)

    def forward(
        self, spec: Tensor, *, rows: Sequence[int] | None = None, keep: Tensor | None = None
    ) -> ClassifierOutput:
        """Logits of spec (B, 1, T, F). ``rows`` and ``keep`` as in `Encoder.forward`: with ``rows`` a clip's logits are
        those of the clip alone."""
        tokens_BSD = self.encoder(spec, rows=rows, keep=keep)
        H, P = spec.shape[2] // self.encoder.config.patch_size, self.encoder.config.patch_size
        inside_BH = None
        if rows is not None:
            ends_B = torch.tensor(list(rows)).to(spec.device, non_blocking=True)
            inside_BH = torch.arange(H, device=spec.device) < ends_B[:, None]
        return self.head(tokens_BSD, (H, spec.shape[3] // P), inside_BH)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (..., C) of `forward` as scores in 0..1, float32 or wider."""
        logits = _wide(logits)
        return logits.softmax(-1) if self.config.loss == "ce" else logits.sigmoid()


class ClipHead(nn.Module):
    def __init__(self, model: ModelConfig, head: HeadConfig, classes: int) -> None:
        super().__init__()
        self.pooling = head.pooling
        self.norm = nn.LayerNorm(model.embed_dim, eps=1e-6)
        self.linear = _linear(model.embed_dim, classes)

    def forward(self, tokens_BSD: Tensor, grid: tuple[int, int], inside_BH: Tensor | None) -> ClassifierOutput:
        x_BD = tokens_BSD[:, 0] if self.pooling == "cls" else _mean_of_rows(tokens_BSD, grid, inside_BH)
        return ClassifierOutput(self.linear(self.norm(x_BD)), None)


class FrameHead(nn.Module):
    def __init__(self, model: ModelConfig, head: HeadConfig, classes: int) -> None:
        super().__init__()
        self.pooling = head.pooling
        self.norm = nn.LayerNorm(model.embed_dim, eps=1e-6)
        self.linear = _linear(model.embed_dim, classes)
        self.attention = _linear(model.embed_dim, classes) if head.pooling == "attention" else None

    def forward(self, tokens_BSD: Tensor, grid: tuple[int, int], inside_BH: Tensor | None) -> ClassifierOutput:
        x_BHD = self.norm(rows_of_tokens(tokens_BSD, grid))
        logits_BHC = self.linear(x_BHD)
        inside_BH1 = None if inside_BH is None else inside_BH[:, :, None]
        p_BHC = _wide(logits_BHC).sigmoid()
        if inside_BH1 is not None:
            p_BHC = torch.where(inside_BH1, p_BHC, 0)
        if self.pooling == "max":
            p_BC = p_BHC.amax(1)
        elif self.attention is None:
            p_BC = p_BHC.square().sum(1) / p_BHC.sum(1).clamp(min=1e-12)
        else:
            weight_BHC = _wide(self.attention(x_BHD))
            if inside_BH1 is not None:
                weight_BHC = weight_BHC.masked_fill(~inside_BH1, -torch.inf)
            p_BC = (weight_BHC.softmax(1) * p_BHC).sum(1)
        return ClassifierOutput(p_BC.clamp(1e-7, 1 - 1e-7).logit(), logits_BHC)


def rows_of_tokens(tokens_BSD: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, D): the mean over frequency of every row of patches; the CLS token is left out."""
    return tokens_BSD[:, 1:].unflatten(1, grid).mean(2)


def _mean_of_rows(tokens_BSD: Tensor, grid: tuple[int, int], inside_BH: Tensor | None) -> Tensor:
    rows_BHD = rows_of_tokens(tokens_BSD, grid)
    if inside_BH is None:
        return rows_BHD.mean(1)
    inside_BH1 = inside_BH[:, :, None].to(rows_BHD.dtype)
    return (rows_BHD * inside_BH1).sum(1) / inside_BH1.sum(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _linear(width: int, classes: int) -> nn.Linear:
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
