"""`gather_tokens`: visible tokens + positions + CLS row. Formula: README.md; oracle: reference.py.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible patches, S = 1 + K, D width.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import register
from .._ops import ops
from .._rows import flat_rows, gather_rows
from .reference import gather_tokens_reference

OPERATOR = "gather_tokens"


def gather_tokens(
    tokens: Tensor,
    visible: Tensor | None,
    positions: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    select: bool = True,
    backend: str = "auto",
) -> Tensor:
    """CLS row, then every visible patch's token plus its position.

    tokens: (B, L, D), all patches of every clip; or, with select=False, (N, K, D), already only the visible ones.
    visible: (N, K) int64 patch indices h * W + w, clip b owning rows b * M .. (b + 1) * M - 1; or None: all patches of
        every clip, in order (N = B, K = L).
    positions: (at least L, D) position table, row = patch index; None adds nothing.
    cls_token: (D,) CLS token; None: no CLS row.
    Returns (N, 1 + K, D), or (N, K, D) without a CLS token, in the dtype of tokens (of autocast where that is active).
    Sums are in the widest input dtype.

    Differentiable in tokens, positions and cls_token. Raises TypeError, ValueError or, for an index outside the
    patches, IndexError (values of `visible` are looked at on the CPU only; on a GPU Triton gives rows of NaN, PyTorch a
    device-side assertion).
    """
    check.check_tensor(OPERATOR, "tokens", tokens, "(B, L, D)")
    D = tokens.shape[2]
    if positions is not None:
        check.check_tensor(OPERATOR, "positions", positions, "(L, D)")
        check.check_size(OPERATOR, "positions", 1, positions, D, "the width D of tokens")
        check.check_device(OPERATOR, "positions", positions, "tokens", tokens)
    if cls_token is not None:
        check.check_tensor(OPERATOR, "cls_token", cls_token, "(D,)")
        check.check_size(OPERATOR, "cls_token", 0, cls_token, D, "the width D of tokens")
        check.check_device(OPERATOR, "cls_token", cls_token, "tokens", tokens)
    if visible is not None:
        check.check_visible(OPERATOR, visible, "tokens", tokens)
        if select:
            check.check_clones(OPERATOR, "visible", visible.shape[0], "tokens", tokens.shape[0])
        elif tokens.shape[:2] != visible.shape:
            raise ValueError(
                f"{OPERATOR}: with select=False, tokens (N, K, D) must hold one row per visible patch; got tokens "
                f"{tuple(tokens.shape)} and visible {tuple(visible.shape)}; pass select=True for tokens (B, L, D)"
            )
    if positions is not None and (visible is None or select) and positions.shape[0] < tokens.shape[1]:
        raise ValueError(
            f"{OPERATOR}: positions has {positions.shape[0]} rows for {tokens.shape[1]} patches; "
            "build a longer position table"
        )
    return ops.gather_tokens(tokens, visible, positions, cls_token, select, backend=backend)


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(
    tokens: Tensor, visible: Tensor | None, positions: Tensor | None, cls_token: Tensor | None, select: bool = True
) -> Tensor:
    _check_values(tokens, visible, positions, select)
    body_NKD = tokens if visible is None or not select else gather_rows(tokens, visible)
    N, K, D = body_NKD.shape
    first = 0 if cls_token is None else 1
    out_NSD = tokens.new_empty(N, first + K, D)
    if cls_token is not None:
        out_NSD[:, 0] = cls_token
    if positions is None:
        out_NSD[:, first:] = body_NKD
    else:
        torch.add(body_NKD, positions[:K] if visible is None else positions[visible], out=out_NSD[:, first:])
    return out_NSD


def _forward_triton(
    tokens: Tensor, visible: Tensor | None, positions: Tensor | None, cls_token: Tensor | None, select: bool = True
) -> Tensor:
    from . import kernels

    _check_values(tokens, visible, positions, select)
    return kernels.gather(tokens, visible, positions, cls_token, select=select)


def _composite(
    tokens: Tensor, visible: Tensor | None, positions: Tensor | None, cls_token: Tensor | None, select: bool = True
) -> Tensor:
    _check_values(tokens, visible, positions, select)
    return gather_tokens_reference(tokens, visible, positions, cls_token, select=select)


def _check_values(tokens: Tensor, visible: Tensor | None, positions: Tensor | None, select: bool) -> None:
    if visible is not None and select:
        check.check_visible_values(OPERATOR, visible, tokens.shape[1])
    elif visible is not None and positions is not None:
        check.check_visible_values(OPERATOR, visible, positions.shape[0])


def _fake(
    tokens: Tensor, visible: Tensor | None, positions: Tensor | None, cls_token: Tensor | None, select: bool = True
) -> Tensor:
    N, K = tokens.shape[:2] if visible is None else visible.shape
    return tokens.new_empty(N, K if cls_token is None else 1 + K, tokens.shape[2])


# --- backward ---------------------------------------------------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_rows(grad: Tensor, visible: Tensor, clips: int, length: int, dtype: torch.dtype) -> Tensor:
    D = grad.shape[2]
    total = torch.zeros(clips * length, D, dtype=_accumulator(grad.dtype), device=grad.device)
    total.index_add_(0, flat_rows(visible, clips, length), grad.reshape(-1, D).to(total.dtype))
    return total.view(clips, length, D).to(dtype)


def _sum_rows_triton(grad: Tensor, visible: Tensor, clips: int, length: int, dtype: torch.dtype) -> Tensor:
    from . import kernels

    return kernels.sum_rows(grad, visible, clips, length, dtype)


def _sum_rows_fake(grad: Tensor, visible: Tensor, clips: int, length: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(clips, length, grad.shape[2], dtype=dtype)


def _why_not_triton(*args: Any) -> str | None:
    for dtype in (arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its kernels take float32, bfloat16 and float16, not {dtype}"
    return None


# Sum of grad[n, k] over the places (n // M, visible[n, k]) of (clips, length, D).
_sum_rows_op = register(
    OPERATOR,
    "gather_tokens_backward(Tensor grad, Tensor visible, SymInt clips, SymInt length, ScalarType dtype, *, "
    'str backend="auto") -> Tensor',
    {"triton": _sum_rows_triton, "torch": _sum_rows},
    refuses={"triton": _why_not_triton},
    fake=_sum_rows_fake,
    composite=_sum_rows,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, visible, positions, cls_token, ctx.select = inputs
    ctx.save_for_backward(visible)
    ctx.clips, ctx.length = tokens.shape[:2]
    ctx.rows, ctx.positions_dtype = (0, None) if positions is None else (positions.shape[0], positions.dtype)
    ctx.cls_dtype = None if cls_token is None else cls_token.dtype


def _backward(ctx: Any, grad_NSD: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    grad_NKD = grad_NSD if ctx.cls_dtype is None else grad_NSD[:, 1:]
    grad_tokens = grad_positions = grad_cls = None
    if ctx.needs_input_grad[0]:
        if visible is None or not ctx.select:
            grad_tokens = grad_NKD
        else:
            grad_tokens = _sum_rows_op(grad_NKD, visible, ctx.clips, ctx.length, grad_NKD.dtype, backend=ctx.backend)
    if ctx.needs_input_grad[2]:
        if visible is None:
            total = grad_NKD.sum(0, dtype=_accumulator(grad_NKD.dtype)).to(ctx.positions_dtype)
            grad_positions = torch.nn.functional.pad(total, (0, 0, 0, ctx.rows - total.shape[0]))
        else:
            # One "clip" that owns every row of `visible`.
            args = (grad_NKD, visible, 1, ctx.rows, ctx.positions_dtype)
            grad_positions = _sum_rows_op(*args, backend=ctx.backend)[0]
    if ctx.needs_input_grad[3]:
        grad_cls = grad_NSD[:, 0].sum(0, dtype=_accumulator(grad_NSD.dtype)).to(ctx.cls_dtype)
    return grad_tokens, None, grad_positions, grad_cls, None


register(
    OPERATOR,
    "gather_tokens(Tensor tokens, Tensor? visible, Tensor? positions, Tensor? cls_token, bool select=True, *, "
    'str backend="auto") -> Tensor',
    {"triton": _forward_triton, "torch": _forward},
    refuses={"triton": _why_not_triton},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    composite=_composite,
    autocast=(0,),
)
