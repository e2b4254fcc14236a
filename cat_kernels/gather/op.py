"""`gather_tokens`: visible tokens + positions + CLS row. Formula: README.md; oracle: reference.py.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible patches, S = 1 + K, D width.
"""

from typing import Any

import torch
from torch import Tensor

from cat_kernels import _checks as check
from cat_kernels._library import register
from cat_kernels._rows import flat_rows, gather_rows

OPERATOR = "gather_tokens"


def gather_tokens(
    tokens: Tensor,
    visible: Tensor | None,
    pos: Tensor,
    cls: Tensor,
    *,
    select: bool = True,
    backend: str = "auto",
) -> Tensor:
    """CLS row, then every visible patch's token plus its position.

    tokens: (B, L, D), all patches of every clip; or, with select=False, (N, K, D), already only the visible ones.
    visible: (N, K) int64 patch indices h * W + w, clip b owning rows b * M .. (b + 1) * M - 1; or None: all patches of
        every clip, in order (N = B, K = L).
    pos: (at least L, D) position table, row = patch index.
    cls: (D,) CLS token.
    Returns (N, 1 + K, D) in the dtype of tokens (of autocast where that is active). Sums are in the widest input dtype.

    Differentiable in tokens, pos and cls. Raises TypeError, ValueError or, for an index outside the patches, IndexError
    (on the CPU; a GPU reports a device-side assertion).
    """
    check.check_tensor(OPERATOR, "tokens", tokens, "(B, L, D)")
    check.check_tensor(OPERATOR, "pos", pos, "(L, D)")
    check.check_tensor(OPERATOR, "cls", cls, "(D,)")
    D = tokens.shape[2]
    check.check_size(OPERATOR, "pos", 1, pos, D, "the width D of tokens")
    check.check_size(OPERATOR, "cls", 0, cls, D, "the width D of tokens")
    check.check_device(OPERATOR, "pos", pos, "tokens", tokens)
    check.check_device(OPERATOR, "cls", cls, "tokens", tokens)
    if visible is not None:
        check.check_visible(OPERATOR, visible, "tokens", tokens)
        if select:
            check.check_clones(OPERATOR, "visible", visible.shape[0], "tokens", tokens.shape[0])
        elif tokens.shape[:2] != visible.shape:
            raise ValueError(
                f"{OPERATOR}: with select=False, tokens (N, K, D) must hold one row per visible patch; got tokens "
                f"{tuple(tokens.shape)} and visible {tuple(visible.shape)}; pass select=True for tokens (B, L, D)"
            )
    if (visible is None or select) and pos.shape[0] < tokens.shape[1]:
        raise ValueError(
            f"{OPERATOR}: pos has {pos.shape[0]} rows for {tokens.shape[1]} patches; build a longer position table"
        )
    return torch.ops.cat_kernels.gather_tokens(tokens, visible, pos, cls, select, backend=backend)


def _forward(tokens: Tensor, visible: Tensor | None, pos: Tensor, cls: Tensor, select: bool = True) -> Tensor:
    if visible is None:
        body_NKD, pos_rows = tokens, pos[: tokens.shape[1]]
    else:
        check.check_visible_values(OPERATOR, visible, tokens.shape[1] if select else pos.shape[0])
        body_NKD = gather_rows(tokens, visible) if select else tokens
        pos_rows = pos[visible]
    N, K, D = body_NKD.shape
    out_NSD = tokens.new_empty(N, 1 + K, D)
    out_NSD[:, 0] = cls
    torch.add(body_NKD, pos_rows, out=out_NSD[:, 1:])
    return out_NSD


def _fake(tokens: Tensor, visible: Tensor | None, pos: Tensor, cls: Tensor, select: bool = True) -> Tensor:
    N, K = tokens.shape[:2] if visible is None else visible.shape
    return tokens.new_empty(N, 1 + K, tokens.shape[2])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_backward(grad: Tensor, visible: Tensor, clips: int, length: int) -> Tensor:
    """Sum of grad[n, 1 + k] over the places (n // M, visible[n, k]): (clips, length, D) in the accumulation type."""
    dtype = _accumulator(grad.dtype)
    D = grad.shape[2]
    total = torch.zeros(clips * length, D, dtype=dtype, device=grad.device)
    total.index_add_(0, flat_rows(visible, clips, length), grad[:, 1:].reshape(-1, D).to(dtype))
    return total.view(clips, length, D)


def _tokens_backward(grad: Tensor, visible: Tensor, clips: int, length: int) -> Tensor:
    return _rows_backward(grad, visible, clips, length).to(grad.dtype)


def _tokens_backward_fake(grad: Tensor, visible: Tensor, clips: int, length: int) -> Tensor:
    return grad.new_empty(clips, length, grad.shape[2])


def _pos_backward(grad: Tensor, visible: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    if visible is not None:
        # One "clip" that owns every row of `visible`.
        return _rows_backward(grad, visible, 1, rows)[0].to(dtype)
    total = torch.zeros(rows, grad.shape[2], dtype=_accumulator(grad.dtype), device=grad.device)
    total[: grad.shape[1] - 1] = grad[:, 1:].sum(0, dtype=total.dtype)
    return total.to(dtype)


def _pos_backward_fake(grad: Tensor, visible: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(rows, grad.shape[2], dtype=dtype)


_tokens_backward_op = register(
    OPERATOR,
    'gather_tokens_backward_tokens(Tensor grad, Tensor visible, SymInt clips, SymInt length, *, str backend="auto") '
    "-> Tensor",
    {"torch": _tokens_backward},
    fake=_tokens_backward_fake,
)
_pos_backward_op = register(
    OPERATOR,
    'gather_tokens_backward_pos(Tensor grad, Tensor? visible, SymInt rows, ScalarType dtype, *, str backend="auto") '
    "-> Tensor",
    {"torch": _pos_backward},
    fake=_pos_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, visible, pos, cls, ctx.select = inputs
    ctx.save_for_backward(visible)
    ctx.clips, ctx.length = tokens.shape[:2]
    ctx.rows, ctx.pos_dtype, ctx.cls_dtype = pos.shape[0], pos.dtype, cls.dtype


def _backward(ctx: Any, grad_NSD: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    grad_tokens = grad_pos = grad_cls = None
    if ctx.needs_input_grad[0]:
        if visible is None or not ctx.select:
            grad_tokens = grad_NSD[:, 1:]
        else:
            grad_tokens = _tokens_backward_op(grad_NSD, visible, ctx.clips, ctx.length, backend=ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_pos = _pos_backward_op(grad_NSD, visible, ctx.rows, ctx.pos_dtype, backend=ctx.backend)
    if ctx.needs_input_grad[3]:
        grad_cls = grad_NSD[:, 0].sum(0, dtype=_accumulator(grad_NSD.dtype)).to(ctx.cls_dtype)
    return grad_tokens, None, grad_pos, grad_cls, None


register(
    OPERATOR,
    "gather_tokens(Tensor tokens, Tensor? visible, Tensor pos, Tensor cls, bool select=True, *, "
    'str backend="auto") -> Tensor',
    {"torch": _forward},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    autocast=(0,),
)
