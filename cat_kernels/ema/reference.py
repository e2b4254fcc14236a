"""`ema_update_` as its formula reads. It returns new tensors instead of updating in place."""

from collections.abc import Sequence

from torch import Tensor


def ema_update_reference(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """(updated teacher, updated copies) of `cat_kernels.ema_update_`."""
    d = float(decay)
    updated = [d * t + (1 - d) * s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
    if copies is None:
        return updated, None
    return updated, [u.to(c.dtype) for u, c in zip(updated, copies, strict=True)]
