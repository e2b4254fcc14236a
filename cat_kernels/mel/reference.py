"""Kaldi-compatible log-mel filter bank energies in batched, differentiable PyTorch: the formula, frame by frame."""

# Shapes: B clips, n samples, T frames, S samples a frame, N points of the FFT, F mel bins.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Kaldi's floor of the mel energies, the machine epsilon of float32; log of it is -15.942385.
ENERGY_FLOOR = 1.1920928955078125e-07
WINDOWS = ("hanning", "povey", "hamming")


@dataclass(frozen=True)
class FbankSettings:
    """The part of fbank's arguments that the tables depend on (Kaldi options in brackets)."""

    sample_rate: int = 16000  # Hz [--sample-frequency]
    num_mel_bins: int = 128  # F [--num-mel-bins]
    frame_length_ms: float = 25.0  # [--frame-length]
    frame_shift_ms: float = 10.0  # [--frame-shift]
    low_freq: float = 20.0  # Hz [--low-freq]
    high_freq: float = 0.0  # Hz; 0 or less is an offset from the Nyquist frequency [--high-freq]
    window: str = "hanning"  # [--window-type]

    @property
    def frame_length(self) -> int:
        """S, samples in a frame."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def fft_length(self) -> int:
        """N, the next power of two [--round-to-power-of-two=true]."""
        return 1 << (self.frame_length - 1).bit_length()

    @property
    def band(self) -> tuple[float, float]:
        """Lowest and highest frequency of the filter bank in Hz."""
        high = self.high_freq if self.high_freq > 0 else self.sample_rate / 2 + self.high_freq
        return self.low_freq, high


def fbank_reference(
    waveform: Tensor,
    lengths: Tensor | None,
    settings: FbankSettings,
    *,
    preemphasis: float = 0.97,
    remove_dc: bool = True,
    target_length: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(B, n) waveform -> (B, T, F) log-mel energies; float64 is computed in float64, everything else in float32.

    Clip b ends after ``lengths[b]`` samples; its frames from there to T are pad frames. Pad frames are 0 before the
    normalisation ``(x - mean) / (2 std)``.
    """
    spectrum_BTN = _spectrum(waveform, lengths, settings, preemphasis, remove_dc, scale)
    power_BTN = spectrum_BTN.real.square() + spectrum_BTN.imag.square()
    mel_BTF = power_BTN @ mel_matrix(settings, power_BTN.device, power_BTN.dtype)
    spec_BTF = mel_BTF.clamp(min=ENERGY_FLOOR).log()  # clamp, unlike fmax, lets NaN through

    if lengths is not None:
        spec_BTF = torch.where(_inside(spec_BTF, lengths, settings), spec_BTF, 0)
    if target_length is not None:
        spec_BTF = _fit(spec_BTF, target_length)
    if mean is not None and std is not None:
        spec_BTF = (spec_BTF - mean) / (2 * std)
    return spec_BTF


