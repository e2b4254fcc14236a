"""Specification of `masked_regression_loss`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cat_kernels.loss.op import masked_regression_loss
from cat_kernels.loss.reference import masked_regression_loss_reference
from cat_kernels.spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes

# name: clips B, masks M, patches L, masked places a row, width D
SHAPES = {
    "plain": (2, 3, 20, 14, 24),
    "longer": (4, 3, 26, 18, 24),
    "odd": (3, 1, 35, 28, 17),
    "wide": (1, 2, 9, 5, 130),
    "all masked": (2, 2, 12, 12, 8),
    "one masked": (2, 2, 12, 1, 8),
    "one patch": (2, 2, 1, 1, 5),
    "nothing masked": (2, 2, 6, 0, 5),
    "empty batch": (0, 2, 12, 4, 8),
}


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (B, M, L, masked, D) in SHAPES.items():
        random = Random(device)
        inputs = {
            "pred": random.normal(B * M, L, D, dtype=dtype),
            "targets": random.normal(B, L, D),
            "mask": random.mask(B * M, L, masked),
        }
        sample = Sample(name=name, inputs=inputs, differentiable=("pred", "targets"))
        yield sample
        yield sample.with_inputs(f"{name}, sum", reduction="sum")
        if name == "plain":
            yield sample.with_inputs("low-precision targets", targets=inputs["targets"].to(dtype))
            unread = inputs["pred"].masked_fill(~inputs["mask"][..., None], float("nan"))
            yield sample.with_inputs("NaN where nothing is masked", pred=unread)


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    ops = torch.ops.cat_kernels
    i = sample.inputs
    arguments = (i["pred"], i["targets"], i["mask"], i.get("reduction", "mean"))
    yield ops.masked_regression_loss.default, arguments
    dtype = torch.promote_types(torch.promote_types(i["pred"].dtype, i["targets"].dtype), torch.float32)
    grad = torch.ones((), dtype=dtype, device=i["pred"].device)
    detached = (grad, i["pred"].detach(), i["targets"].detach(), *arguments[2:])
    yield ops.masked_regression_loss_backward_pred.default, detached
    yield ops.masked_regression_loss_backward_targets.default, detached


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    pred, targets, mask = good["pred"], good["targets"], good["mask"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("pred rank", ValueError, r"pred must have 3 dimensions \(N, L, D\)", pred=pred[0])
    yield bad(
        "mask of integers", TypeError, r"boolean tensor.*got torch.int64; convert it with .bool\(\)", mask=mask.long()
    )
    yield bad("mask shape", ValueError, r"mask must be \(N, L\) = \(6, 20\).*got \(6, 19\)", mask=mask[:, 1:])
    yield bad("patches", ValueError, r"dimension 1 must be 20, the patches L of pred", targets=targets[:, 1:])
    yield bad("width", ValueError, r"dimension 2 must be 24, the width D of pred", targets=targets[..., 1:])
    yield bad("clips", ValueError, r"pred has 6 rows and targets 4 clips", targets=torch.cat((targets, targets)))
    yield bad("reduction", ValueError, r"reduction='none' must be 'mean' or 'sum'", reduction="none")


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    L, D = 64, 128
    B = elements // (L * D) + 1
    pred = torch.randn(B, L, D, device=device, dtype=torch.bfloat16)
    targets = torch.randn(B, L, D, device=device, dtype=torch.bfloat16)
    mask = torch.zeros(B, L, dtype=torch.bool, device=device)
    mask[-3:] = Random(device).mask(3, L, 50)
    yield LargeSample(
        name="large batch",
        inputs={"pred": pred, "targets": targets, "mask": mask},
        small={"pred": pred[-3:].clone(), "targets": targets[-3:].clone(), "mask": mask[-3:]},
        part=lambda loss: loss,
        differentiable=("pred",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    N, L, D = clips * 4, 512, 768
    inputs = {
        "pred": torch.randn(N, L, D, device=device, dtype=dtype),
        "targets": torch.randn(clips, L, D, device=device, dtype=dtype),
        "mask": Random(device).mask(N, L, 410),
    }
    return Sample(name="base", inputs=inputs, differentiable=("pred",))


def _masked_bytes(inputs: Mapping[str, Any]) -> int:
    mask, pred = inputs["mask"], inputs["pred"]
    return int(mask.sum()) * pred.shape[2] * pred.element_size()


SPEC = OperatorSpec(
    name="masked_regression_loss",
    operator=masked_regression_loss,
    reference=masked_regression_loss_reference,
    samples=_samples,
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain", "longer"),
    benchmark=_benchmark,
    bytes_forward=lambda inputs: _masked_bytes(inputs) + nbytes(inputs["targets"], inputs["mask"]),
    # Predictions and targets in again, the gradient out.
    bytes_backward=lambda inputs: _masked_bytes(inputs) + nbytes(inputs["targets"], inputs["mask"], inputs["pred"]),
    flops_forward=lambda inputs: 3 * int(inputs["mask"].sum()) * inputs["pred"].shape[2],
    flops_backward=lambda inputs: 2 * int(inputs["mask"].sum()) * inputs["pred"].shape[2],
)
