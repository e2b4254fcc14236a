"""Specification of `gather_tokens`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._ops import ops
from ..backends import INTERPRETED
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import gather_tokens
from .reference import gather_tokens_reference

# name: clips B, masks M, patches L, visible K, width D
SHAPES = {
    "plain": (2, 3, 20, 7, 24),
    "longer": (2, 3, 26, 8, 24),
    "odd": (3, 1, 35, 7, 17),
    "wide": (1, 2, 9, 4, 130),
    "K = L": (2, 2, 12, 12, 8),
    "K = 1": (2, 2, 12, 1, 8),
    "one patch": (2, 2, 1, 1, 5),
    "empty batch": (0, 2, 12, 4, 8),
    "few": (2, 2, 4, 3, 12),
}
# What the interpreter runs, at a tenth of a second a sample; compiled, the kernels run on all.
INTERPRETED_SAMPLES = (
    "few",
    "few, select=False",
    "few, all patches",
    "few, one dtype",
    "few, repeated patches",
    "few, without positions",
    "few, without cls_token, select=False",
    "few, without positions and cls_token",
    "few, without positions and cls_token, all patches",
    "one patch",
    "empty batch",
)
DIFFERENTIABLE = ("tokens", "positions", "cls_token")


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (B, M, L, K, D) in SHAPES.items():
        random = Random(device)
        visible = random.visible(B * M, L, K)
        tokens = random.normal(B, L, D, dtype=dtype)
        table = {"positions": random.normal(L + 3, D), "cls_token": random.normal(D)}
        inputs = {"tokens": tokens, "visible": visible, **table}
        sample = Sample(name=name, inputs=inputs, differentiable=DIFFERENTIABLE)
        yield sample
        selected = random.normal(B * M, K, D, dtype=dtype)
        yield sample.with_inputs(f"{name}, select=False", tokens=selected, select=False)
        if name in ("few", "empty batch"):
            yield sample.with_inputs(f"{name}, all patches", visible=None)
            low = {key: value.to(dtype) for key, value in table.items()}
            yield sample.with_inputs(f"{name}, one dtype", **low)
            for without in (("positions",), ("cls_token",), ("positions", "cls_token")):
                bare = Sample(
                    name=f"{name}, without {' and '.join(without)}",
                    inputs={**inputs, **dict.fromkeys(without)},
                    differentiable=tuple(key for key in DIFFERENTIABLE if key not in without),
                )
                yield bare
                yield bare.with_inputs(f"{bare.name}, select=False", tokens=selected, select=False)
                yield bare.with_inputs(f"{bare.name}, all patches", visible=None)
            # The gradient of a patch that a list names more than once is a sum within the list.
            yield sample.with_inputs(f"{name}, repeated patches", visible=visible % 2)


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    tokens, visible, positions = i["tokens"], i["visible"], i["positions"]
    select = i.get("select", True)
    yield ops.gather_tokens.default, (tokens, visible, positions, i["cls_token"], select)
    if visible is None:
        return
    grad = tokens.detach().new_ones(*visible.shape, tokens.shape[2])
    if select:
        yield ops.gather_tokens_backward.default, (grad, visible, *tokens.shape[:2], tokens.dtype)
    if positions is not None:
        yield ops.gather_tokens_backward.default, (grad, visible, 1, positions.shape[0], positions.dtype)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    tokens, visible, positions, cls = (good[name] for name in ("tokens", "visible", "positions", "cls_token"))

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("tokens no tensor", TypeError, r"tokens must be a tensor \(B, L, D\), got list", tokens=[1.0])
    yield bad("tokens integer", TypeError, r"floating-point tensor, got torch.int64.*\.float\(\)", tokens=tokens.long())
    yield bad("tokens rank", ValueError, r"3 dimensions \(B, L, D\), got shape \(20, 24\)", tokens=tokens[0])
    yield bad(
        "positions width",
        ValueError,
        r"positions has shape \(23, 23\); dimension 1 must be 24",
        positions=positions[:, 1:],
    )
    yield bad("cls_token width", ValueError, r"cls_token has shape \(23,\); dimension 0 must be 24", cls_token=cls[1:])
    yield bad("positions short", ValueError, r"positions has 19 rows for 20 patches; build", positions=positions[:19])
    yield bad("visible mask", TypeError, r"patch indices \(N, K\), got a boolean mask", visible=visible > 3)
    yield bad("visible int32", TypeError, r"must be int64, got torch.int32.*\.long\(\)", visible=visible.int())
    yield bad(
        "visible rows", ValueError, r"visible has 5 rows and tokens 2 clips; the rows must be", visible=visible[:5]
    )
    yield bad("select", ValueError, r"select=False.*pass select=True for tokens \(B, L, D\)", select=False)
    yield bad("backend", ValueError, r"unknown backend 'cuda'; expected 'auto' or one of 'triton'", backend="cuda")
    if device.type == "cpu":
        too_high = visible.clone()
        too_high[4, 2] = 20
        yield bad(
            "index", IndexError, r"visible\[4, 2\] = 20, but there are 20 patches; expected 0 to 19", visible=too_high
        )
        yield bad("negative index", IndexError, r"= -1, but there are 20 patches", visible=visible - visible.amin() - 1)
    else:
        yield bad("device", ValueError, r"positions is on cpu and tokens on cuda:0; move it", positions=positions.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    L, K, D = 64, 48, 128
    B = elements // (L * D) + 1
    dtype = torch.bfloat16
    random = Random(device)
    visible = random.visible(4, L, K).repeat(B // 4 + 1, 1)[:B]
    tokens = torch.randn(B, L, D, device=device, dtype=dtype)
    shared = {"positions": random.normal(L, D), "cls_token": random.normal(D)}
    yield LargeSample(
        name="large batch",
        inputs={"tokens": tokens, "visible": visible, **shared},
        small={"tokens": tokens[-3:].clone(), "visible": visible[-3:], **shared},
        part=lambda y: y[-3:],
        differentiable=("tokens",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    B, M, L, K, D = clips, 4, 512, 102, 768
    random = Random(device)
    inputs = {
        "tokens": torch.randn(B * M, K, D, device=device, dtype=dtype),
        "visible": random.visible(B * M, L, K),
        "positions": random.normal(L, D),
        "cls_token": random.normal(D),
        "select": False,
    }
    return Sample(name="base", inputs=inputs, differentiable=("tokens", "cls_token"))


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    tokens, visible = inputs["tokens"], inputs["visible"]
    N, K = tokens.shape[:2] if visible is None else visible.shape
    D, size = tokens.shape[2], tokens.element_size()
    positions, cls_token = inputs["positions"], inputs["cls_token"]
    S = K + (cls_token is not None)
    # Rows read and written; the position table stays in cache.
    return N * K * D * size + N * S * D * size + nbytes(visible, positions, cls_token)


SPEC = OperatorSpec(
    name="gather_tokens",
    operator=gather_tokens,
    reference=gather_tokens_reference,
    samples=_samples,
    autocast_inputs=("tokens",),
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain", "longer"),
    triton_samples=INTERPRETED_SAMPLES if INTERPRETED else (),
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    bytes_backward=_bytes_forward,
    flops_forward=lambda inputs: _bytes_forward(inputs) // (2 * inputs["tokens"].element_size()),
)
