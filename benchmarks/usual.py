"""What PyTorch users write in place of the operators: as in the released code, or as the shortest PyTorch has it.

Each takes the operator's arguments and gives its results; `restore_tokens` but for the noise, which is drawn anew.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible ones, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def add_and_cat(tokens: Tensor, visible: Tensor, positions: Tensor, cls_token: Tensor, select: bool) -> Tensor:
    """Of tokens that are already the visible ones, as the stem gives them (``select`` False)."""
    N, _, D = tokens.shape
    x = tokens + positions.to(tokens.dtype)[visible]
    return torch.cat([cls_token.to(x.dtype).expand(N, 1, D), x], dim=1)


def cat_and_gather(tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor, noise_std: float = 0.01) -> Tensor:
    """Noise behind the tokens, then all in the order of the patches, the index expanded to D."""
    N, K, D = tokens.shape
    noise = tokens.new_empty(N, num_patches - K, D).normal_(std=noise_std)
    place = torch.full((N, num_patches), -1, device=tokens.device)
    place = place.scatter(1, visible, torch.arange(K, device=tokens.device).expand(N, K))
    masked = place < 0
    place = torch.where(masked, K - 1 + masked.cumsum(1), place)
    return torch.cat([tokens, noise], dim=1).gather(1, place[:, :, None].expand(-1, -1, D))


def add_and_norm(
    x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, low_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As under autocast on a GPU: the sum and its norm in float32, rounded for the product that follows."""
    y = F.layer_norm((x + branch).float(), x.shape[-1:], weight, bias, eps=1e-6)
    return y, y if low_dtype is None else y.to(low_dtype)


def norm_and_gelu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    low_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    y = residual + F.gelu(F.layer_norm(x.float(), x.shape[-1:], weight, bias))
    return y, y if low_dtype is None else y.to(low_dtype)


def norm_and_sum(layers: Sequence[Tensor], num_layers: int) -> Tensor:
    """An fp32 copy of every block, all alive together."""
    normed = [F.instance_norm(t.float().transpose(1, 2)).transpose(1, 2) for t in layers]
    return F.layer_norm(sum(normed) / num_layers, normed[0].shape[-1:])


def repeat_and_select(prediction: Tensor, target: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets repeated for the clones, both picked by a boolean mask."""
    N, L, D = prediction.shape
    mask = torch.ones(N, L, dtype=torch.bool, device=visible.device).scatter(1, visible, False)
    p = prediction[mask].float()
    y = target.repeat_interleave(N // target.shape[0], dim=0)[mask].float()
    loss = (p - y).square().sum(-1).mean() * D**-0.5
    with torch.no_grad():
        deviations = [(x.var(0) + 1e-6).sqrt().mean() for x in (p, y)]
    return loss, *deviations


def python_loop(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float, copies: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    for t, s in zip(teacher, student, strict=True):
        t.mul_(decay).add_(s, alpha=1 - decay)
    for c, t in zip(copies or (), teacher, strict=False):
        c.copy_(t)
    return teacher


def foreach_lerp(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float, copies: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    torch._foreach_lerp_(teacher, student, 1 - decay)
    if copies:
        torch._foreach_copy_(copies, teacher)
    return teacher


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The vendor's library, on the same channels-last memory."""
    weight, bias, padding = weight.to(x.dtype), bias.to(x.dtype), weight.shape[2] // 2
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)


USUAL: dict[str, dict[str, Callable[..., Any]]] = {
    "gather_tokens": {"add, cat": add_and_cat},
    "restore_tokens": {"normal_, cat, gather": cat_and_gather},
    "residual_layer_norm": {"add, layer_norm": add_and_norm},
    "layer_norm_gelu": {"layer_norm, gelu, add": norm_and_gelu},
    "average_targets": {"norms, sum": norm_and_sum},
    "masked_regression_loss": {"repeat, select": repeat_and_select},
    "grouped_conv2d": {"F.conv2d": conv2d},
    "ema_update_": {"Python loop": python_loop, "_foreach_lerp_": foreach_lerp},
}


def comparable(operator: str, inputs: dict[str, Any], results: Sequence[Tensor]) -> list[Tensor]:
    """What of the results has to agree: not the noise of `restore_tokens`, but its deviation, in thousandths."""
    if operator != "restore_tokens":
        return list(results)
    (grid,), visible = results, inputs["visible"]
    masked = torch.ones(grid.shape[:2], dtype=torch.bool, device=grid.device).scatter(1, visible, False)
    tokens = grid.gather(1, visible[:, :, None].expand(-1, -1, grid.shape[2]))
    return [tokens, (1e3 * grid[masked].float().std()).round()]
