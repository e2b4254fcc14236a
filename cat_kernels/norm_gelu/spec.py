"""Specification of `layer_norm_gelu`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._norm import LOW, result_dtype
from .._ops import ops
from ..backends import INTERPRETED
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import layer_norm_gelu
from .reference import layer_norm_gelu_reference

# name: shape (..., D)
SHAPES = {
    "plain": (2, 3, 4, 24),
    "longer": (3, 5, 4, 24),
    "odd": (3, 5, 17),
    "wide": (2, 3, 130),
    "many rows": (90, 5),
    "one row": (1, 1, 64),
    "empty batch": (0, 7, 24),
}
# What the interpreter runs, at a tenth of a second a sample; compiled, the kernels run on all.
INTERPRETED_SAMPLES = (
    "plain",
    "odd",
    "many rows",
    "empty batch",
    "plain, twice",
    "plain, twice, without residual",
    "plain, wide residual",
    "plain, one dtype",
    "plain, without residual",
    "plain, without weight",
    "plain, without bias",
    "plain, without weight and bias",
)
DIFFERENTIABLE = ("x", "residual", "weight", "bias")


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, shape in SHAPES.items():
        random = Random(device, seed=1)  # incoming gradients have 0: the gradient of x along x is none
        inputs = {
            "x": random.normal(*shape, dtype=dtype),
            "residual": random.normal(*shape, dtype=dtype),
            "weight": random.normal(shape[-1]),
            "bias": random.normal(shape[-1]),
        }
        sample = Sample(name=name, inputs=inputs, differentiable=DIFFERENTIABLE)
        yield sample
        if name != "plain":
            continue
        yield sample.with_inputs("plain, one dtype", weight=inputs["weight"].to(dtype), bias=inputs["bias"].to(dtype))
        low = dtype if dtype in LOW else torch.bfloat16
        for without in (("residual",), ("weight",), ("bias",), ("weight", "bias")):
            bare = Sample(
                name=f"plain, without {' and '.join(without)}",
                inputs={**inputs, **dict.fromkeys(without)},
                differentiable=tuple(key for key in DIFFERENTIABLE if key not in without),
            )
            yield bare
            if without == ("residual",) and dtype != torch.float64:
                yield bare.with_inputs("plain, twice, without residual", low_dtype=low)
        if dtype == torch.float64:
            continue
        yield sample.with_inputs("plain, twice", residual=inputs["residual"].float(), low_dtype=low)
        yield sample.with_inputs("plain, twice, of low precision", low_dtype=low)
        yield sample.with_inputs("plain, wide residual", residual=inputs["residual"].float())


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    low_dtype = i.get("low_dtype")
    yield ops.layer_norm_gelu.default, (i["x"], i["residual"], i["weight"], i["bias"], 1e-5, low_dtype)
    x = i["x"].detach()
    residual, weight, bias = (None if i[name] is None else i[name].detach() for name in DIFFERENTIABLE[1:])
    grad = x.new_ones(x.shape, dtype=result_dtype([x, residual], low_dtype))
    grad_low = None if low_dtype is None else grad.to(low_dtype)
    residual_dtype = None if residual is None else residual.dtype
    yield ops.layer_norm_gelu_backward.default, (grad, grad_low, x, weight, bias, 1e-5, True, residual_dtype)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    x, residual, weight = good["x"], good["residual"], good["weight"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("x no tensor", TypeError, r"x must be a tensor \(\.\.\., D\), got list", x=[1.0])
    yield bad("x integer", TypeError, r"floating-point tensor, got torch.int64.*\.float\(\)", x=x.long())
    yield bad("x a row", ValueError, r"rows of width D.*got shape \(24,\); add a dimension", x=x[0, 0, 0])
    yield bad("residual short", ValueError, r"residual has shape \(2, 2, 4, 24\) and x", residual=residual[:, 1:])
    yield bad("weight width", ValueError, r"weight has shape \(23,\); dimension 0 must be 24", weight=weight[1:])
    yield bad("bias integer", TypeError, r"bias must be a floating-point tensor", bias=weight.long())
    yield bad("eps", ValueError, r"eps=-1 must be a positive number", eps=-1)
    yield bad("low_dtype", TypeError, r"low_dtype=torch.float32 must be torch.bfloat16", low_dtype=torch.float32)
    yield bad("backend", ValueError, r"unknown backend 'cuda'; expected 'auto' or one of 'triton'", backend="cuda")
    if device.type != "cpu":
        yield bad("device", ValueError, r"residual is on cpu and x on cuda:0; move it", residual=residual.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    D = 128
    R = elements // D + 1
    dtype = torch.bfloat16
    x = torch.randn(R, D, device=device, dtype=dtype)
    residual = Random(device).normal(1, D, dtype=dtype).expand(R, D)
    yield LargeSample(
        name="many rows",
        inputs={"x": x, "residual": residual},
        small={"x": x[-3:].clone(), "residual": residual[-3:]},
        part=lambda y: y[-3:],
        differentiable=("x",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    """As in the decoder: without weight and bias."""
    shape = (clips * 4, 64, 8, 768)
    inputs = {
        "x": torch.randn(shape, device=device, dtype=dtype),
        "residual": torch.randn(shape, device=device),
        "weight": None,
        "bias": None,
        "low_dtype": dtype if dtype in LOW else None,
    }
    return Sample(name="base", inputs=inputs, differentiable=("x", "residual"))


def _bytes_of_results(inputs: Mapping[str, Any]) -> int:
    low_dtype = inputs.get("low_dtype")
    dtype = result_dtype([inputs["x"], inputs["residual"]], low_dtype)
    return int(inputs["x"].numel() * (dtype.itemsize + (low_dtype.itemsize if low_dtype else 0)))


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    return nbytes(*(inputs[name] for name in DIFFERENTIABLE)) + _bytes_of_results(inputs)


def _bytes_backward(inputs: Mapping[str, Any]) -> int:
    """A single gradient is the residual's as it is; of two the sum is written."""
    affine = nbytes(inputs["weight"], inputs["bias"])
    summed = nbytes(inputs["residual"]) if inputs.get("low_dtype") else 0
    return _bytes_of_results(inputs) + 2 * (nbytes(inputs["x"]) + affine) + summed


SPEC = OperatorSpec(
    name="layer_norm_gelu",
    operator=layer_norm_gelu,
    reference=layer_norm_gelu_reference,
    samples=_samples,
    open_in_torch=True,
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain", "longer"),
    triton_samples=INTERPRETED_SAMPLES if INTERPRETED else (),
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    bytes_backward=_bytes_backward,
    flops_forward=lambda inputs: 26 * inputs["x"].numel(),
    flops_backward=lambda inputs: 38 * inputs["x"].numel(),
)
