"""`ema_update_`: moving average of all parameters in place. Formula: README.md; oracle: reference.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from .._library import register
from .._ops import ops

OPERATOR = "ema_update_"


def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place, for every pair of tensors.

    teacher: float32 or float64 tensors that do not require gradients, on one device.
    student: tensors of the same shapes, any floating dtype.
    decay: in [0, 1]. A float, or a 0-dim float64 tensor on the CPU or the tensors' device: with a tensor a new decay
        neither recompiles nor, on the device, synchronises (its range is then not checked).
    copies: low-precision copies of the teacher, same shapes, any floating dtype; written in the same pass.

    In Triton the tensors' addresses are put into a table on the device, which is kept while the lists stay the same; a
    CUDA graph must be captured after a call on the same tensors. `EMA` does this for whole modules, and checks less.

    Not differentiable: it raises ValueError when a teacher tensor requires gradients. Raises TypeError or ValueError.
    """
    teacher, student = _as_list("teacher", teacher), _as_list("student", student)
    copies = [] if copies is None else _as_list("copies", copies)
    _check_pairs(teacher, "student", student)
    if copies:
        _check_pairs(teacher, "copies", copies)
    for i, tensor in enumerate(teacher):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{OPERATOR}: teacher[{i}] is {tensor.dtype}; an average in low precision does not move. "
                "Keep the teacher in float32 and pass low-precision tensors as copies"
            )
    for name, tensors in (("teacher", teacher), ("copies", copies)):
        for i, tensor in enumerate(tensors):
            if tensor.requires_grad:
                raise ValueError(
                    f"{OPERATOR}: {name}[{i}] requires gradients, and this update is not differentiable; "
                    "call .requires_grad_(False) on the teacher's parameters"
                )
    if teacher:
        decay_tensor = _check_decay(decay, teacher[0])
        ops.ema_update_(teacher, student, decay_tensor, copies, backend=backend)


def _as_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{OPERATOR}: {name} must be a list of tensors, got one tensor; wrap it: [tensor]")
    return list(tensors)


def _check_pairs(teacher: list[Tensor], name: str, other: list[Tensor]) -> None:
    if len(teacher) != len(other):
        raise ValueError(
            f"{OPERATOR}: teacher has {len(teacher)} tensors and {name} {len(other)}; pass them in the same order"
        )
    for i, (t, o) in enumerate(zip(teacher, other, strict=True)):
        for label, tensor in (("teacher", t), (name, o)):
            if not tensor.is_floating_point():
                raise TypeError(
                    f"{OPERATOR}: {label}[{i}] is {tensor.dtype}; only floating-point tensors are averaged, "
                    "copy the others"
                )
        if t.shape != o.shape:
            raise ValueError(
                f"{OPERATOR}: {name}[{i}] has shape {tuple(o.shape)} and teacher[{i}] {tuple(t.shape)}; "
                "pass both models' tensors in the same order"
            )
        check.check_device(OPERATOR, f"{name}[{i}]", o, "teacher[0]", teacher[0])


def _check_decay(decay: float | Tensor, template: Tensor) -> Tensor:
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or decay.dtype != torch.float64:
            raise TypeError(
                f"{OPERATOR}: decay must be a float or a 0-dim float64 tensor, got {decay.dtype} {tuple(decay.shape)}; "
                "make it with torch.tensor(value, dtype=torch.float64)"
            )
        if decay.device.type != "cpu":
            check.check_device(OPERATOR, "decay", decay, "teacher[0]", template)
        return decay
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"{OPERATOR}: decay={decay} must be between 0 (take the student) and 1 (keep the teacher)")
    return torch.tensor(decay, dtype=torch.float64, device="cpu")  # whatever the default device is


def _forward(teacher: list[Tensor], student: list[Tensor], decay: Tensor, copies: list[Tensor]) -> None:
    for once in _apart(teacher):
        chosen = [[tensors[i] for i in once] if tensors else [] for tensors in (teacher, student, copies)]
        _average(chosen[0], chosen[1], chosen[2], decay)


def _apart(teacher: list[Tensor]) -> list[list[int]]:
    """Their numbers, in lists that none is in twice: an operation on a list may take its tensors at the same time."""
    lists: list[list[int]] = []
    times: dict[int, int] = {}
    for number, tensor in enumerate(teacher):
        if tensor.numel() == 0:
            continue
        time = times[tensor.data_ptr()] = times.get(tensor.data_ptr(), -1) + 1
        if time == len(lists):
            lists.append([])
        lists[time].append(number)
    return lists


def _average(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], decay: Tensor) -> None:
    student = [s if s.dtype == t.dtype else s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
    if decay.device.type == "cpu":
        torch._foreach_lerp_(teacher, student, 1.0 - float(decay))
    else:
        # A weight on the device: no host wait, at the price of the differences in memory.
        differences = torch._foreach_sub(student, teacher)
        torch._foreach_mul_(differences, (1.0 - decay).to(torch.float32))
        torch._foreach_add_(teacher, differences)
    if copies:
        torch._foreach_copy_(copies, teacher)


def _forward_triton(teacher: list[Tensor], student: list[Tensor], decay: Tensor, copies: list[Tensor]) -> None:
    if not teacher:
        return
    from . import kernels

    table = kernels.table(teacher, student, copies)
    table.run(decay)
    left = [[tensors[i] for i in table.rest] if tensors else [] for tensors in (teacher, student, copies)]
    _forward(left[0], left[1], decay, left[2])


def _fake(teacher: list[Tensor], student: list[Tensor], decay: Tensor, copies: list[Tensor]) -> None:
    return None


register(
    OPERATOR,
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor decay, Tensor(b!)[] copies, *, "
    'str backend="auto") -> ()',
    {"triton": _forward_triton, "torch": _forward},
    fake=_fake,
)