def fbank_backward_reference(
    grad_BTF: Tensor,
    waveform: Tensor,
    lengths: Tensor | None,
    settings: FbankSettings,
    *,
    preemphasis: float = 0.97,
    remove_dc: bool = True,
    target_length: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(B, T, F) gradient of the result -> (B, n) gradient of the waveform: `fbank_reference` transposed."""
    if waveform.numel() == 0:
        return torch.zeros_like(waveform)
    spectrum_BTN = _spectrum(waveform, lengths, settings, preemphasis, remove_dc, scale)
    power_BTN = spectrum_BTN.real.square() + spectrum_BTN.imag.square()
    mel = mel_matrix(settings, power_BTN.device, power_BTN.dtype)
    mel_BTF = power_BTN @ mel

    grad_BTF = grad_BTF.to(mel_BTF.dtype)
    if mean is not None and std is not None:
        grad_BTF = grad_BTF / (2 * std)
    if target_length is not None:
        grad_BTF = _fit(grad_BTF, mel_BTF.shape[1])
    counts_BTF = mel_BTF >= ENERGY_FLOOR
    if lengths is not None:
        counts_BTF = counts_BTF & _inside(mel_BTF, lengths, settings)
    grad_power_BTN = torch.where(counts_BTF, grad_BTF / mel_BTF, 0) @ mel.T

    # irfft counts every bin but the first and the last twice, and divides by N.
    points = settings.fft_length
    grad_spectrum_BTN = grad_power_BTN * spectrum_BTN
    grad_spectrum_BTN[..., 0] *= 2
    grad_BTS = torch.fft.irfft(grad_spectrum_BTN, n=points)[..., : settings.frame_length] * points
    grad_BTS = grad_BTS * window(settings, grad_BTS.device, grad_BTS.dtype)
    if preemphasis:
        after_BTS = torch.nn.functional.pad(grad_BTS[..., 1:], (0, 1))
        first_BTS = torch.nn.functional.pad(grad_BTS[..., :1], (0, settings.frame_length - 1))
        grad_BTS = grad_BTS - preemphasis * (after_BTS + first_BTS)
    if remove_dc:
        grad_BTS = grad_BTS - grad_BTS.mean(dim=-1, keepdim=True)
    grad_BN = torch.ops.aten.unfold_backward(
        grad_BTS * scale, list(waveform.shape), 1, settings.frame_length, settings.frame_shift
    )
    return grad_BN.to(waveform.dtype)


def _spectrum(
    waveform: Tensor, lengths: Tensor | None, settings: FbankSettings, preemphasis: float, remove_dc: bool, scale: float
) -> Tensor:
    """(B, T, N/2 + 1) complex spectrum of every frame."""
    wave_BN = to_float(waveform) if scale == 1.0 else to_float(waveform) * scale
    if lengths is not None:
        # Whatever lies behind a clip's end must not reach the result, nor, as NaN times zero, the gradient.
        inside_BN = torch.arange(wave_BN.shape[1], device=wave_BN.device) < lengths[:, None]
        wave_BN = torch.where(inside_BN, wave_BN, 0)
    frames_BTS = wave_BN.unfold(1, settings.frame_length, settings.frame_shift)
    if remove_dc:
        frames_BTS = frames_BTS - frames_BTS.mean(dim=-1, keepdim=True)
    if preemphasis:
        # y[0] = x[0] - c x[0]: nothing is carried over from the frame before.
        before_BTS = torch.cat([frames_BTS[..., :1], frames_BTS[..., :-1]], dim=-1)
        frames_BTS = frames_BTS - preemphasis * before_BTS
    windowed_BTS = frames_BTS * window(settings, wave_BN.device, wave_BN.dtype)
    if windowed_BTS.numel() == 0:  # MKL refuses to transform nothing
        windowed_BTS = torch.nn.functional.pad(windowed_BTS, (0, settings.fft_length // 2 + 1 - settings.frame_length))
        return torch.complex(windowed_BTS, windowed_BTS)
    return torch.fft.rfft(windowed_BTS, n=settings.fft_length)  # zeros are appended on the right


def _inside(spec_BTF: Tensor, lengths: Tensor, settings: FbankSettings) -> Tensor:
    """(B, T, 1), False where the frame is one that only pads the clip."""
    frames_B1 = num_frames(lengths, settings)[:, None]
    return (torch.arange(spec_BTF.shape[1], device=spec_BTF.device) < frames_B1)[..., None]


def _fit(spec_BTF: Tensor, frames: int) -> Tensor:
    """Cut to ``frames``, or filled up with zeros."""
    spec_BTF = spec_BTF[:, :frames]
    return torch.nn.functional.pad(spec_BTF, (0, 0, 0, frames - spec_BTF.shape[1]))


def num_frames(lengths: Tensor, settings: FbankSettings) -> Tensor:
    """Frames of clips of ``lengths`` samples, none where a clip is shorter than a frame."""
    frames = 1 + torch.div(lengths - settings.frame_length, settings.frame_shift, rounding_mode="floor")
    return frames.clamp(min=0)


def to_float(waveform: Tensor) -> Tensor:
    """float64 as it is, other floats as float32, int16 as float32 in [-1, 1)."""
    if waveform.dtype == torch.int16:
        return waveform.float() * 2.0**-15
    return waveform if waveform.dtype == torch.float64 else waveform.float()


def window(settings: FbankSettings, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(S,): symmetric Hann, Hann to the power of 0.85 (Kaldi's "povey"), or Hamming."""
    return _tables(settings, device, dtype)[0]


def mel_matrix(settings: FbankSettings, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N/2 + 1, F): triangles that are linear in mel, between F + 2 edges evenly spaced in mel over the band.

    A triangle narrower than an FFT bin may hold none (row 3 of the 128 bins from 20 Hz at 16 kHz): its energy is always
    the floor. Kaldi refuses that, torchaudio and the published models keep it. The Nyquist bin is not used.
    """
    return _tables(settings, device, dtype)[1]


def _tables(settings: FbankSettings, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # What a tracer or a transform of torch.func makes is its own, and must not outlive it.
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return _make_tables(settings, device, dtype)
    return _kept_tables(settings, device, dtype)


@lru_cache(maxsize=64)
def _kept_tables(settings: FbankSettings, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # A tensor made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return _make_tables(settings, device, dtype)


def _make_tables(settings: FbankSettings, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tables = _window_f64(settings), _mel_matrix_f64(settings)
    return tables[0].to(device, dtype), tables[1].to(device, dtype)


# Tables are computed there, whatever the default device is.
_EXACT: Any = {"dtype": torch.float64, "device": "cpu"}


def _window_f64(settings: FbankSettings) -> Tensor:
    phase = 2 * math.pi * torch.arange(settings.frame_length, **_EXACT) / (settings.frame_length - 1)
    if settings.window == "hamming":
        return 0.54 - 0.46 * phase.cos()
    hann = 0.5 - 0.5 * phase.cos()
    return hann**0.85 if settings.window == "povey" else hann


def _mel_matrix_f64(settings: FbankSettings) -> Tensor:
    low, high = (_mel(torch.tensor(f, **_EXACT)) for f in settings.band)
    width = (high - low) / (settings.num_mel_bins + 1)
    left_F = low + width * torch.arange(settings.num_mel_bins, **_EXACT)
    half = settings.fft_length // 2
    bins_N1 = _mel(torch.arange(half, **_EXACT) * settings.sample_rate / settings.fft_length)[:, None]
    rising_NF = (bins_N1 - left_F) / width
    falling_NF = (left_F + 2 * width - bins_N1) / width
    weights_NF = torch.minimum(rising_NF, falling_NF).clamp(min=0)
    return torch.cat([weights_NF, torch.zeros(1, settings.num_mel_bins, **_EXACT)])


def _mel(frequency: Tensor) -> Tensor:
    return 1127 * torch.log1p(frequency / 700)
