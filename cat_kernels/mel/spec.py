"""What tests and benchmarks know about `fbank`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..spec import BadInput, OperatorSpec, Sample, nbytes
from .op import _fbank, _fbank_backward, fbank
from .reference import FbankSettings, fbank_reference

# 4 kHz, frames of 60 samples every 24, 64-point FFT: every step at a size that gradcheck can afford.
SMALL = {"sample_rate": 4000, "num_mel_bins": 6, "frame_length_ms": 15.0, "frame_shift_ms": 6.0}
AUDIOSET = {"target_length": 1024, "mean": -4.268, "std": 4.569}
_TABLE_NAMES = tuple(field.name for field in dataclasses.fields(FbankSettings))


def _reference(
    waveform: Tensor, lengths: Tensor | None = None, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    settings = FbankSettings(**{name: options.pop(name) for name in _TABLE_NAMES if name in options})
    spec_BTF = fbank_reference(waveform, lengths, settings, **options)
    return spec_BTF if dtype is None else spec_BTF.to(dtype)


def _wave(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (0.1 * torch.randn(*shape, generator=generator)).to(device, dtype)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *shape: int, **inputs: Any) -> Sample:
        return Sample(
            name=name, inputs={"waveform": _wave(device, dtype, *shape), **inputs}, differentiable=("waveform",)
        )

    lengths = torch.tensor([150, 60, 101], device=device)
    yield sample("three clips", 3, 150, **SMALL)
    yield sample("ragged, padded, normalised", 3, 150, lengths=lengths, target_length=7, mean=-4.0, std=4.5, **SMALL)
    yield sample("cut to 2 frames, povey, scaled", 2, 150, target_length=2, window="povey", scale=32768.0, **SMALL)
    yield sample(
        "hamming, no emphasis, no DC removal", 1, 131, window="hamming", preemphasis=0.0, remove_dc=False, **SMALL
    )
    yield sample("one frame", 1, 60, **SMALL)
    yield sample("empty batch", 0, 150, **SMALL)
    yield sample("16 kHz, 128 bins", 2, 1041)


def _bad_inputs(device: torch.device) -> Iterator[BadInput]:
    wave = _wave(device, torch.float32, 2, 800)
    yield BadInput(
        name="shorter than a frame",
        inputs={"waveform": wave[:, :399]},
        error=ValueError,
        message="needs 400 .* has 399",
    )
    yield BadInput(name="transposed", inputs={"waveform": wave[:1].T}, error=ValueError, message=r"waveform\.T")
    yield BadInput(name="wrong rank", inputs={"waveform": wave[None]}, error=ValueError, message=r"\(B, n\)")
    yield BadInput(name="integers", inputs={"waveform": wave.int()}, error=TypeError, message="int32.*int16")
    yield BadInput(
        name="lengths of another batch",
        inputs={"waveform": wave, "lengths": torch.tensor([800], device=device)},
        error=ValueError,
        message=r"expected \(2,\)",
    )
    yield BadInput(
        name="output of integers", inputs={"waveform": wave, "dtype": torch.int16}, error=TypeError, message="int16"
    )


def _positional(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The operator's arguments behind ``lengths``, without the output's dtype."""
    table = dataclasses.astuple(FbankSettings(**{name: inputs[name] for name in _TABLE_NAMES if name in inputs}))
    rest = {"preemphasis": 0.97, "remove_dc": True, "target_length": None, "mean": None, "std": None, "scale": 1.0}
    return *table, *(inputs.get(name, default) for name, default in rest.items())


def _overload_calls(sample: Sample) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    waveform, lengths = sample.inputs["waveform"], sample.inputs.get("lengths")
    settings = _positional(sample.inputs)
    spec_BTF = fbank(**sample.inputs)
    yield _fbank, (waveform, lengths, *settings, spec_BTF.dtype)
    yield _fbank_backward, (torch.ones_like(spec_BTF), waveform.detach(), lengths, *settings)


def _benchmark(device: torch.device, dtype: torch.dtype, clips: int) -> Sample:
    """Clips of 10 s at 16 kHz with AudioSet's settings."""
    inputs = {"waveform": _wave(device, dtype, clips, 160_000), **AUDIOSET}
    return Sample(name=f"{clips} clips of 10 s", inputs=inputs)


def _bytes_forward(inputs: Mapping[str, Any]) -> int:
    wave = inputs["waveform"]
    spec_BTF = fbank(**{**inputs, "waveform": wave.to("meta"), "lengths": None})
    return nbytes(wave, spec_BTF)


SPEC = OperatorSpec(
    name="fbank",
    operator=fbank,
    reference=_reference,
    samples=_samples,
    overload_calls=_overload_calls,
    bad_inputs=_bad_inputs,
    benchmark=_benchmark,
    bytes_forward=_bytes_forward,
)
