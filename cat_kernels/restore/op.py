"""`restore_tokens`: visible tokens back on the grid, noise elsewhere. Formula: README.md; oracle: reference.py.

Shapes: N clip-clones, K visible patches, L = num_patches, D width.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import philox
from .._library import register
from .._ops import ops
from .._rows import flat_rows, gather_rows
from .reference import restore_tokens_reference

OPERATOR = "restore_tokens"


def restore_tokens(
    tokens: Tensor,
    visible: Tensor,
    num_patches: int,
    seed: Tensor | int,
    *,
    noise_std: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Tokens at their patches, N(0, noise_std^2) noise at every other patch.

    tokens: (N, K, D).
    visible: (N, K) int64 patch indices in [0, num_patches), distinct within a row, in any order.
    num_patches: patches L of the grid.
    seed: (2,) int64 = (seed, offset) on the device of tokens. A tensor, so that the next step's numbers neither
        recompile nor synchronise, and a CUDA graph can be replayed with new ones. Noise of an element depends only on
        (seed, offset, its flat index); use offsets at least N * L * D / 4 apart. Or an int, for offset 0: convenient,
        but it is copied to the device at every call, and compiled code holds it as a constant.
    noise_std: standard deviation of the noise, at least 0.
    Returns (N, L, D) in the dtype of tokens (of autocast where that is active).

    Differentiable in tokens. Raises TypeError, ValueError or, for an index outside the grid, IndexError (values of
    `visible` are looked at on the CPU only; on a GPU Triton leaves out a token outside the grid, PyTorch gives a
    device-side assertion).
    """
    check.check_tensor(OPERATOR, "tokens", tokens, "(N, K, D)")
    check.check_visible(OPERATOR, visible, "tokens", tokens)
    if visible.shape != tokens.shape[:2]:
        raise ValueError(
            f"{OPERATOR}: visible must be (N, K) = {tuple(tokens.shape[:2])}, one index per token, "
            f"got {tuple(visible.shape)}"
        )
    if num_patches < visible.shape[1]:
        raise ValueError(
            f"{OPERATOR}: num_patches={num_patches} cannot hold {visible.shape[1]} visible ones; "
            "it is the number L of all patches of the grid"
        )
    if isinstance(seed, int):
        seed = philox.rng(seed, device=tokens.device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (2,):
        got = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(
            f"{OPERATOR}: seed must be an int64 tensor (2,) = (seed, offset), or an int, got {got}; "
            "make it with torch.tensor([seed, offset])"
        )
    check.check_device(OPERATOR, "seed", seed, "tokens", tokens)
    if not noise_std >= 0:
        raise ValueError(f"{OPERATOR}: noise_std={noise_std} must be a standard deviation, at least 0")
    return ops.restore_tokens(tokens, visible, num_patches, seed, noise_std, backend=backend)


def _forward(tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor, noise_std: float = 0.01) -> Tensor:
    check.check_visible_values(OPERATOR, visible, num_patches, distinct=True)
    N, K, D = tokens.shape
    out_RD = tokens.new_empty(N * num_patches, D)
    philox.fill_normal_(out_RD.view(-1), seed, noise_std)
    out_RD.index_copy_(0, flat_rows(visible, N, num_patches), tokens.reshape(N * K, D))
    return out_RD.view(N, num_patches, D)


def _forward_triton(tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor, noise_std: float = 0.01) -> Tensor:
    from . import kernels

    check.check_visible_values(OPERATOR, visible, num_patches, distinct=True)
    return kernels.restore(tokens, visible, num_patches, seed, noise_std)


def _composite(tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor, noise_std: float = 0.01) -> Tensor:
    check.check_visible_values(OPERATOR, visible, num_patches, distinct=True)
    return restore_tokens_reference(tokens, visible, num_patches, seed, noise_std=noise_std)


def _backward_triton(grad: Tensor, visible: Tensor) -> Tensor:
    from ..gather import kernels

    return kernels.gather(grad, visible)


def _fake(tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor, noise_std: float = 0.01) -> Tensor:
    return tokens.new_empty(tokens.shape[0], num_patches, tokens.shape[2])


def _backward_fake(grad: Tensor, visible: Tensor) -> Tensor:
    return grad.new_empty(*visible.shape, grad.shape[2])


def _why_not_triton(tokens: Tensor, *_: Any) -> str | None:
    if tokens.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"its kernels take float32, bfloat16 and float16, not {tokens.dtype}"


_backward_op = register(
    OPERATOR,
    'restore_tokens_backward(Tensor grad, Tensor visible, *, str backend="auto") -> Tensor',
    {"triton": _backward_triton, "torch": gather_rows},
    refuses={"triton": _why_not_triton},
    fake=_backward_fake,
    composite=gather_rows,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_NLD: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    return _backward_op(grad_NLD, visible, backend=ctx.backend), None, None, None, None


register(
    OPERATOR,
    "restore_tokens(Tensor tokens, Tensor visible, SymInt num_patches, Tensor seed, float noise_std=0.01, *, "
    'str backend="auto") -> Tensor',
    {"triton": _forward_triton, "torch": _forward},
    refuses={"triton": _why_not_triton},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
    composite=_composite,
    autocast=(0,),
)
