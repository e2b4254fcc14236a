"""`grouped_conv2d`: convolution of tokens on a grid, channels last. Formula: README.md; oracle: reference.py.

Shapes: N images, H x W places, C channels in, C' out, k x k taps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._library import register
from .._ops import ops

OPERATOR = "grouped_conv2d"


def grouped_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, backend: str = "auto"
) -> Tensor:
    """What `torch.nn.Conv2d` with stride 1 and padding k // 2 gives, of tokens in place of feature maps.

    x: (N, H, W, C) tokens on a grid.
    weight: (C', C / groups, k, k) as `torch.nn.Conv2d` has it, k odd.
    bias: (C',), or None.
    groups: divides C and C'.
    Returns (N, H, W, C') in the dtype of x (of autocast where that is active), to which weight and bias are cast; sums
    are in float32 or wider.

    Differentiable in x, weight and bias. Raises TypeError or ValueError.
    """
    check.check_tensor(OPERATOR, "x", x, "(N, H, W, C)")
    check.check_tensor(OPERATOR, "weight", weight, "(C', C / groups, k, k)")
    C, C_out = x.shape[3], weight.shape[0]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or C % groups or C_out % groups:
        raise ValueError(f"{OPERATOR}: groups={groups!r} must be an int that divides {C} channels in and {C_out} out")
    check.check_size(OPERATOR, "weight", 1, weight, C // groups, "the channels of x over the groups")
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"{OPERATOR}: weight has shape {tuple(weight.shape)}; its taps must be k x k with k odd; "
            "use torch.nn.functional.conv2d for others"
        )
    check.check_device(OPERATOR, "weight", weight, "x", x)
    if bias is not None:
        check.check_tensor(OPERATOR, "bias", bias, "(C',)")
        check.check_size(OPERATOR, "bias", 0, bias, C_out, "the channels out of weight")
        check.check_device(OPERATOR, "bias", bias, "x", x)
    return ops.grouped_conv2d(x, weight, bias, groups, backend=backend)


# --- forward ----------------------------------------------------------------------------------------------------------


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    padding = weight.shape[2] // 2
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias, padding=padding, groups=groups)
    return y.permute(0, 2, 3, 1)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return _conv2d(x, weight, bias, groups).contiguous()


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    from . import kernels

    tiles = kernels.conv_tiles(*_sizes(weight, groups), x.dtype, kernels.Chip.of(x.device))
    return _forward(x, weight, bias, groups) if tiles is None else kernels.conv(x, weight, bias, groups, tiles)


def _sizes(weight: Tensor, groups: int) -> tuple[int, int, int]:
    """Channels of a group in and out, and the kernel's size."""
    return weight.shape[1], weight.shape[0] // groups, weight.shape[2]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return x.new_empty(*x.shape[:3], weight.shape[0])


def _why_not_triton(*args: Any) -> str | None:
    for dtype in (arg.dtype for arg in args if isinstance(arg, Tensor)):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its kernels take float32, bfloat16 and float16, not {dtype}"
    return None


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    k = weight.shape[2]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype),
        [weight.shape[0]],
        [1, 1],
        [k // 2, k // 2],
        [1, 1],
        False,
        [0, 0],
        groups,
        [need_x, need_weight, need_bias],
    )
    # The library may give one that nobody asked for.
    grads = dx.permute(0, 2, 3, 1) if need_x else None, dweight if need_weight else None, dbias if need_bias else None
    return _filled(grads, weight)


def _backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernels

    (I, O, k), chip = _sizes(weight, groups), kernels.Chip.of(x.device)
    transposed = kernels.conv_tiles(O, I, k, x.dtype, chip)
    sums = kernels.weight_tiles(I, O, k, x.dtype, chip)
    if transposed is None or sums is None:
        return _backward_torch(grad, x, weight, groups, need_x, need_weight, need_bias)
    dx = kernels.conv_backward(grad, weight, groups, transposed) if need_x else None
    dweight = dbias = None
    if need_weight:
        dweight, dbias = kernels.backward_weight(grad, x, groups, k, sums, with_bias=need_bias)
    elif need_bias:
        dbias = grad.sum((0, 1, 2), dtype=torch.float32)
    return _filled((dx, dweight, dbias), weight)


def _filled(grads: tuple[Tensor | None, ...], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, the weight's and the bias's in the weight's dtype; empty where nobody asked."""
    dx, dweight, dbias = grads
    return (
        weight.new_empty(0) if dx is None else dx.contiguous(),
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype).contiguous(),
        weight.new_empty(0) if dbias is None else dbias.to(weight.dtype).contiguous(),
    )


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if need_x else weight.new_empty(0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


_backward_op = register(
    OPERATOR,
    "grouped_conv2d_backward(Tensor grad, Tensor x, Tensor weight, SymInt groups, bool need_x, bool need_weight, "
    'bool need_bias, *, str backend="auto") -> (Tensor, Tensor, Tensor)',
    {"triton": _backward_triton, "torch": _backward_torch},
    refuses={"triton": _why_not_triton},
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.groups = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = tuple(ctx.needs_input_grad[:3])
    grads = _backward_op(grad, x, weight, ctx.groups, *wanted, backend=ctx.backend)
    dx, dweight, dbias = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return dx, dweight, None if dbias is None else dbias.to(ctx.bias_dtype), None


register(
    OPERATOR,
    'grouped_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt groups, *, str backend="auto") -> Tensor',
    {"triton": _forward_triton, "torch": _forward},
    refuses={"triton": _why_not_triton},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    composite=_conv2d,
    autocast=(0,),
)
