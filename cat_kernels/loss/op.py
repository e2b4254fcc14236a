"""`masked_regression_loss`: squared error at the masked places. Formula: README.md; oracle: reference.py.

Shapes: B clips, M masks a clip, N = B * M, L patches, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cat_kernels import _checks as check
from cat_kernels._library import register

OPERATOR = "masked_regression_loss"
REDUCTIONS = ("mean", "sum")


def masked_regression_loss(
    pred: Tensor, targets: Tensor, mask: Tensor, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Sum over masked patches of sum_d (pred - targets)^2 / sqrt(D); "mean" divides it by the number of masked patches.

    pred: (N, L, D), any floating dtype; clip b owns rows b * M .. (b + 1) * M - 1.
    targets: (B, L, D), of the clips, not repeated for their clones; any floating dtype.
    mask: (N, L) bool, True = masked = counted.
    reduction: "mean" or "sum".
    Returns a 0-dim float32 tensor (float64 when an input is); 0 when nothing is masked.

    Source: arXiv 2601.21612, L_p. Differentiable in pred and targets; gradients come in their dtypes. Autocast does not
    change it: inputs are read as they are, arithmetic is in float32. Raises TypeError or ValueError.
    """
    check.check_tensor(OPERATOR, "pred", pred, "(N, L, D)")
    check.check_tensor(OPERATOR, "targets", targets, "(B, L, D)")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{OPERATOR}: mask must be a boolean tensor (N, L), True where masked, got {got}; convert it with .bool()"
        )
    check.check_rank(OPERATOR, "mask", mask, "(N, L)")
    if mask.shape != pred.shape[:2]:
        raise ValueError(
            f"{OPERATOR}: mask must be (N, L) = {tuple(pred.shape[:2])}, one flag per prediction, "
            f"got {tuple(mask.shape)}"
        )
    check.check_size(OPERATOR, "targets", 1, targets, pred.shape[1], "the patches L of pred")
    check.check_size(OPERATOR, "targets", 2, targets, pred.shape[2], "the width D of pred")
    check.check_clones(OPERATOR, "pred", pred.shape[0], "targets", targets.shape[0])
    check.check_device(OPERATOR, "targets", targets, "pred", pred)
    check.check_device(OPERATOR, "mask", mask, "pred", pred)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OPERATOR}: reduction={reduction!r} must be 'mean' or 'sum'")
    return torch.ops.cat_kernels.masked_regression_loss(pred, targets, mask, reduction, backend=backend)


def _accumulator(pred: Tensor, targets: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (pred.dtype, targets.dtype) else torch.float32


def _clones(pred: Tensor, targets: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For every m < M: the predictions (B, L, D) and masks (B, L, 1) of the m-th clone of each clip, as views.

    Working clone by clone keeps the temporaries M times smaller than the repeated targets would be."""
    M = pred.shape[0] // max(targets.shape[0], 1)
    return [(pred[m::M], mask[m::M, :, None]) for m in range(M)]


def _scale(mask: Tensor, width: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """1 / (sqrt(D) * divisor), a 0-dim tensor: no synchronisation with the host."""
    divisor = mask.sum().clamp(min=1) if reduction == "mean" else torch.ones((), device=mask.device)
    return (divisor.to(torch.float64) * math.sqrt(width)).reciprocal().to(dtype)


def _forward(pred: Tensor, targets: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
    dtype = _accumulator(pred, targets)
    targets_BLD = targets.to(dtype)
    total = torch.zeros((), dtype=dtype, device=pred.device)
    for pred_BLD, mask_BL1 in _clones(pred, targets, mask):
        squares_BL = (pred_BLD - targets_BLD).square_().sum(2, dtype=dtype)
        total += squares_BL.masked_fill_(~mask_BL1[..., 0], 0).sum()
    return total * _scale(mask, pred.shape[2], reduction, dtype)


def _fake(pred: Tensor, targets: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
    return pred.new_empty((), dtype=_accumulator(pred, targets))


def _pred_backward(grad: Tensor, pred: Tensor, targets: Tensor, mask: Tensor, reduction: str) -> Tensor:
    dtype = _accumulator(pred, targets)
    factor = 2 * grad * _scale(mask, pred.shape[2], reduction, dtype)
    targets_BLD = targets.to(dtype)
    out_NLD = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    M = pred.shape[0] // max(targets.shape[0], 1)
    for m, (pred_BLD, mask_BL1) in enumerate(_clones(pred, targets, mask)):
        out_NLD[m::M] = (pred_BLD - targets_BLD).mul_(factor).masked_fill_(~mask_BL1, 0)
    return out_NLD


def _targets_backward(grad: Tensor, pred: Tensor, targets: Tensor, mask: Tensor, reduction: str) -> Tensor:
    dtype = _accumulator(pred, targets)
    targets_BLD = targets.to(dtype)
    total_BLD = torch.zeros(targets.shape, dtype=dtype, device=targets.device)
    for pred_BLD, mask_BL1 in _clones(pred, targets, mask):
        total_BLD += (targets_BLD - pred_BLD).masked_fill_(~mask_BL1, 0)
    return total_BLD.mul_(2 * grad * _scale(mask, pred.shape[2], reduction, dtype)).to(targets.dtype)


_BACKWARD_SCHEMA = (
    '(Tensor grad, Tensor pred, Tensor targets, Tensor mask, str reduction, *, str backend="auto") -> Tensor'
)
_pred_backward_op = register(
    OPERATOR,
    "masked_regression_loss_backward_pred" + _BACKWARD_SCHEMA,
    {"torch": _pred_backward},
    fake=lambda grad, pred, targets, mask, reduction: pred.new_empty(pred.shape),
)
_targets_backward_op = register(
    OPERATOR,
    "masked_regression_loss_backward_targets" + _BACKWARD_SCHEMA,
    {"torch": _targets_backward},
    fake=lambda grad, pred, targets, mask, reduction: targets.new_empty(targets.shape),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred, targets, mask, ctx.reduction = inputs
    ctx.save_for_backward(pred, targets, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (grad, *ctx.saved_tensors, ctx.reduction)
    grad_pred = _pred_backward_op(*arguments, backend=ctx.backend) if ctx.needs_input_grad[0] else None
    grad_targets = _targets_backward_op(*arguments, backend=ctx.backend) if ctx.needs_input_grad[1] else None
    return grad_pred, grad_targets, None, None


register(
    OPERATOR,
    "masked_regression_loss(Tensor pred, Tensor targets, Tensor mask, str reduction='mean', *, "
    'str backend="auto") -> Tensor',
    {"torch": _forward},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
