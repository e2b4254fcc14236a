"""Specification of `MultiResConv`: sample inputs, the oracle, bytes and FLOPs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..spec import BadInput, OperatorSpec, Sample
from .module import MultiResConv

Settings = tuple[tuple[int, ...], tuple[int, ...], int]  # resolutions, channels, embed_dim

# Every resolution set of the paper, narrow, with a width that is no power of two.
RESOLUTION_SETS: tuple[Settings, ...] = (
    ((4, 8, 16), (16, 48), 32),
    ((16,), (), 48),
    ((4, 8), (48,), 32),
    ((4, 16), (16,), 48),
    ((8, 16), (48,), 32),
    ((2, 4, 8, 16), (16, 32, 48), 32),
    ((4, 8, 16, 32), (16, 32, 48), 32),
)
BASE: Settings = ((4, 8, 16), (256, 384), 768)


_STEMS: dict[tuple[Settings, str], MultiResConv] = {}


def _stem(settings: Settings, backend: str) -> MultiResConv:
    """A module that lends its structure; its weights come from the sample. On "meta", so nothing can use its own."""
    # A dict, not functools.cache: torch.compile looks into that, and cannot trace the construction.
    if (settings, backend) not in _STEMS:
        resolutions, channels, dim = settings
        with torch.device("meta"):
            _STEMS[settings, backend] = MultiResConv(resolutions, channels, dim, backend=backend)
    return _STEMS[settings, backend]


def _call(
    backend: str, spec: Tensor, visible: Tensor | None, weights: Mapping[str, Tensor], settings: Settings
) -> Tensor:
    return torch.func.functional_call(_stem(settings, backend), dict(weights), (spec, visible))


def operator(
    spec: Tensor,
    visible: Tensor | None,
    weights: Mapping[str, Tensor],
    settings: Settings,
    backend: str = "auto",
) -> Tensor:
    return _call(backend, spec, visible, weights, settings)


def reference(spec: Tensor, visible: Tensor | None, weights: Mapping[str, Tensor], settings: Settings) -> Tensor:
    return _call("dense", spec, visible, weights, settings)


def draw_visible(N: int, L: int, K: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """K distinct patches a row, in random order."""
    return torch.rand(N, L, generator=generator).argsort(1)[:, :K].contiguous().to(device)


def make_sample(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    *,
    clips: int,
    grid: tuple[int, int],
    masks: int | None = None,
    K: int = 1,
) -> Sample:
    """Random weights of a useful size and a spectrogram of grid x P pixels; ``masks`` None: all patches."""
    g = torch.Generator().manual_seed(0)
    resolutions, _channels, _dim = settings
    template = _stem(settings, "auto")
    weights = {}
    for key, parameter in template.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        value = torch.randn(parameter.shape, generator=g) * (fan_in**-0.5 if parameter.ndim > 1 else 0.1)
        if parameter.ndim == 1 and "norm" in key and key.endswith("weight"):
            value += 1
        weights[key] = value.to(device, dtype)
    P = resolutions[-1]
    H, W = grid
    spec = torch.randn(clips, 1, H * P, W * P, generator=g).to(device, dtype)
    visible = None if masks is None else draw_visible(clips * masks, H * W, K, g, device)
    inputs = {"spec": spec, "visible": visible, "weights": weights, "settings": settings}
    return Sample(name=name, inputs=inputs, differentiable=("spec", "weights"))


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    first = RESOLUTION_SETS[0]
    yield make_sample("K=1", device, dtype, first, clips=2, grid=(3, 2), masks=2, K=1)
    yield make_sample("K=L", device, dtype, first, clips=1, grid=(2, 3), masks=2, K=6)
    yield make_sample("one patch", device, dtype, first, clips=1, grid=(1, 1), masks=1, K=1)
    yield make_sample("one row of patches", device, dtype, first, clips=1, grid=(1, 5), masks=1, K=3)
    yield make_sample("no clips", device, dtype, first, clips=0, grid=(2, 2), masks=2, K=2)
    for settings in (((4, 8), (16,), 32), first):
        name = f"resolutions {','.join(map(str, settings[0]))}, small"
        yield make_sample(name, device, dtype, settings, clips=2, grid=(2, 2), masks=1, K=2)
    for settings in RESOLUTION_SETS:
        name = "resolutions " + ",".join(map(str, settings[0]))
        yield make_sample(f"{name}, visible", device, dtype, settings, clips=2, grid=(5, 3), masks=2, K=6)
        yield make_sample(f"{name}, dense", device, dtype, settings, clips=1, grid=(3, 2))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    good = make_sample("", device, torch.float32, RESOLUTION_SETS[0], clips=2, grid=(2, 3), masks=1, K=3).inputs
    spec, visible = good["spec"], good["visible"]

    def bad(name: str, error: type[Exception], message: str, **changes: Any) -> BadInput:
        return BadInput(name=name, inputs={**good, **changes}, error=error, message=message)

    yield bad(
        "no channel dimension",
        ValueError,
        r"4 dimensions \(B, in_chans, T, F\), got shape \(2, 32, 48\)",
        spec=spec[:, 0],
    )
    yield bad("two channels", ValueError, "dimension 1 must be 1", spec=spec.expand(2, 2, 32, 48))
    yield bad("integers", TypeError, "floating-point", spec=spec.long())
    yield bad("T not a multiple of P", ValueError, "T=30 frames.*multiples of the patch size 16", spec=spec[:, :, :30])
    yield bad(
        "a mask for visible", TypeError, "boolean mask", visible=torch.ones(2, 6, dtype=torch.bool, device=device)
    )
    yield bad("int32 indices", TypeError, "int64", visible=visible.int())
    yield bad("rows for another batch", ValueError, "3 rows and spec 2 clips", visible=visible[:1].expand(3, 3))
    yield bad(
        "more patches than there are",
        ValueError,
        "lists 7 patches a row; expected 1 to 6",
        visible=torch.arange(7, device=device).expand(2, 7),
    )
    yield bad("no patches", ValueError, "lists 0 patches", visible=visible[:, :0])
    if device.type == "cpu":
        yield bad(
            "index beyond the grid",
            IndexError,
            r"= 6, but there are 6 patches",
            visible=visible.clone().fill_diagonal_(6),
        )
        yield bad("a patch twice", ValueError, "twice", visible=visible[:, :1].expand(2, 2))


def benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    """Base model: 1024 x 128, 4 masks, 102 of 512 patches."""
    return make_sample("base", device, dtype, BASE, clips=clips, grid=(64, 8), masks=4, K=102)


def _widths(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(patches computed, multiply-adds per patch)."""
    resolutions, channels, dim = inputs["settings"]
    P, spec, visible = resolutions[-1], inputs["spec"], inputs["visible"]
    macs, c_in, r_in = 0, spec.shape[1], 1
    for r, c in zip(resolutions, (*channels, dim), strict=True):
        positions = (P // r) ** 2
        macs += positions * (r // r_in) ** 2 * c_in * c
        if r < P:
            macs += positions * 2 * (2 * c * c + 25 * c + 8 * c * c)  # two blocks: W1, W2, depthwise, MLP
            macs += positions * c * dim
        c_in, r_in = c, r
    macs += dim * dim
    patches = spec.shape[0] * spec.shape[2] * spec.shape[3] // P**2 if visible is None else visible.numel()
    return patches, macs


def flops_forward(inputs: Mapping[str, Any]) -> int:
    patches, macs = _widths(inputs)
    return 2 * patches * macs


def flops_backward(inputs: Mapping[str, Any]) -> int:
    return 2 * flops_forward(inputs)


def bytes_forward(inputs: Mapping[str, Any]) -> int:
    """Spectrogram, weights and visible list in, tokens out; each once."""
    spec, weights = inputs["spec"], inputs["weights"].values()
    patches, _ = _widths(inputs)
    listed = 0 if inputs["visible"] is None else inputs["visible"].numel() * 8
    elements = spec.numel() + sum(w.numel() for w in weights) + patches * inputs["settings"][2]
    return elements * spec.element_size() + listed


def bytes_backward(inputs: Mapping[str, Any]) -> int:
    """The same tensors again, and a gradient for each."""
    return 2 * bytes_forward(inputs)


SPEC = OperatorSpec(
    name="MultiResConv",
    operator=operator,
    reference=reference,
    samples=samples,
    pooled=True,
    triton_samples=("resolutions 4,8, small", "no clips", "one patch", "resolutions 4,8,16, small"),
    interpreted_dtypes=(torch.float32, torch.bfloat16),
    bad_inputs=bad_inputs,
    benchmark=benchmark,
    bytes_forward=bytes_forward,
    bytes_backward=bytes_backward,
    flops_forward=flops_forward,
    flops_backward=flops_backward,
)
