"""`fbank` by the extension: C++ on CPU tensors, a CUDA kernel on CUDA tensors; float32 arithmetic (csrc/fbank)."""

# Shapes: B clips, n samples, T frames, F mel bins.

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import extension
from .reference import FbankSettings

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int16: "int16"}


def why_not_native(settings: FbankSettings, waveform: Tensor, dtype: torch.dtype) -> str | None:
    """What the extension leaves to PyTorch, in words; None where there is nothing."""
    if waveform.dtype == torch.float64 or dtype == torch.float64:
        return "the extension computes in float32; use backend='torch' for float64"
    if waveform.device.type == "cuda" and settings.fft_length > 4096:
        return f"an FFT of {settings.fft_length} points, the CUDA kernel computes up to 4096; use backend='torch'"
    return None


def fbank_native(
    waveform: Tensor,
    lengths: Tensor | None,
    settings: FbankSettings,
    frames: int,
    dtype: torch.dtype,
    *,
    preemphasis: float,
    remove_dc: bool,
    mean: float | None,
    std: float | None,
    scale: float,
) -> Tensor:
    """(B, n) waveform -> (B, T, F) in ``dtype``, T = ``frames``. Arguments are checked by the caller."""
    spec_BTF = waveform.new_empty((waveform.shape[0], frames, settings.num_mel_bins), dtype=dtype)
    if spec_BTF.numel() == 0:
        return spec_BTF
    if waveform.stride(1) != 1:
        waveform = waveform.contiguous()
    if lengths is not None:
        lengths = lengths.contiguous()
    module: Any = extension.load()
    call = module.FbankCall(
        waveform=waveform.data_ptr(),
        input=_NAMES[waveform.dtype],
        clips=waveform.shape[0],
        samples=waveform.shape[1],
        row_stride=waveform.stride(0),
        lengths=0 if lengths is None else lengths.data_ptr(),
        output=spec_BTF.data_ptr(),
        dtype=_NAMES[dtype],
        frames=frames,
        preemphasis=preemphasis,
        remove_dc=remove_dc,
        scale=scale * 2.0**-15 if waveform.dtype == torch.int16 else scale,
        mean=0.0 if mean is None else mean,
        factor=1.0 if std is None else 1 / (2 * std),
    )
    if waveform.device.type == "cpu":
        module.fbank_cpu(_tables(settings), call, torch.get_num_threads())
        return spec_BTF
    with torch.cuda.device(waveform.device):
        tables = _device_tables(settings, waveform.device)
        stream = torch.cuda.current_stream().cuda_stream
        module.fbank_cuda(_tables(settings), tables.data_ptr(), call, waveform.device.index, stream)
    return spec_BTF


@cache  # a few kilobytes each
def _tables(settings: FbankSettings) -> Any:
    module: Any = extension.load()
    return module.FbankTables(
        frame_length=settings.frame_length,
        frame_shift=settings.frame_shift,
        fft_length=settings.fft_length,
        num_mel_bins=settings.num_mel_bins,
        sample_rate=settings.sample_rate,
        low_freq=settings.band[0],
        high_freq=settings.band[1],
        window=settings.window,
    )


@cache
def _device_tables(settings: FbankSettings, device: torch.device) -> Tensor:
    """The tables on a GPU, copied there once. They are never freed, so that any stream may read them at any time."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fbank: its tables for these settings are not on the device yet, and a graph that is being captured cannot "
            "copy them; call fbank once with these settings before the capture"
        )
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(bytes(_tables(settings))), dtype=torch.uint8).to(device)
