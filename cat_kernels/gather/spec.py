"""Specification of `gather_tokens`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cat_kernels.gather.op import gather_tokens
from cat_kernels.gather.reference import gather_tokens_reference
from cat_kernels.spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes

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
}
DIFFERENTIABLE = ("tokens", "pos", "cls")


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (B, M, L, K, D) in SHAPES.items():
        random = Random(device)
        visible = random.visible(B * M, L, K)
        tokens = random.normal(B, L, D, dtype=dtype)
        inputs = {"tokens": tokens, "visible": visible, "pos": random.normal(L + 3, D), "cls": random.normal(D)}
        sample = Sample(name=name, inputs=inputs, differentiable=DIFFERENTIABLE)
        yield sample
        selected = random.normal(B * M, K, D, dtype=dtype)
        yield sample.with_inputs(f"{name}, select=False", tokens=selected, select=False)
        if name in ("plain", "empty batch"):
            yield sample.with_inputs(f"{name}, all patches", visible=None)
            low = {key: inputs[key].to(dtype) for key in ("pos", "cls")}
            yield sample.with_inputs(f"{name}, one dtype", **low)


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    ops = torch.ops.cat_kernels
    i = sample.inputs
    tokens, visible, pos = i["tokens"], i["visible"], i["pos"]
    select = i.get("select", True)
    yield ops.gather_tokens.default, (tokens, visible, pos, i["cls"], select)
    N, K = tokens.shape[:2] if visible is None else visible.shape
    grad = tokens.detach().new_ones(N, 1 + K, tokens.shape[2])
    yield ops.gather_tokens_backward_pos.default, (grad, visible, pos.shape[0], pos.dtype)
    if visible is not None and select:
        yield ops.gather_tokens_backward_tokens.default, (grad, visible, *tokens.shape[:2])


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    tokens, visible, pos, cls = (good[name] for name in ("tokens", "visible", "pos", "cls"))

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("tokens no tensor", TypeError, r"tokens must be a tensor \(B, L, D\), got list", tokens=[1.0])
    yield bad("tokens integer", TypeError, r"floating-point tensor, got torch.int64.*\.float\(\)", tokens=tokens.long())
    yield bad("tokens rank", ValueError, r"3 dimensions \(B, L, D\), got shape \(20, 24\)", tokens=tokens[0])
    yield bad("pos width", ValueError, r"pos has shape \(23, 23\); dimension 1 must be 24", pos=pos[:, 1:])
    yield bad("cls width", ValueError, r"cls has shape \(23,\); dimension 0 must be 24", cls=cls[1:])
    yield bad("pos short", ValueError, r"pos has 19 rows for 20 patches; build a longer", pos=pos[:19])
    yield bad("visible mask", TypeError, r"patch indices \(N, K\), got a boolean mask", visible=visible > 3)
    yield bad("visible int32", TypeError, r"must be int64, got torch.int32.*\.long\(\)", visible=visible.int())
    yield bad(
        "visible rows", ValueError, r"visible has 5 rows and tokens 2 clips; the rows must be", visible=visible[:5]
    )
    yield bad("select", ValueError, r"select=False.*pass select=True for tokens \(B, L, D\)", select=False)
    yield bad("backend", ValueError, r"unknown backend 'cuda'; expected 'auto' or one of 'torch'", backend="cuda")
    if device.type == "cpu":
        too_high = visible.clone()
        too_high[4, 2] = 20
        yield bad(
            "index", IndexError, r"visible\[4, 2\] = 20, but there are 20 patches; expected 0 to 19", visible=too_high
        )
        yield bad("negative index", IndexError, r"= -1, but there are 20 patches", visible=visible - visible.amin() - 1)
    else:
        yield bad("device", ValueError, r"pos is on cpu and tokens on cuda:0; move it", pos=pos.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    L, K, D = 64, 48, 128
    B = elements // (L * D) + 1
    dtype = torch.bfloat16
    random = Random(device)
    visible = random.visible(4, L, K).repeat(B // 4 + 1, 1)[:B]
    tokens = torch.randn(B, L, D, device=device, dtype=dtype)
    shared = {"pos": random.normal(L, D), "cls": random.normal(D)}
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
        "pos": random.normal(L, D),
        "cls": random.normal(D),
        "select": False,
    }
    return Sample(name="base", inputs=inputs, differentiable=("tokens", "cls"))


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    tokens, visible = inputs["tokens"], inputs["visible"]
    N, K = tokens.shape[:2] if visible is None else visible.shape
    D, size = tokens.shape[2], tokens.element_size()
    # Rows read and written; the position table stays in cache.
    return N * K * D * size + N * (1 + K) * D * size + nbytes(visible, inputs["pos"], inputs["cls"])


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
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    bytes_backward=_bytes_forward,
    flops_forward=lambda inputs: _bytes_forward(inputs) // (2 * inputs["tokens"].element_size()),
)
