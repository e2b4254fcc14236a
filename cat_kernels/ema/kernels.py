"""The moving average of many tensors in one launch, over a table of their addresses.

    teacher <- teacher + w (student - teacher)    w = 1 - decay; below 1/2, as `torch.lerp` has it
    teacher <- student + (w - 1)(student - teacher)               otherwise
    copy    <- teacher, rounded

A row of the table is one program's work, at most CHUNK elements of one pair: int64 addresses of teacher, student and
copy (0: none), and the number of elements.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import _INTERPRETED, Ahead, launch

CHUNK = 4096  # elements a program: 16 a thread
WARPS = 8
KEPT = 16  # tables, of the lists of tensors that were averaged last

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _fma(a, b, c):
    """a * b + c, rounded once, as PyTorch's lerp compiles to. The interpreter rounds twice; through float64 it agrees
    but for one case in 2^28."""
    if _INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _lerp(teacher_ptr, student_ptr, copy_ptr, i, mask, near, factor, HAS_COPY: tl.constexpr):
    teacher = tl.load(teacher_ptr + i, mask)
    student = tl.load(student_ptr + i, mask).to(tl.float32)
    new = _fma(factor, student - teacher, tl.where(near, teacher, student))
    tl.store(teacher_ptr + i, new, mask)
    if HAS_COPY and copy_ptr.to(tl.int64) != 0:
        tl.store(copy_ptr + i, new.to(copy_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["weight"])
def _average(
    table_ptr,
    decay_ptr,
    weight,
    ON_DEVICE: tl.constexpr,
    STUDENT: tl.constexpr,
    COPY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = table_ptr + tl.program_id(0) * 4
    teacher = tl.load(row).to(tl.pointer_type(tl.float32))
    student = tl.load(row + 1).to(tl.pointer_type(STUDENT))
    copy = tl.load(row + 2).to(tl.pointer_type(COPY))
    if ALIGNED:
        # To four elements each: sixteen bytes of a half type would give it another layout, and a trip through shared
        # memory to get there.
        teacher = tl.multiple_of(teacher, 16)
        student = tl.multiple_of(student, STUDENT.primitive_bitwidth // 2)
        copy = tl.multiple_of(copy, COPY.primitive_bitwidth // 2)
    size = tl.load(row + 3)
    if ON_DEVICE:
        weight = (1.0 - tl.load(decay_ptr)).to(tl.float32)
    near = tl.abs(weight) < 0.5
    factor = tl.where(near, weight, weight - 1.0)
    i = tl.arange(0, CHUNK)
    # Without a mask where there is nothing to mask: a mask of unknown size forbids vectors.
    if size == CHUNK:
        _lerp(teacher, student, copy, i, None, near, factor, HAS_COPY)
    else:
        _lerp(teacher, student, copy, i, i < size, near, factor, HAS_COPY)


@dataclass(frozen=True)
class _Rows:
    """One launch: its rows of the table (programs, 4), and what its tensors have in common."""

    rows: Tensor
    student: torch.dtype
    copy: torch.dtype | None
    aligned: bool


class Table:
    """Where the tensors of one update lie. It holds addresses, not tensors: use it only while these stay.

    Pairs the kernel does not take are not in it; `rest` lists their numbers. These are float64 tensors, memory that is
    not dense or not in the same order, and a teacher that already came.

    teacher, student: tensors of equal shapes, on one device. copies: None for a tensor without.
    """

    def __init__(self, teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor | None]) -> None:
        self.rest: list[int] = []
        groups: dict[torch.dtype, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        copy_dtypes: dict[torch.dtype, set[torch.dtype]] = {}
        seen: set[int] = set()
        for i, (t, s, c) in enumerate(zip(teacher, student, copies, strict=True)):
            if t.numel() == 0:
                continue
            if not _takes(t, s, c) or t.data_ptr() in seen:
                self.rest.append(i)
                continue
            seen.add(t.data_ptr())
            groups.setdefault(s.dtype, []).append((t, s, c))
            copy_dtypes.setdefault(s.dtype, set()).update([] if c is None else [c.dtype])
        # One launch for each pair of dtypes: tensors without a copy join those with one.
        self.launches: list[_Rows] = []
        for dtype, group in groups.items():
            low: Sequence[torch.dtype | None] = sorted(copy_dtypes[dtype], key=str) or [None]
            for number, copy in enumerate(low):
                chosen = [g for g in group if (number == 0 if g[2] is None else g[2].dtype == copy)]
                self.launches.append(_rows(chosen, dtype, copy))

    def run(self, decay: Tensor) -> None:
        """decay: 0-dim float64, on the tensors' device (read there when the kernel runs) or on the CPU."""
        for part in self.launches:
            rows = part.rows
            on_device = decay.device == rows.device
            weight = 0.0 if on_device else 1.0 - float(decay)
            if rows.is_cuda:
                if torch.cuda.is_current_stream_capturing():
                    _CAPTURED.setdefault(rows.data_ptr(), rows)
                else:
                    rows.record_stream(torch.cuda.current_stream(rows.device))
            launch_rows(part, decay if on_device else rows, weight, on_device)


