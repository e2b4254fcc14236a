"""Specification of `ema_update_`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._ops import ops
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import ema_update_
from .reference import ema_update_reference

# name: shapes of the parameters
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "plain": [(24, 24), (24,), (3, 1, 5, 5), (), (1,)],
    "odd": [(35, 17), (7,), (130, 3)],
    "empty tensor": [(0, 4), (3,)],
    "no tensors": [],
}


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, shapes in SHAPES.items():
        random = Random(device)
        teacher = [random.normal(*shape) for shape in shapes]
        student = [random.normal(*shape, dtype=dtype) for shape in shapes]
        copies = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        # Without copies the reference's second result is None, and so is the input that stands for it.
        inputs = {"teacher": teacher, "student": student, "decay": 0.9, "copies": None}
        sample = Sample(name=name, inputs=inputs)
        yield sample
        yield sample.with_inputs(f"{name}, copies", copies=copies)
        if name == "plain":
            for decay in (0.0, 0.9998, 1.0):
                yield sample.with_inputs(f"decay {decay}", decay=decay)
            on_host = torch.tensor(0.9998, dtype=torch.float64)
            yield sample.with_inputs("decay tensor", decay=on_host, copies=copies)
            yield sample.with_inputs("decay on the device", decay=on_host.to(device), copies=copies)


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    decay = torch.as_tensor(i["decay"], dtype=torch.float64)
    yield ops.ema_update_.default, (i["teacher"], i["student"], decay, i["copies"] or [])


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x, y = Random(device).normal(3, 4), Random(device, 1).normal(3, 4)
    good: dict[str, Any] = {"teacher": [x], "student": [y], "decay": 0.9}

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    trained = x.clone().requires_grad_()
    yield bad("trained", ValueError, r"teacher\[0\] requires gradients.*requires_grad_\(False\)", teacher=[trained])
    yield bad("one tensor", TypeError, r"teacher must be a list of tensors.*wrap it", teacher=x)
    yield bad("count", ValueError, r"teacher has 1 tensors and student 2", student=[y, y])
    yield bad("shape", ValueError, r"student\[0\] has shape \(4, 3\) and teacher\[0\] \(3, 4\)", student=[y.T])
    yield bad("copies", ValueError, r"teacher has 1 tensors and copies 2", copies=[x.half(), x.half()])
    yield bad("low teacher", TypeError, r"teacher\[0\] is torch.bfloat16.*as copies", teacher=[x.bfloat16()])
    yield bad("counter", TypeError, r"student\[0\] is torch.int64; only floating-point", student=[y.long()])
    yield bad("decay above 1", ValueError, r"decay=1.5 must be between 0 .* and 1", decay=1.5)
    yield bad("decay NaN", ValueError, r"decay=nan must be between 0", decay=float("nan"))
    yield bad("decay dtype", TypeError, r"0-dim float64 tensor, got torch.float32", decay=torch.tensor(0.9))


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    teacher = torch.randn(elements + 3, device=device)
    student = torch.randn(elements + 3, device=device, dtype=torch.bfloat16)
    copy = torch.zeros(elements + 3, device=device, dtype=torch.bfloat16)
    yield LargeSample(
        name="large tensor",
        inputs={"teacher": [teacher], "student": [student], "decay": 0.9, "copies": [copy]},
        small={
            "teacher": [teacher[-100:].clone()],
            "student": [student[-100:].clone()],
            "decay": 0.9,
            "copies": [copy[-100:].clone()],
        },
        part=lambda y: y[-100:],
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    # Parameters of a base encoder: 11 blocks of width 768, about 78 M in 132 tensors. `clips` does not matter.
    D = 768
    block = [(3 * D, D), (3 * D,), (D, D), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,), (D,), (D,), (D,), (D,)]
    shapes = block * 11
    teacher = [torch.randn(shape, device=device) for shape in shapes]
    inputs = {
        "teacher": teacher,
        "student": [torch.randn_like(t) for t in teacher],
        "decay": 0.9998,
        "copies": None if dtype == torch.float32 else [t.to(dtype) for t in teacher],
    }
    return Sample(name="base", inputs=inputs)


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    return 2 * nbytes(*inputs["teacher"]) + nbytes(*inputs["student"], *(inputs["copies"] or []))


SPEC = OperatorSpec(
    name="ema_update_",
    operator=ema_update_,
    reference=ema_update_reference,
    samples=_samples,
    mutates=("teacher", "copies"),
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    flops_forward=lambda inputs: 3 * sum(t.numel() for t in inputs["teacher"]),
)
