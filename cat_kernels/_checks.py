"""Checks of operator inputs. Every message names the value, what was expected and the remedy."""

import torch
from torch import Tensor


def check_tensor(operator: str, name: str, value: object, shape: str) -> None:
    """A floating-point tensor of the rank that `shape`, such as "(B, L, D)", shows."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{operator}: {name} must be a floating-point tensor, got {value.dtype}; convert it, e.g. with .float()"
        )
    check_rank(operator, name, value, shape)


def check_rank(operator: str, name: str, value: Tensor, shape: str) -> None:
    rank = len([s for s in shape.strip("()").split(",") if s.strip()])
    if value.ndim != rank:
        raise ValueError(
            f"{operator}: {name} must have {rank} dimensions {shape}, got shape {tuple(value.shape)}; "
            "add or flatten dimensions to match"
        )


def check_size(operator: str, name: str, dimension: int, value: Tensor, size: int, meaning: str) -> None:
    """`value.shape[dimension]` must be `size`, which `meaning` explains."""
    if value.shape[dimension] != size:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(value.shape)}; dimension {dimension} must be {size}, {meaning}"
        )


def check_device(operator: str, name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{operator}: {name} is on {value.device} and {reference_name} on {reference.device}; "
            f"move it: {name}.to({reference_name}.device)"
        )


def check_visible(operator: str, visible: object, tokens_name: str, tokens: Tensor) -> None:
    """`visible`: int64 (N, K) patch indices on the device of `tokens`. Values: see `check_visible_values`."""
    if not isinstance(visible, Tensor):
        raise TypeError(f"{operator}: visible must be an int64 tensor (N, K), got {type(visible).__name__}")
    if visible.dtype == torch.bool:
        raise TypeError(
            f"{operator}: visible must hold int64 patch indices (N, K), got a boolean mask; "
            "list the indices of its visible patches"
        )
    if visible.dtype != torch.int64:
        raise TypeError(f"{operator}: visible must be int64, got {visible.dtype}; convert it with .long()")
    check_rank(operator, "visible", visible, "(N, K)")
    check_device(operator, "visible", visible, tokens_name, tokens)


def check_clones(operator: str, name: str, clones: int, clips_name: str, clips: int) -> None:
    """N = B * M: clip b owns rows b * M .. (b + 1) * M - 1."""
    if (clones == 0) if clips == 0 else (clones % clips == 0):
        return
    raise ValueError(
        f"{operator}: {name} has {clones} rows and {clips_name} {clips} clips; "
        "the rows must be a multiple of the clips (M rows a clip, clip by clip)"
    )


def check_visible_values(operator: str, visible_NK: Tensor, length: int, *, distinct: bool = False) -> None:
    """Indices in [0, length), and distinct within a row where asked. Reads values, so it is for CPU tensors only:
    on a GPU it would make every call wait (what happens there, an operator's docstring says). Nor has a tracer's
    tensor, or one that `torch.func.vmap` took apart, values to read."""
    if visible_NK.device.type != "cpu" or visible_NK.numel() == 0:
        return
    while torch._C._functorch.is_gradtrackingtensor(visible_NK):
        visible_NK = torch._C._functorch.get_unwrapped(visible_NK)
    if type(visible_NK) is not Tensor or torch._C._functorch.is_batchedtensor(visible_NK):
        return
    low, high = torch.aminmax(visible_NK)
    if int(low) < 0 or int(high) >= length:
        worst = int(low) if int(low) < 0 else int(high)
        n, k = (int(i) for i in (visible_NK == worst).nonzero()[0])
        raise IndexError(
            f"{operator}: visible[{n}, {k}] = {worst}, but there are {length} patches; expected 0 to {length - 1}"
        )
    if distinct:
        rows = visible_NK.sort(dim=1).values
        repeated = rows[:, 1:] == rows[:, :-1]
        if bool(repeated.any()):
            n, k = (int(i) for i in repeated.nonzero()[0])
            raise ValueError(
                f"{operator}: visible[{n}] lists patch {int(rows[n, k])} twice; a patch takes one token, "
                "so indices must be distinct within a row"
            )
