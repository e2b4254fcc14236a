"""Specification of `masked_regression_loss`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from .._ops import ops
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import masked_regression_loss
from .reference import masked_regression_loss_reference

# name: clips B, masks M, patches L, visible patches K, width D. In the interpreter four programs share B L rows: those
# of "plain" pass from one clip into the next, those of "small" in turns that are longer than a clip.
SHAPES = {
    "plain": (2, 3, 9, 3, 24),
    "longer": (4, 3, 15, 6, 24),
    "small": (2, 2, 3, 1, 20),
    "odd": (3, 1, 11, 5, 17),
    "wide": (1, 2, 5, 2, 300),
    "all masked": (2, 2, 12, 0, 8),
    "one masked": (2, 2, 12, 11, 8),
    "one patch": (2, 2, 1, 0, 5),
    "one token": (1, 1, 1, 0, 5),
    "nothing masked": (2, 2, 3, 3, 5),
    "empty batch": (0, 2, 12, 8, 8),
}


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (B, M, L, K, D) in SHAPES.items():
        random = Random(device)
        inputs = {
            "prediction": random.normal(B * M, L, D, dtype=dtype),
            "target": random.normal(B, L, D),
            "visible": random.visible(B * M, L, K),
        }
        sample = Sample(name=name, inputs=inputs, differentiable=("prediction", "target"))
        yield sample
        if name in ("plain", "odd"):
            yield sample.with_inputs(f"{name}, sum", reduction="sum")
            # Differences have deviation 1.4: many are on either side of it.
            yield sample.with_inputs(f"{name}, smooth", beta=1.0)
        if name == "plain":
            yield replace(sample, name="of predictions", differentiable=("prediction",))
            yield replace(sample, name="of targets", differentiable=("target",))
            yield sample.with_inputs("low-precision targets", target=inputs["target"].to(dtype))
            unread = inputs["prediction"].scatter(1, inputs["visible"][..., None].expand(-1, -1, D), float("nan"))
            yield sample.with_inputs("NaN where nothing is masked", prediction=unread)
            # A mean far from zero, where a variance from sums of squares would cancel.
            shifted = {name: inputs[name] + 100 for name in ("prediction", "target")}
            yield sample.with_inputs("far mean", **shifted)


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    ends = (i.get("beta", 0.0), i.get("reduction", "mean"))
    inputs = (i["prediction"], i["target"], i["visible"])
    for with_gradient in (False, True):
        yield ops.masked_regression_loss.default, (*inputs, *ends, with_gradient)
    dtype = torch.promote_types(torch.promote_types(i["prediction"].dtype, i["target"].dtype), torch.float32)
    grad = torch.full((), 0.5, dtype=dtype, device=i["prediction"].device)
    detached = (grad, *(t.detach() for t in inputs), *ends)
    yield ops.masked_regression_loss_backward_prediction.default, detached
    yield ops.masked_regression_loss_backward_target.default, detached
    gradient = torch.ones_like(i["prediction"], memory_format=torch.contiguous_format, requires_grad=False)
    yield ops.masked_regression_loss_scale_.default, (gradient, grad)
    yield ops.masked_regression_loss_scaled.default, (gradient, grad, grad)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    prediction, target, visible = good["prediction"], good["target"], good["visible"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("rank", ValueError, r"prediction must have 3 dimensions \(N, L, D\)", prediction=prediction[0])
    yield bad("a mask", TypeError, r"visible must hold int64 patch indices.*boolean", visible=visible > 0)
    yield bad("int32", TypeError, r"visible must be int64, got torch.int32", visible=visible.int())
    yield bad("rows", ValueError, r"visible has shape \(5, 3\); dimension 0 must be 6", visible=visible[1:])
    many = visible.new_zeros(6, 10)
    yield bad("too many", ValueError, r"visible lists 10 patches a row and prediction has only 9", visible=many)
    yield bad("patches", ValueError, r"dimension 1 must be 9, the patches L of prediction", target=target[:, 1:])
    yield bad("width", ValueError, r"dimension 2 must be 24, the width D of prediction", target=target[..., 1:])
    yield bad("clips", ValueError, r"prediction has 6 rows and target 4 clips", target=torch.cat((target, target)))
    yield bad("beta", ValueError, r"beta=-1.0 must be 0 .* or a positive number", beta=-1.0)
    yield bad("reduction", ValueError, r"reduction='none' must be 'mean' or 'sum'", reduction="none")
    if device.type == "cpu":
        twice = visible.clone()
        twice[2, 1] = twice[2, 0]
        yield bad("twice", ValueError, r"visible\[2\] lists patch \d+ twice", visible=twice)
        yield bad("out of range", IndexError, r"visible\[\d, \d\] = \d+, but there are 9", visible=visible + 1)


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    B, L, D = 128, 64, 128
    copies = elements // (B * L * D) + 1
    random = Random(device)
    small = {
        "prediction": random.normal(B, L, D, dtype=torch.bfloat16),
        "target": random.normal(B, L, D, dtype=torch.bfloat16),
        "visible": random.visible(B, L, 14),
    }
    # The same clips over and over: means stay what they are (the deviations, of 6400 tokens or more, up to 8e-5).
    yield LargeSample(
        name="large batch",
        inputs={name: tensor.repeat(copies, *[1] * (tensor.ndim - 1)) for name, tensor in small.items()},
        small=small,
        part=lambda result: result,
        differentiable=("prediction",),
        grad_parts=(lambda g: g[-B:] * copies,),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    N, L, D = clips * 4, 512, 768
    inputs = {
        "prediction": torch.randn(N, L, D, device=device, dtype=dtype),
        "target": torch.randn(clips, L, D, device=device, dtype=dtype),
        "visible": Random(device).visible(N, L, 102),
    }
    return Sample(name="base", inputs=inputs, differentiable=("prediction",))


def _masked_elements(inputs: Mapping[str, Any]) -> int:
    N, L, D = inputs["prediction"].shape
    return int(N * (L - inputs["visible"].shape[1]) * D)


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    prediction = _masked_elements(inputs) * inputs["prediction"].element_size()
    return prediction + nbytes(inputs["target"], inputs["visible"])


SPEC = OperatorSpec(
    name="masked_regression_loss",
    operator=masked_regression_loss,
    reference=masked_regression_loss_reference,
    samples=_samples,
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain", "longer"),
    # The interpreter takes a second a sample; float16, whose backward goes another way, is in test_loss.py.
    interpreted_dtypes=(torch.float32, torch.bfloat16),
    triton_samples=(
        "small",
        "plain, smooth",
        "odd, sum",
        "wide",
        "one token",
        "nothing masked",
        "empty batch",
        "of predictions",
        "NaN where nothing is masked",
        "far mean",
    ),
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    # The gradient out, zeros at visible places included; nothing is read again.
    bytes_backward=lambda inputs: nbytes(inputs["prediction"]),
    # Distance and sum; the deviation of predictions.
    flops_forward=lambda inputs: 9 * _masked_elements(inputs),
    flops_backward=lambda inputs: 2 * _masked_elements(inputs),
)
