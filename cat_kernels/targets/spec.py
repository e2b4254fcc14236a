"""Specification of `average_targets`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._ops import ops
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import average_targets
from .reference import average_targets_reference

# name: blocks, clips B, patches L, width D
SHAPES = {
    "plain": (3, 2, 20, 24),
    "longer": (3, 3, 28, 24),
    "odd": (2, 3, 35, 17),
    "wide": (1, 1, 9, 130),
    "one patch": (2, 2, 1, 8),
    "one channel": (2, 2, 8, 1),
    "empty batch": (2, 0, 12, 8),
}


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (blocks, B, L, D) in SHAPES.items():
        random = Random(device)
        layers = [random.normal(B, L, D, dtype=dtype) for _ in range(blocks)]
        partial = random.normal(B, L, D)
        # Targets at once, a running sum from nothing, one more block onto it, and the last block.
        yield Sample(name=name, inputs={"layers": layers, "num_layers": blocks}, differentiable=("layers",))
        yield Sample(name=f"{name}, sum", inputs={"layers": layers}, differentiable=("layers",))
        both = {"layers": layers, "partial": partial}
        yield Sample(name=f"{name}, onto a sum", inputs=both, differentiable=tuple(both))
        last = {**both, "num_layers": blocks + 2}
        yield Sample(name=f"{name}, last block", inputs=last, differentiable=tuple(both))
    # A mean far from zero, where a variance from sums of squares would cancel.
    shifted = [random.normal(2, 20, 24, dtype=dtype) + 100]
    yield Sample(name="far mean", inputs={"layers": shifted, "num_layers": 1}, differentiable=("layers",))
    only = {"layers": [], "partial": random.normal(2, 20, 24), "num_layers": 4, "eps": 1e-3}
    yield Sample(name="only a sum", inputs=only, differentiable=("partial",))


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    layers, partial = i["layers"], i.get("partial")
    num_layers, eps = i.get("num_layers"), i.get("eps", 1e-5)
    yield ops.average_targets.default, (layers, partial, num_layers, eps)
    template = partial if partial is not None else layers[0]
    grad = torch.ones(template.shape, device=template.device)
    detached = [layer.detach() for layer in layers]
    yield (
        ops.average_targets_backward.default,
        (grad, detached, None if partial is None else partial.detach(), num_layers, eps),
    )


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x = Random(device).normal(2, 6, 4)

    def bad(name: str, error: type[Exception], message: str, **inputs: Any) -> BadInput:
        return BadInput(name=name, inputs=inputs, error=error, message=message)

    yield bad("one tensor", TypeError, r"layers must be a list.*wrap it: \[tensor\]", layers=x)
    yield bad("nothing", ValueError, r"layers is empty and partial is None", layers=[])
    yield bad("rank", ValueError, r"layers\[1\] must have 3 dimensions \(B, L, D\)", layers=[x, x[0]])
    yield bad("integer", TypeError, r"layers\[0\] must be a floating-point tensor, got torch.int64", layers=[x.long()])
    yield bad(
        "shapes", ValueError, r"layers\[1\] has shape \(2, 5, 4\) and layers\[0\] \(2, 6, 4\)", layers=[x, x[:, 1:]]
    )
    yield bad(
        "low sum", TypeError, r"partial must be the float32.*got torch.bfloat16", layers=[x], partial=x.bfloat16()
    )
    yield bad("count", ValueError, r"num_layers=0 must be the number of blocks", layers=[x], num_layers=0)
    yield bad("eps", ValueError, r"eps=0.0 must be positive", layers=[x], eps=0.0)


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    L, D = 64, 128
    B = elements // (L * D) + 1
    layer = torch.randn(B, L, D, device=device, dtype=torch.bfloat16)
    yield LargeSample(
        name="large batch",
        inputs={"layers": [layer], "num_layers": 1},
        small={"layers": [layer[-3:].clone()], "num_layers": 1},
        part=lambda y: y[-3:],
        differentiable=("layers",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    B, L, D = clips, 512, 768
    # As they come from the teacher: with the CLS row cut off.
    layers = [torch.randn(B, 1 + L, D, device=device, dtype=dtype)[:, 1:] for _ in range(11)]
    return Sample(name="base", inputs={"layers": layers, "num_layers": 11})


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    """Everything in once, the sum or the targets out once."""
    layers, partial = inputs["layers"], inputs.get("partial")
    template = partial if partial is not None else layers[0]
    return nbytes(*layers, partial) + 4 * template.numel()


SPEC = OperatorSpec(
    name="average_targets",
    operator=average_targets,
    reference=average_targets_reference,
    samples=_samples,
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain", "longer"),
    interpreted_dtypes=(torch.float32, torch.bfloat16),
    triton_samples=(
        "plain",
        "plain, onto a sum",
        "odd, sum",
        "odd, last block",
        "wide",
        "one patch, last block",
        "one channel",
        "empty batch",
        "far mean",
        "only a sum",
    ),
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    # About 8 operations an element: mean, squares, centring, scale and sum.
    flops_forward=lambda inputs: 8 * sum(layer.numel() for layer in inputs["layers"]),
)