_CAPTURED: dict[int, Tensor] = {}  # kept for good: CUDA graphs read them, and do not tell when they go
_TABLES: OrderedDict[Any, Table] = OrderedDict()


def launch_rows(part: _Rows, decay: Tensor, weight: float, on_device: bool) -> None:
    """``decay`` is read where ``on_device``, ``weight`` (1 - decay) is used otherwise."""
    options: dict[str, Any] = {
        "ON_DEVICE": on_device,
        "STUDENT": TYPES[part.student],
        "COPY": TYPES[part.copy or torch.float32],
        "HAS_COPY": part.copy is not None,
        "ALIGNED": part.aligned,
        "CHUNK": CHUNK,
        "num_warps": WARPS,
    }
    launch(_average, (part.rows.shape[0],), part.rows, decay, weight, **options)


def table(teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor]) -> Table:
    """The table of these tensors, made once for as long as they stay where they are."""
    facts = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in chain(teacher, student, copies))
    key = (teacher[0].device, len(teacher), facts)
    found = _TABLES.pop(key, None)
    if found is None:
        found = Table(teacher, student, copies or [None] * len(teacher))
        while len(_TABLES) >= KEPT:
            _TABLES.popitem(last=False)
    _TABLES[key] = found
    return found


def _takes(teacher: Tensor, student: Tensor, copy: Tensor | None) -> bool:
    others = [student] if copy is None else [student, copy]
    if teacher.dtype != torch.float32 or any(t.dtype not in TYPES for t in others):
        return False
    if all(t.is_contiguous() for t in (teacher, *others)):
        return True
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(teacher)
    return dense and all(t.stride() == teacher.stride() for t in others)


def _rows(
    group: Sequence[tuple[Tensor, Tensor, Tensor | None]], student: torch.dtype, copy: torch.dtype | None
) -> _Rows:
    with torch.device("cpu"):  # whatever the default device is
        addresses = torch.tensor([[t.data_ptr(), s.data_ptr(), 0 if c is None else c.data_ptr()] for t, s, c in group])
        numel = torch.tensor([t.numel() for t, _, _ in group])
        chunks = (numel + CHUNK - 1) // CHUNK
        of = torch.repeat_interleave(torch.arange(len(group)), chunks)
        start = (torch.arange(of.numel()) - (chunks.cumsum(0) - chunks)[of]) * CHUNK
        itemsize = torch.tensor([4, student.itemsize, 0 if copy is None else copy.itemsize])
        first = addresses[of]
        first += start[:, None] * itemsize * (first != 0)
        rows = torch.cat([first, (numel[of] - start).clamp_(max=CHUNK)[:, None]], 1)
    return _Rows(_upload(rows, group[0][0].device), student, copy, bool((addresses % 16 == 0).all()))


def _upload(rows: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return rows
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ema_update_: a CUDA graph is being captured, and the table of these tensors' addresses is not on the "
            "device yet; run one update on the same tensors before the capture"
        )
    return rows.pin_memory().to(device, non_blocking=True)


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model: fp32 student, a copy in ``dtype``, or none."""
    low = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    signature = {"table_ptr": "*i64", "decay_ptr": "*fp64", "weight": "fp32"}
    found = []
    for aligned in (True, False):
        constexprs = {"ON_DEVICE": True, "STUDENT": tl.float32, "COPY": low, "HAS_COPY": dtype != "fp32"}
        constexprs |= {"ALIGNED": aligned, "CHUNK": CHUNK}
        name = "average" if aligned else "average, unaligned"
        found.append(Ahead(name, _average, signature, constexprs, {"num_warps": WARPS}))
    return found
