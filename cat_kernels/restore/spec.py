"""Specification of `restore_tokens`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._ops import ops
from ..backends import INTERPRETED
from ..spec import BadInput, LargeSample, OperatorSpec, Random, Sample, nbytes
from .op import restore_tokens
from .reference import restore_tokens_reference

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
    "few": (2, 3, 2, 12),
    "few, odd": (2, 3, 2, 17),
    "few, wide": (1, 2, 1, 384),
}
# What the interpreter runs, at a twentieth of a second a row of noise; compiled, the kernels run on all.
INTERPRETED_SAMPLES = (
    "few, std 1",
    "few, odd, std 1",
    "few, wide, std 1",
    "negative seed and offset",
    "seed as an int",
    "one patch, std 1",
    "empty batch, std 1",
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, (N, L, K, D) in SHAPES.items():
        random = Random(device)
        seed = torch.tensor([1234567890123, (5 << 32) + 3], device=device)
        inputs = {
            "tokens": random.normal(N, K, D, dtype=dtype),
            "visible": random.visible(N, L, K),
            "num_patches": L,
            "seed": seed,
        }
        sample = Sample(name=name, inputs=inputs, differentiable=("tokens",))
        # Noise as large as the tokens, so that an error in it shows; and the noise of training.
        yield sample.with_inputs(f"{name}, std 1", noise_std=1.0)
        if name == "plain":
            yield sample
            yield sample.with_inputs("no noise", noise_std=0.0)
        if name == "few":
            yield sample.with_inputs(
                "negative seed and offset", seed=torch.tensor([-7, -2], device=device), noise_std=0.5
            )


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    i = sample.inputs
    tokens, visible, L = i["tokens"], i["visible"], i["num_patches"]
    if isinstance(i["seed"], int):
        return
    yield ops.restore_tokens.default, (tokens, visible, L, i["seed"], i.get("noise_std", 0.01))
    grad = tokens.detach().new_ones(tokens.shape[0], L, tokens.shape[2])
    yield ops.restore_tokens_backward.default, (grad, visible)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = next(_samples(device, torch.float32)).inputs
    tokens, visible, seed = good["tokens"], good["visible"], good["seed"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad("tokens rank", ValueError, r"3 dimensions \(N, K, D\), got shape \(7, 24\)", tokens=tokens[0])
    yield bad(
        "visible shape", ValueError, r"\(N, K\) = \(6, 7\), one index per token, got \(6, 6\)", visible=visible[:, 1:]
    )
    yield bad("visible list", TypeError, r"visible must be an int64 tensor \(N, K\), got list", visible=[[0]])
    yield bad("num_patches", ValueError, r"num_patches=5 cannot hold 7 visible ones", num_patches=5)
    yield bad("seed float", TypeError, r"seed must be an int64 tensor \(2,\).*got torch.float32", seed=seed.float())
    yield bad("seed tuple", TypeError, r"or an int, got tuple; make it with torch.tensor", seed=(1, 2))
    yield bad("noise_std", ValueError, r"noise_std=-0.1 must be a standard deviation", noise_std=-0.1)
    yield bad("noise_std NaN", ValueError, r"noise_std=nan must be a standard deviation", noise_std=float("nan"))
    if device.type == "cpu":
        repeated = visible.clone()
        repeated[3, 1] = repeated[3, 0]
        patch = int(repeated[3, 0])
        yield bad("repeated", ValueError, rf"visible\[3\] lists patch {patch} twice.*distinct", visible=repeated)
        yield bad("index", IndexError, r"but there are 20 patches; expected 0 to 19", visible=visible + 20)
    else:
        yield bad("seed device", ValueError, r"seed is on cpu and tokens on cuda:0; move it", seed=seed.cpu())


def _large_samples(device: torch.device, elements: int) -> Iterator[LargeSample]:
    L, K, D = 64, 16, 128
    N = elements // (L * D) + 1
    random = Random(device)
    visible = random.visible(4, L, K).repeat(N // 4 + 1, 1)[:N]
    tokens = torch.randn(N, K, D, device=device, dtype=torch.bfloat16)
    seed = torch.tensor([11, 1 << 40], device=device)
    # The noise of the last three rows, as a stream of its own: four elements a counter.
    skip = torch.tensor([0, (N - 3) * L * D // 4], device=device)
    shared = {"num_patches": L, "noise_std": 1.0}
    yield LargeSample(
        name="large batch",
        inputs={"tokens": tokens, "visible": visible, "seed": seed, **shared},
        small={"tokens": tokens[-3:].clone(), "visible": visible[-3:], "seed": seed + skip, **shared},
        part=lambda y: y[-3:],
        differentiable=("tokens",),
        grad_parts=(lambda g: g[-3:],),
    )


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    N, L, K, D = clips * 4, 512, 102, 768
    inputs = {
        "tokens": torch.randn(N, K, D, device=device, dtype=dtype),
        "visible": Random(device).visible(N, L, K),
        "num_patches": L,
        "seed": torch.tensor([0, 0], device=device),
    }
    return Sample(name="base", inputs=inputs, differentiable=("tokens",))


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    tokens = inputs["tokens"]
    out = tokens.shape[0] * inputs["num_patches"] * tokens.shape[2] * tokens.element_size()
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
    resized=("plain, std 1", "longer, std 1"),
    triton_samples=INTERPRETED_SAMPLES if INTERPRETED else (),
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
    bytes_backward=_bytes_backward,
)
