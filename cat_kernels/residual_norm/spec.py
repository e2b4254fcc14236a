"""Specification of `residual_layer_norm`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._norm import LOW, result_dtype
from .._ops import ops
from ..backends import INTERPRETED
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import residual_layer_norm
from .reference import residual_layer_norm_reference

# name: shape (..., D)
SHAPES = {
    "plain": (2, 7, 24),
    "longer": (3, 9, 24),
    "odd": (3, 5, 17),
    "wide": (2, 3, 130),
    "many rows": (90, 5),
    "one row": (1, 1, 8),
    "empty batch": (0, 7, 24),
}
# What the interpreter runs, at a tenth of a second a sample; compiled, the kernels run on all.
INTERPRETED_SAMPLES = (
    "plain",
    "odd",
    "many rows",
    "empty batch",
    "plain, twice",
    "plain, wide residual",
    "plain, wide branch",
    "plain, one dtype",
    "plain, without weight",
    "plain, without bias",
    "plain, without weight and bias",
)
DIFFERENTIABLE = ("x", "branch", "weight", "bias")


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, shape in SHAPES.items():
        random = Random(device, seed=1)  # incoming gradients have 0: the gradient of x along x is none
        inputs = {
            "x": random.normal(*shape, dtype=dtype),
            "branch": random.normal(*shape, dtype=dtype),
            "weight": random.normal(shape[-1]),
            "bias": random.normal(shape[-1]),
        }
        sample = Sample(name=name, inputs=inputs, differentiable=DIFFERENTIABLE)
        yield sample
        if name != "plain":
            continue
        yield sample.with_inputs("plain, one dtype", weight=inputs["weight"].to(dtype), bias=inputs["bias"].to(dtype))
        for without in (("weight",), ("bias",), ("weight", "bias")):
            yield Sample(
                name=f"plain, without {' and '.join(without)}",
                inputs={**inputs, **dict.fromkeys(without)},
                differentiable=tuple(key for key in DIFFERENTIABLE if key not in without),
            )
        if dtype == torch.float64:
            continue
        low = dtype if dtype in LOW else torch.bfloat16
        yield sample.with_inputs("plain, twice", x=inputs["x"].float(), low_dtype=low)
        yield sample.with_inputs("plain, twice, of low precision", low_dtype=low)
        yield sample.with_inputs("plain, wide residual", x=inputs["x"].float())
        yield sample.with_inputs("plain, wide branch", branch=inputs["branch"].float())


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    low_dtype = i.get("low_dtype")
    yield ops.residual_layer_norm.default, (i["x"], i["branch"], i["weight"], i["bias"], 1e-6, low_dtype)
    x, branch, weight = i["x"].detach(), i["branch"].detach(), None if i["weight"] is None else i["weight"].detach()
    grad = x.new_ones(x.shape, dtype=result_dtype([x, branch], low_dtype))
    grad_low = None if low_dtype is None else grad.to(low_dtype)
    yield ops.residual_layer_norm_backward.default, (grad, grad_low, x, branch, weight, 1e-6, True)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    x, branch, weight = good["x"], good["branch"], good["weight"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("x no tensor", TypeError, r"x must be a tensor \(\.\.\., D\), got list", x=[1.0])
    yield bad("x integer", TypeError, r"floating-point tensor, got torch.int64.*\.float\(\)", x=x.long())
    yield bad("x a row", ValueError, r"rows of width D.*got shape \(24,\); add a dimension", x=x[0, 0])
    yield bad("x without width", ValueError, r"x has shape \(2, 7, 0\); expected a width", x=x[..., :0])
    yield bad("branch no tensor", TypeError, r"branch must be a tensor", branch=None)
    yield bad("branch short", ValueError, r"branch has shape \(2, 6, 24\) and x \(2, 7, 24\)", branch=branch[:, 1:])
    yield bad("weight rank", ValueError, r"weight must have 1 dimensions", weight=weight[None])
    yield bad("weight width", ValueError, r"weight has shape \(23,\); dimension 0 must be 24", weight=weight[1:])
    yield bad("bias integer", TypeError, r"bias must be a floating-point tensor", bias=weight.long())
    yield bad("eps", ValueError, r"eps=0 must be a positive number", eps=0)
    yield bad("eps NaN", ValueError, r"eps=nan must be a positive number", eps=float("nan"))
    yield bad("low_dtype", TypeError, r"low_dtype=torch.int8 must be torch.bfloat16", low_dtype=torch.int8)
    yield bad("backend", ValueError, r"unknown backend 'cuda'; expected 'auto' or one of 'triton'", backend="cuda")
    if device.type != "cpu":
        yield bad("device", ValueError, r"branch is on cpu and x on cuda:0; move it", branch=branch.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    D = 128
    R = elements // D + 1
    dtype = torch.bfloat16
    random = Random(device)
    weights = {"weight": random.normal(D), "bias": random.normal(D)}
    x = torch.randn(R, D, device=device, dtype=dtype)
    branch = random.normal(1, D, dtype=dtype).expand(R, D)
    yield LargeSample(
        name="many rows",
        inputs={"x": x, "branch": branch, **weights},
        small={"x": x[-3:].clone(), "branch": branch[-3:], **weights},
        part=lambda y: y[-3:],
        differentiable=("x",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    shape = (clips * 4, 103, 768)
    random = Random(device)
    inputs = {
        "x": torch.randn(shape, device=device),
        "branch": torch.randn(shape, device=device, dtype=dtype),
        "weight": 1 + 0.1 * random.normal(shape[-1]),
        "bias": random.normal(shape[-1]),
        "low_dtype": dtype if dtype in LOW else None,
    }
    return Sample(name="base", inputs=inputs, differentiable=DIFFERENTIABLE)


def _bytes_of_results(inputs: Mapping[str, Any]) -> int:
    low_dtype = inputs.get("low_dtype")
    sizes = [result_dtype([inputs["x"], inputs["branch"]], low_dtype).itemsize, low_dtype.itemsize if low_dtype else 0]
    return int(inputs["x"].numel() * sum(sizes))


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    return nbytes(*(inputs[name] for name in DIFFERENTIABLE)) + _bytes_of_results(inputs)


def _bytes_backward(inputs: Mapping[str, Any]) -> int:
    """Gradients of the results and both inputs are read, those of the inputs written, once where they are one."""
    x, branch = inputs["x"], inputs["branch"]
    written = nbytes(x) if x.dtype == branch.dtype else nbytes(x, branch)
    affine = [inputs[name] for name in ("weight", "bias")]
    return _bytes_of_results(inputs) + nbytes(x, branch, *affine) + written + nbytes(inputs["weight"])


SPEC = OperatorSpec(
    name="residual_layer_norm",
    operator=residual_layer_norm,
    reference=residual_layer_norm_reference,
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
    flops_forward=lambda inputs: 9 * inputs["x"].numel(),
    flops_backward=lambda inputs: 18 * inputs["x"].numel(),
)
