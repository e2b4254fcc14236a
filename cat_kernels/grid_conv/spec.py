"""Specification of `grouped_conv2d`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._ops import ops
from ..backends import INTERPRETED
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import grouped_conv2d
from .reference import grouped_conv2d_reference

# name: images N, lines H, places W, groups, channels of a group in and out, kernel k
SHAPES = {
    "plain": (2, 5, 7, 2, 6, 5, 3),
    "longer": (4, 9, 8, 2, 6, 5, 3),
    "few": (1, 2, 3, 2, 3, 2, 3),
    "many rows": (5, 1, 14, 1, 5, 7, 3),
    "tall": (1, 20, 1, 1, 2, 3, 3),
    "uneven groups": (1, 1, 3, 1, 20, 33, 3),
    "one tap": (2, 3, 2, 1, 3, 2, 1),
    "wide taps": (1, 1, 3, 1, 2, 3, 5),
    "wide groups": (1, 2, 2, 1, 70, 5, 3),
    "one channel a group": (2, 3, 3, 4, 1, 1, 3),
    "one place": (4, 1, 1, 2, 6, 4, 3),
    "empty batch": (0, 3, 4, 2, 4, 3, 3),
}
# What the interpreter runs, at half a second to two a sample; compiled, the kernels run on all.
INTERPRETED_SAMPLES = (
    "few",
    "few, without bias",
    "few, bias alone",
    "many rows",
    "uneven groups",
    "one tap",
    "wide taps",
    "empty batch",
)
DIFFERENTIABLE = ("x", "weight", "bias")


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (N, H, W, G, I, O, k) in SHAPES.items():
        random = Random(device)
        inputs: dict[str, Any] = {
            "x": random.normal(N, H, W, G * I, dtype=dtype),
            "weight": random.normal(G * O, I, k, k) / math.sqrt(I * k * k),
            "bias": random.normal(G * O),
            "groups": G,
        }
        sample = Sample(name=name, inputs=inputs, differentiable=DIFFERENTIABLE)
        yield sample
        if name in ("plain", "few"):
            low = {key: inputs[key].to(dtype) for key in ("weight", "bias")}
            yield sample.with_inputs(f"{name}, one dtype", **low)
            yield Sample(
                name=f"{name}, without bias", inputs={**inputs, "bias": None}, differentiable=DIFFERENTIABLE[:2]
            )
            yield Sample(name=f"{name}, input alone", inputs=inputs, differentiable=("x",))
            yield Sample(name=f"{name}, bias alone", inputs=inputs, differentiable=("bias",))


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    x, weight, bias, groups = (sample.inputs[name] for name in ("x", "weight", "bias", "groups"))
    yield ops.grouped_conv2d.default, (x, weight, bias, groups)
    grad = x.detach().new_ones(*x.shape[:3], weight.shape[0])
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        yield ops.grouped_conv2d_backward.default, (grad, x.detach(), weight.detach(), groups, *wanted)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    x, weight, bias = good["x"], good["weight"], good["bias"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("x no tensor", TypeError, r"x must be a tensor \(N, H, W, C\), got list", x=[1.0])
    yield bad("x integer", TypeError, r"floating-point tensor, got torch.int64.*\.float\(\)", x=x.long())
    yield bad("x rank", ValueError, r"4 dimensions \(N, H, W, C\), got shape \(5, 7, 12\)", x=x[0])
    yield bad("x channels first", ValueError, r"must be an int that divides 5 channels in", x=x.permute(0, 3, 2, 1))
    yield bad("groups", ValueError, r"groups=5 must be an int that divides 12 channels in and 10 out", groups=5)
    yield bad("groups float", ValueError, r"groups=2.0 must be an int", groups=2.0)
    yield bad(
        "weight width",
        ValueError,
        r"weight has .*; dimension 1 must be 6, the",
        weight=weight[:, 1:],
    )
    yield bad("even taps", ValueError, r"k x k with k odd; use torch.nn", weight=weight[..., :2, :2])
    yield bad("oblong taps", ValueError, r"k x k with k odd; use torch.nn", weight=weight[..., :1])
    yield bad("bias width", ValueError, r"bias has shape \(9,\); dimension 0 must be 10", bias=bias[1:])
    yield bad("backend", ValueError, r"unknown backend 'cuda'; expected 'auto' or one of 'triton'", backend="cuda")
    if device.type == "cuda":
        yield bad("device", ValueError, r"weight is on cpu and x on cuda:0; move it", weight=weight.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    H, W, G, I = 16, 8, 4, 48
    N = elements // (H * W * G * I) + 1
    random = Random(device)
    x = torch.randn(N, H, W, G * I, device=device, dtype=torch.bfloat16)
    shared = {"weight": random.normal(G * I, I, 3, 3) / 20, "bias": random.normal(G * I), "groups": G}
    yield LargeSample(
        name="large batch",
        inputs={"x": x, **shared},
        small={"x": x[-3:].clone(), **shared},
        part=lambda y: y[-3:],
        differentiable=("x",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    """A layer of the base model's decoder, one mask a clip."""
    random = Random(device)
    H, W, G, C = 64, 8, 16, 768
    inputs = {
        "x": torch.randn(clips, H, W, C, device=device).to(dtype),
        "weight": random.normal(C, C // G, 3, 3) / math.sqrt(9 * C / G),
        "bias": random.normal(C),
        "groups": G,
    }
    return Sample(name="base", inputs=inputs, differentiable=DIFFERENTIABLE)


def _out_bytes(inputs: Mapping[str, Any]) -> int:
    x, weight = inputs["x"], inputs["weight"]
    return x.numel() // x.shape[3] * weight.shape[0] * x.element_size()


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    return nbytes(inputs["x"], inputs["weight"], inputs["bias"]) + _out_bytes(inputs)


def _bytes_backward(inputs: Mapping[str, Any]) -> int:
    """x and the incoming gradient once each, and the three gradients; weights are small."""
    return 2 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]) + nbytes(inputs["bias"]) + _out_bytes(inputs)


def _flops_forward(inputs: Mapping[str, Any]) -> int:
    x, weight = inputs["x"], inputs["weight"]
    return 2 * (x.numel() // x.shape[3]) * weight.numel()


SPEC = OperatorSpec(
    name="grouped_conv2d",
    operator=grouped_conv2d,
    reference=grouped_conv2d_reference,
    samples=_samples,
    autocast_inputs=("x",),
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain", "longer"),
    triton_samples=INTERPRETED_SAMPLES if INTERPRETED else (),
    interpreted_dtypes=(torch.bfloat16,) if INTERPRETED else None,
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    bytes_backward=_bytes_backward,
    flops_forward=_flops_forward,
    flops_backward=lambda inputs: 2 * _flops_forward(inputs),
)
