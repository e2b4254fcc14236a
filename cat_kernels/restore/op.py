"""`restore_tokens`: visible tokens back on the grid, noise elsewhere. Formula: README.md; oracle: reference.py.

Shapes: N clip-clones, K visible patches, L = length patches, D width.
"""

from typing import Any

import torch
from torch import Tensor

from cat_kernels import _checks as check
from cat_kernels import philox
from cat_kernels._library import register
from cat_kernels._rows import flat_rows, gather_rows

OPERATOR = "restore_tokens"


def restore_tokens(
    tokens: Tensor,
    visible: Tensor,
    length: int,
    rng: Tensor,
    *,
    sigma: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Tokens at their patches, N(0, sigma^2) noise at every other patch.

    tokens: (N, K, D).
    visible: (N, K) int64 patch indices in [0, length), distinct within a row, in any order.
    length: patches L of the grid.
    rng: (2,) int64 = (seed, offset) on the device of tokens. A tensor, so that the next step's numbers neither
        recompile nor synchronise, and a CUDA graph can be replayed with new ones. Noise of an element depends only on
        (seed, offset, its flat index); use offsets at least N * L * D / 4 apart.
    sigma: standard deviation of the noise, at least 0.
    Returns (N, L, D) in the dtype of tokens (of autocast where that is active).

    Differentiable in tokens. Raises TypeError, ValueError or, for an index outside the grid, IndexError (values of
    `visible` are looked at on the CPU only; a GPU reports a device-side assertion).
    """
    check.check_tensor(OPERATOR, "tokens", tokens, "(N, K, D)")
    check.check_visible(OPERATOR, visible, "tokens", tokens)
    if visible.shape != tokens.shape[:2]:
        raise ValueError(
            f"{OPERATOR}: visible must be (N, K) = {tuple(tokens.shape[:2])}, one index per token, "
            f"got {tuple(visible.shape)}"
        )
    if length < visible.shape[1]:
        raise ValueError(
            f"{OPERATOR}: length={length} patches cannot hold {visible.shape[1]} visible ones; "
            "length is the number L of all patches of the grid"
        )
    if not isinstance(rng, Tensor) or rng.dtype != torch.int64 or rng.shape != (2,):
        got = f"{rng.dtype} {tuple(rng.shape)}" if isinstance(rng, Tensor) else type(rng).__name__
        raise TypeError(
            f"{OPERATOR}: rng must be an int64 tensor (2,) = (seed, offset), got {got}; "
            "make it with torch.tensor([seed, offset])"
        )
    check.check_device(OPERATOR, "rng", rng, "tokens", tokens)
    if not sigma >= 0:
        raise ValueError(f"{OPERATOR}: sigma={sigma} must be a standard deviation, at least 0")
    return torch.ops.cat_kernels.restore_tokens(tokens, visible, length, rng, sigma, backend=backend)


def _forward(tokens: Tensor, visible: Tensor, length: int, rng: Tensor, sigma: float = 0.01) -> Tensor:
    check.check_visible_values(OPERATOR, visible, length, distinct=True)
    N, K, D = tokens.shape
    out_RD = tokens.new_empty(N * length, D)
    philox.fill_normal_(out_RD.view(-1), rng, sigma)
    out_RD.index_copy_(0, flat_rows(visible, N, length), tokens.reshape(N * K, D))
    return out_RD.view(N, length, D)


def _fake(tokens: Tensor, visible: Tensor, length: int, rng: Tensor, sigma: float = 0.01) -> Tensor:
    return tokens.new_empty(tokens.shape[0], length, tokens.shape[2])


def _backward_fake(grad: Tensor, visible: Tensor) -> Tensor:
    return grad.new_empty(*visible.shape, grad.shape[2])


_backward_op = register(
    OPERATOR,
    'restore_tokens_backward(Tensor grad, Tensor visible, *, str backend="auto") -> Tensor',
    {"torch": gather_rows},
    fake=_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_NLD: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    return _backward_op(grad_NLD, visible, backend=ctx.backend), None, None, None, None


register(
    OPERATOR,
    "restore_tokens(Tensor tokens, Tensor visible, SymInt length, Tensor rng, float sigma=0.01, *, "
    'str backend="auto") -> Tensor',
    {"torch": _forward},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    autocast=(0,),
)
