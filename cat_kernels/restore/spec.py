"""Specification of `restore_tokens`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cat_kernels.restore.op import restore_tokens
from cat_kernels.restore.reference import restore_tokens_reference
from cat_kernels.spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes

# name: clip-clones N, patches L, visible K, width D
SHAPES = {
    "plain": (6, 20, 7, 24),
    "longer": (8, 26, 8, 24),
    "odd": (3, 35, 7, 17),
    "wide": (2, 9, 4, 130),
    "K = L": (4, 12, 12, 8),
    "K = 1": (4, 12, 1, 8),
    "one patch": (4, 1, 1, 5),
    "empty batch": (0, 12, 4, 8),
}


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (N, L, K, D) in SHAPES.items():
        random = Random(device)
        rng = torch.tensor([1234567890123, (5 << 32) + 3], device=device)
        inputs = {
            "tokens": random.normal(N, K, D, dtype=dtype),
            "visible": random.visible(N, L, K),
            "length": L,
            "rng": rng,
        }
        sample = Sample(name=name, inputs=inputs, differentiable=("tokens",))
        # Noise as large as the tokens, so that an error in it shows; and the sigma of training.
        yield sample.with_inputs(f"{name}, sigma 1", sigma=1.0)
        if name == "plain":
            yield sample
            yield sample.with_inputs("no noise", sigma=0.0)
            yield sample.with_inputs("negative seed and offset", rng=torch.tensor([-7, -2], device=device), sigma=0.5)


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    ops = torch.ops.cat_kernels
    i = sample.inputs
    tokens, visible, length = i["tokens"], i["visible"], i["length"]
    yield ops.restore_tokens.default, (tokens, visible, length, i["rng"], i.get("sigma", 0.01))
    grad = tokens.detach().new_ones(tokens.shape[0], length, tokens.shape[2])
    yield ops.restore_tokens_backward.default, (grad, visible)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    tokens, visible, rng = good["tokens"], good["visible"], good["rng"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("tokens rank", ValueError, r"3 dimensions \(N, K, D\), got shape \(7, 24\)", tokens=tokens[0])
    yield bad(
        "visible shape", ValueError, r"\(N, K\) = \(6, 7\), one index per token, got \(6, 6\)", visible=visible[:, 1:]
    )
    yield bad("visible list", TypeError, r"visible must be an int64 tensor \(N, K\), got list", visible=[[0]])
    yield bad("length", ValueError, r"length=5 patches cannot hold 7 visible ones", length=5)
    yield bad("rng float", TypeError, r"rng must be an int64 tensor \(2,\).*got torch.float32", rng=rng.float())
    yield bad("rng tuple", TypeError, r"got tuple; make it with torch.tensor", rng=(1, 2))
    yield bad("sigma", ValueError, r"sigma=-0.1 must be a standard deviation", sigma=-0.1)
    yield bad("sigma NaN", ValueError, r"sigma=nan must be a standard deviation", sigma=float("nan"))
    if device.type == "cpu":
        repeated = visible.clone()
        repeated[3, 1] = repeated[3, 0]
        patch = int(repeated[3, 0])
        yield bad("repeated", ValueError, rf"visible\[3\] lists patch {patch} twice.*distinct", visible=repeated)
        yield bad("index", IndexError, r"but there are 20 patches; expected 0 to 19", visible=visible + 20)
    else:
        yield bad("rng device", ValueError, r"rng is on cpu and tokens on cuda:0; move it", rng=rng.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    L, K, D = 64, 16, 128
    N = elements // (L * D) + 1
    random = Random(device)
    visible = random.visible(4, L, K).repeat(N // 4 + 1, 1)[:N]
    tokens = torch.randn(N, K, D, device=device, dtype=torch.bfloat16)
    rng = torch.tensor([11, 1 << 40], device=device)
    # The noise of the last three rows, as a stream of its own: four elements a counter.
    skip = torch.tensor([0, (N - 3) * L * D // 4], device=device)
    shared = {"length": L, "sigma": 1.0}
    yield LargeSample(
        name="large batch",
        inputs={"tokens": tokens, "visible": visible, "rng": rng, **shared},
        small={"tokens": tokens[-3:].clone(), "visible": visible[-3:], "rng": rng + skip, **shared},
        part=lambda y: y[-3:],
        differentiable=("tokens",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    N, L, K, D = clips * 4, 512, 102, 768
    inputs = {
        "tokens": torch.randn(N, K, D, device=device, dtype=dtype),
        "visible": Random(device).visible(N, L, K),
        "length": L,
        "rng": torch.tensor([0, 0], device=device),
    }
    return Sample(name="base", inputs=inputs, differentiable=("tokens",))


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    tokens = inputs["tokens"]
    out = tokens.shape[0] * inputs["length"] * tokens.shape[2] * tokens.element_size()
    return nbytes(tokens, inputs["visible"]) + out


def _bytes_backward(inputs: Mapping[str, Any]) -> int:
    # The visible rows of the gradient in, as many rows out.
    return 2 * nbytes(inputs["tokens"]) + nbytes(inputs["visible"])


SPEC = OperatorSpec(
    name="restore_tokens",
    operator=restore_tokens,
    reference=restore_tokens_reference,
    samples=_samples,
    autocast_inputs=("tokens",),
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    large_samples=_large_samples,
    resized=("plain, sigma 1", "longer, sigma 1"),
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    bytes_backward=_bytes_backward,
)
