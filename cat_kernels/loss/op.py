"""`masked_regression_loss`: the loss at the masked places, its gradient, and the deviations that show collapse.

Formula: README.md; oracle: reference.py.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible ones, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import register
from .._ops import ops
from .reference import RegressionLoss

OPERATOR = "masked_regression_loss"
REDUCTIONS = ("mean", "sum")
VARIANCE_EPS = 1e-6  # under the root of the deviations


def masked_regression_loss(
    prediction: Tensor,
    target: Tensor,
    visible: Tensor,
    *,
    beta: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> RegressionLoss:
    """Sum over masked patches of sum_d (p - y)^2 / sqrt(D); "mean" divides it by their number, N * (L - K).

    prediction: (N, L, D), any floating dtype; clip b owns rows b * M .. (b + 1) * M - 1.
    target: (B, L, D), of the clips, not repeated for their clones; any floating dtype.
    visible: (N, K) int64, distinct patch indices within a row; every patch that is not listed is masked and counts.
    beta: 0 for squared differences; above 0 for smooth L1 in their place, as `torch.nn.functional.smooth_l1_loss`
        defines it: d^2 / (2 beta) where |d| < beta, |d| - beta / 2 elsewhere.
    reduction: "mean" or "sum".
    Returns `RegressionLoss(loss, prediction_std, target_std)`, 0-dim float32 tensors (float64 when an input is). The
    deviations are those of predictions and targets over masked tokens, mean_d sqrt(var_d + 1e-6), and carry no
    gradient. With nothing masked the loss is 0, and with fewer than two tokens the variances are.

    Source: arXiv 2601.21612, L_p; smooth L1 as in data2vec. Differentiable in prediction and target; gradients come in
    their dtypes. Autocast does not change it: inputs are read as they are, arithmetic is in float32. Raises TypeError,
    ValueError, and on the CPU IndexError for an index out of range; on a GPU `visible`'s values are not looked at.
    """
    check.check_tensor(OPERATOR, "prediction", prediction, "(N, L, D)")
    check.check_tensor(OPERATOR, "target", target, "(B, L, D)")
    check.check_visible(OPERATOR, visible, "prediction", prediction)
    N, L, D = prediction.shape
    check.check_size(OPERATOR, "visible", 0, visible, N, "the rows N of prediction")
    if visible.shape[1] > L:
        raise ValueError(f"{OPERATOR}: visible lists {visible.shape[1]} patches a row and prediction has only {L}")
    check.check_size(OPERATOR, "target", 1, target, L, "the patches L of prediction")
    check.check_size(OPERATOR, "target", 2, target, D, "the width D of prediction")
    check.check_clones(OPERATOR, "prediction", N, "target", target.shape[0])
    check.check_device(OPERATOR, "target", target, "prediction", prediction)
    if not 0 <= beta < math.inf:
        raise ValueError(f"{OPERATOR}: beta={beta} must be 0 (squared differences) or a positive number (smooth L1)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OPERATOR}: reduction={reduction!r} must be 'mean' or 'sum'")
    # In float16 the gradient of a mean is below the smallest number until it is multiplied by a loss scale: there
    # backward computes it, from the incoming gradient.
    with_gradient = torch.is_grad_enabled() and prediction.requires_grad and prediction.dtype != torch.float16
    loss, prediction_std, target_std, _ = ops.masked_regression_loss(
        prediction, target, visible, float(beta), reduction, with_gradient, backend=backend
    )
    return RegressionLoss(loss, prediction_std, target_std)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _accumulator(prediction: Tensor, target: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (prediction.dtype, target.dtype) else torch.float32


def _scale(prediction: Tensor, visible: Tensor, reduction: str) -> float:
    """What a sum of distances is multiplied by: 1 / sqrt(D), and for a mean 1 / the number of masked tokens."""
    N, L, D = prediction.shape
    return 1 / (math.sqrt(D) * (max(N * (L - visible.shape[1]), 1) if reduction == "mean" else 1))


def _difference(a_BLD: Tensor, b: Tensor, visible_BK: Tensor) -> Tensor:
    """a - b at masked patches, 0 at visible ones: filled row by row, ten times faster on a CPU than by a mask."""
    B, L, D = a_BLD.shape
    rows_BK = visible_BK + L * torch.arange(B, device=visible_BK.device)[:, None]
    difference_BLD = (a_BLD - b).contiguous()
    difference_BLD.view(B * L, D).index_fill_(0, rows_BK.flatten(), 0)
    return difference_BLD


def _distances(difference: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return difference.square()
    size = difference.abs()
    return torch.where(size < beta, size.square() / (2 * beta), size - beta / 2)


def _write_slopes(out: Tensor, difference: Tensor, beta: float, factor: float | Tensor) -> None:
    """Their derivatives times `factor`; overwrites `difference`."""
    slopes = difference.mul_(2) if beta == 0 else difference.div_(beta).clamp_(-1, 1)
    torch.mul(slopes, factor, out=out)


# Everything goes clone by clone, over views [m::M]: temporaries are M times smaller than repeated targets would be.


def _forward(
    prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulator(prediction, target)
    N, L, D = prediction.shape
    M = N // max(target.shape[0], 1)
    check.check_visible_values(OPERATOR, visible, L, distinct=True)
    target_BLD = target.to(dtype)
    count = N * (L - visible.shape[1])
    scale = _scale(prediction, visible, reduction)
    total = torch.zeros((), dtype=dtype, device=prediction.device)
    gradient = _new_gradient(prediction, with_gradient)
    # How often a target counts.
    times_NL1 = torch.ones(N, L, 1, dtype=dtype, device=target.device).scatter_(1, visible[:, :, None], 0)
    times_BL1 = times_NL1.unflatten(0, (-1, M)).sum(1) if M else times_NL1
    # Deviations in two passes: means, the predictions' from the differences', then the squares of what is left.
    target_sum_D = (target_BLD * times_BL1).masked_fill_(times_BL1 == 0, 0).sum((0, 1))
    prediction_sum_D = target_sum_D.clone()
    for m in range(M):
        difference_BLD = _difference(prediction[m::M], target_BLD, visible[m::M])
        total += _distances(difference_BLD, beta).sum(dtype=dtype)
        prediction_sum_D += difference_BLD.sum((0, 1))
        if with_gradient:
            _write_slopes(gradient[m::M], difference_BLD, beta, scale)
    target_mean_D, prediction_mean_D = target_sum_D / max(count, 1), prediction_sum_D / max(count, 1)
    prediction_squares_D = torch.zeros(D, dtype=dtype, device=prediction.device)
    for m in range(M):
        centred_BLD = _difference(prediction[m::M], prediction_mean_D, visible[m::M])
        prediction_squares_D += centred_BLD.square_().sum((0, 1))
    centred_BLD = (target_BLD - target_mean_D).masked_fill_(times_BL1 == 0, 0)
    target_squares_D = centred_BLD.square_().mul_(times_BL1).sum((0, 1))
    return total * scale, _deviation(prediction_squares_D, count), _deviation(target_squares_D, count), gradient


def _deviation(squares_D: Tensor, count: int) -> Tensor:
    return (squares_D / max(count - 1, 1) + VARIANCE_EPS).sqrt().mean()


def _new_gradient(prediction: Tensor, wanted: bool) -> Tensor:
    return prediction.new_empty(prediction.shape if wanted else (0,))


def _fake(
    prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulator(prediction, target)
    scalars = [prediction.new_empty((), dtype=dtype) for _ in range(3)]
    return scalars[0], scalars[1], scalars[2], _new_gradient(prediction, with_gradient)


def _prediction_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str
) -> Tensor:
    M = prediction.shape[0] // max(target.shape[0], 1)
    target_BLD = target.to(_accumulator(prediction, target))
    factor = grad * _scale(prediction, visible, reduction)
    out_NLD = _new_gradient(prediction, True)
    for m in range(M):
        difference_BLD = _difference(prediction[m::M], target_BLD, visible[m::M])
        _write_slopes(out_NLD[m::M], difference_BLD, beta, factor)
    return out_NLD


def _target_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str
) -> Tensor:
    M = prediction.shape[0] // max(target.shape[0], 1)
    target_BLD = target.to(_accumulator(prediction, target))
    factor = grad * _scale(prediction, visible, reduction)
    total_BLD = torch.zeros(target.shape, dtype=target_BLD.dtype, device=target.device)
    for m in range(M):
        slopes_BLD = _difference(prediction[m::M], target_BLD, visible[m::M])
        _write_slopes(slopes_BLD, slopes_BLD, beta, factor)
        total_BLD -= slopes_BLD
    return total_BLD.to(target.dtype)


def _scale_gradient(gradient: Tensor, grad: Tensor) -> None:
    gradient.mul_(grad)


def _scaled_gradient(gradient: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
    return gradient * grad


def _composite(
    prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference, but for shapes, which do not depend on values here: `torch.func.vmap` could not take that."""
    dtype = _accumulator(prediction, target)
    N, L, _ = prediction.shape
    check.check_visible_values(OPERATOR, visible, L, distinct=True)
    masked_NL1 = torch.ones(N, L, dtype=torch.bool, device=visible.device).scatter(1, visible, False)[:, :, None]
    target_NLD = target.to(dtype).repeat_interleave(N // max(target.shape[0], 1), dim=0)
    count = N * (L - visible.shape[1])

    def masked(x_NLD: Tensor) -> Tensor:
        return torch.where(masked_NL1, x_NLD, 0)

    def deviation(x_NLD: Tensor) -> Tensor:
        mean_D = masked(x_NLD).sum((0, 1)) / max(count, 1)
        return _deviation(masked(x_NLD - mean_D).square().sum((0, 1)), count)

    # Scaled before the sum: PyTorch gives a 0-dim tensor times a number a tangent in float64.
    loss = (_distances(masked(prediction - target_NLD), beta) * _scale(prediction, visible, reduction)).sum()
    deviations = deviation(prediction.detach().to(dtype)), deviation(target_NLD.detach())
    return loss, *deviations, _new_gradient(prediction, False)


# --- Triton -----------------------------------------------------------------------------------------------------------


def _forward_triton(
    prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import kernels

    check.check_visible_values(OPERATOR, visible, prediction.shape[1], distinct=True)
    gradient = _new_gradient(prediction, with_gradient)
    scale = _scale(prediction, visible, reduction)
    scalars = kernels.forward(
        prediction, target, visible, beta, scale, VARIANCE_EPS, gradient if with_gradient else None
    )
    return *scalars, gradient


def _prediction_backward_triton(
    grad: Tensor, prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str
) -> Tensor:
    from . import kernels

    out = _new_gradient(prediction, True)
    kernels.backward(grad, prediction, target, visible, beta, _scale(prediction, visible, reduction), out, None)
    return out


def _target_backward_triton(
    grad: Tensor, prediction: Tensor, target: Tensor, visible: Tensor, beta: float, reduction: str
) -> Tensor:
    from . import kernels

    out = target.new_empty(target.shape)
    kernels.backward(grad, prediction, target, visible, beta, _scale(prediction, visible, reduction), None, out)
    return out


def _scale_gradient_triton(gradient: Tensor, grad: Tensor) -> None:
    from . import kernels

    kernels.scale(gradient, grad, gradient)


def _scaled_gradient_triton(gradient: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
    from . import kernels

    out = gradient.new_empty(gradient.shape)
    kernels.scale(gradient, grad, out)
    return out


def _why_not_triton(*args: Any) -> str | None:
    return "float64 input" if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args) else None


REFUSES = {"triton": _why_not_triton}

# --- registration -----------------------------------------------------------------------------------------------------

_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor prediction, Tensor target, Tensor visible, float beta, str reduction, *, "
    'str backend="auto") -> Tensor'
)
_prediction_backward_op = register(
    OPERATOR,
    "masked_regression_loss_backward_prediction" + _BACKWARD_SCHEMA,
    {"triton": _prediction_backward_triton, "torch": _prediction_backward},
    refuses=REFUSES,
    fake=lambda grad, prediction, *others: prediction.new_empty(prediction.shape),
)
_target_backward_op = register(
    OPERATOR,
    "masked_regression_loss_backward_target" + _BACKWARD_SCHEMA,
    {"triton": _target_backward_triton, "torch": _target_backward},
    refuses=REFUSES,
    fake=lambda grad, prediction, target, *others: target.new_empty(target.shape),
)
_scale_op = register(
    OPERATOR,
    'masked_regression_loss_scale_(Tensor(a!) gradient, Tensor grad, *, str backend="auto") -> ()',
    {"triton": _scale_gradient_triton, "torch": _scale_gradient},
    refuses=REFUSES,
    fake=lambda gradient, grad: None,
)
# `loss` is not read: through it the result depends on the loss's inputs, so that a second derivative is refused.
_scaled_op = register(
    OPERATOR,
    'masked_regression_loss_scaled(Tensor gradient, Tensor grad, Tensor loss, *, str backend="auto") -> Tensor',
    {"triton": _scaled_gradient_triton, "torch": _scaled_gradient},
    refuses=REFUSES,
    fake=lambda gradient, grad, loss: gradient.new_empty(gradient.shape),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, target, visible, ctx.beta, ctx.reduction, ctx.with_gradient = inputs
    loss, prediction_std, target_std, gradient = output
    ctx.mark_non_differentiable(prediction_std, target_std, gradient)
    ctx.set_materialize_grads(False)  # no zeros of the gradient's size for the gradient that `gradient` does not get
    kept = (loss, gradient) if ctx.with_gradient else (None, None)
    again = not ctx.with_gradient or ctx.needs_input_grad[1]
    ctx.save_for_backward(*kept, *((prediction, target, visible) if again else (None, None, None)))


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    loss, gradient, *inputs = ctx.saved_tensors
    arguments = (*inputs, ctx.beta, ctx.reduction)
    grad_prediction = grad_target = None
    if ctx.needs_input_grad[0] and not ctx.with_gradient:
        grad_prediction = _prediction_backward_op(grad, *arguments, backend=ctx.backend)
    elif ctx.needs_input_grad[0] and _may_overwrite(gradient, grad):
        grad_prediction = gradient
        _scale_op(gradient, grad, backend=ctx.backend)
    elif ctx.needs_input_grad[0]:
        grad_prediction = _scaled_op(gradient, grad, loss, backend=ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_target = _target_backward_op(grad, *arguments, backend=ctx.backend)
    return grad_prediction, grad_target, None, None, None, None


# Of the two kinds of vmap. Their keys are not among `DispatchKey`'s members.
_BATCHED: list[Any] = [torch._C._parse_dispatch_key(key) for key in ("Batched", "FuncTorchBatched")]


def _may_overwrite(saved: Tensor, grad: Tensor) -> bool:
    """Whether no backward can follow this one: neither retain_graph nor create_graph. A tracer's tensors, which are of
    types of their own, are left alone: it would have to copy them. And a batch of incoming gradients needs one each."""
    if type(saved) is not Tensor or torch.is_grad_enabled():
        return False
    if any(torch._C._dispatch_keys(grad).has(key) for key in _BATCHED):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


register(
    OPERATOR,
    "masked_regression_loss(Tensor prediction, Tensor target, Tensor visible, float beta, str reduction, "
    'bool with_gradient, *, str backend="auto") -> (Tensor, Tensor, Tensor, Tensor)',
    {"triton": _forward_triton, "torch": _forward},
    refuses=REFUSES,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    composite=_composite,
)
