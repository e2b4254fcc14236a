"""Log-mel spectrograms of any make: what networks by others were trained on (`MelConfig`).

Kaldi's, which CAT itself and AST read, is `cat.data.features`. Shapes: n samples, T frames, K = n_fft/2 + 1
frequencies, F mel bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class MelConfig:
    """The defaults are librosa's, but for `center` and `log`; sizes are samples.

    A frame is windowed (periodic Hann), transformed, its amplitudes are raised to `power` and summed under `bins`
    triangles between `low` and `high` Hz. What the network sees is ``(log(max(x, floor) + offset) - mean) / std``.
    """

    bins: int = 128
    n_fft: int = 2048
    window: int = 0  # 0: n_fft; a shorter one is padded with zeros
    hop: int = 512
    low: float = 0.0
    high: float = 0.0  # 0: the Nyquist frequency
    scale: Literal["slaney", "htk"] = "slaney"
    triangles: Literal["hz", "mel"] = "hz"  # straight in Hz (librosa, torchaudio) or in mel (TensorFlow)
    norm: Literal["slaney", "none"] = "slaney"  # slaney: of area 1; none: of height 1
    power: float = 2.0
    center: bool = False  # frames' centres at multiples of the hop, with zeros around the clip; else their beginnings
    log: Literal["ln", "log10", "db", "none"] = "ln"
    floor: float = 1e-10
    offset: float = 0.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("bins", "n_fft", "hop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.window <= self.n_fft:
            raise ValueError(f"window is {self.window}; expected 0 to n_fft ({self.n_fft}) samples")
        if not 0 <= self.low < (self.high or float("inf")):
            raise ValueError(f"low is {self.low} and high is {self.high} Hz; expected low below high")
        if self.floor < 0 or self.offset < 0 or (self.log != "none" and self.floor + self.offset == 0):
            raise ValueError(
                f"floor is {self.floor} and offset is {self.offset}; expected one above 0: silence has no logarithm"
            )
        if self.std <= 0:
            raise ValueError(f"std is {self.std}; expected a number above 0")

    @property
    def window_length(self) -> int:
        return self.window or self.n_fft

    def samples(self, frames: int) -> int:
        """The fewest samples that have so many frames."""
        return (frames - 1) * self.hop + (1 if self.center else self.window_length)


def mel_spectrogram(wave_n: Tensor, config: MelConfig, sample_rate: int) -> Tensor:
    """(T, F) float32 of a clip (n,) in [-1, 1]; only frames that fit wholly, but for `MelConfig.center`."""
    window = torch.hann_window(config.window_length)
    left = (config.n_fft - config.window_length) // 2 if config.center else 0
    right = config.n_fft - config.window_length - left
    around = (config.n_fft // 2, config.n_fft // 2) if config.center else (0, right)
    spectrum_KT = torch.stft(
        torch.nn.functional.pad(wave_n, around),
        config.n_fft,
        config.hop,
        window=torch.nn.functional.pad(window, (left, right)),
        center=False,
        return_complex=True,
    )
    mel_FT = mel_filters(config, sample_rate) @ spectrum_KT.abs() ** config.power
    mel_FT = mel_FT.clamp(min=config.floor) + config.offset
    if config.log == "ln":
        mel_FT = mel_FT.log()
    elif config.log != "none":
        mel_FT = mel_FT.log10() * (10 if config.log == "db" else 1)
    return (mel_FT.T - config.mean) / config.std


def mel_filters(config: MelConfig, sample_rate: int) -> Tensor:
    """(F, K) float32."""
    nyquist = sample_rate / 2
    high = config.high or nyquist
    if not config.low < high <= nyquist:
        raise ValueError(
            f"mel bins from {config.low:g} to {high:g} Hz of audio at {sample_rate} Hz; expected them within 0 to "
            f"{nyquist:g}"
        )
    frequencies_K = torch.linspace(0, nyquist, config.n_fft // 2 + 1, dtype=torch.float64)
    first, last = to_mel(torch.tensor([config.low, high], dtype=torch.float64), config.scale).tolist()
    edges_mel = torch.linspace(first, last, config.bins + 2, dtype=torch.float64)
    edges_hz = to_hz(edges_mel, config.scale)
    edges = edges_hz if config.triangles == "hz" else edges_mel
    x_K = frequencies_K if config.triangles == "hz" else to_mel(frequencies_K, config.scale)
    steps = edges.diff()
    rising_FK = (x_K - edges[:-2, None]) / steps[:-1, None]
    falling_FK = (edges[2:, None] - x_K) / steps[1:, None]
    filters_FK = torch.minimum(rising_FK, falling_FK).clamp(min=0)
    if config.norm == "slaney":
        filters_FK *= 2 / (edges_hz[2:] - edges_hz[:-2])[:, None]
    return filters_FK.float()


def to_mel(hz: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 2595 * (1 + hz / 700).log10()
    return torch.where(hz < 1000, hz * 3 / 200, 15 + (hz.clamp(min=1e-9) / 1000).log() / _SLANEY)


def to_hz(mel: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * _SLANEY).exp())


_SLANEY = 0.06875177742094912  # ln(6.4) / 27: of Slaney's Auditory Toolbox, a step above 1 kHz
