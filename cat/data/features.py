"""Waveform to the log-mel spectrogram the encoder reads, with the settings in one dataclass."""

# Shapes: B clips, n samples, T frames, F mel bins.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cat_kernels.mel import FBANK_PRESETS, fbank


@dataclass(frozen=True)
class FeatureConfig:
    """Kaldi-compatible log-mel features; the defaults are AudioSet pre-training's.

    ``mean`` and ``std`` are the data set's statistics of the log-mel values; the network sees ``(x - mean) / (2 std)``.
    """

    sample_rate: int = 16000  # Hz; audio of any other rate is resampled to it
    frames: int = 1024  # T; shorter clips are padded, longer ones cropped
    mel_bins: int = 128  # F
    window: str = "hanning"  # "hanning", "povey" or "hamming"
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_freq: float = 20.0  # Hz
    high_freq: float = 0.0  # Hz; 0 is the Nyquist frequency, negative counts down from it
    preemphasis: float = 0.97
    mean: float = -4.268
    std: float = 4.569

    def __post_init__(self) -> None:
        for name in ("sample_rate", "frames", "mel_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"features.{name} is {getattr(self, name)}; it must be at least 1")
        if self.frame_shift < 1 or self.frame_length < 2:
            raise ValueError(
                f"features.frame_length_ms {self.frame_length_ms} and frame_shift_ms {self.frame_shift_ms} give frames "
                f"of {self.frame_length} samples every {self.frame_shift} at {self.sample_rate} Hz; make them longer"
            )
        if not self.std > 0:
            raise ValueError(f"features.std is {self.std}; it must be positive")

    @property
    def frame_length(self) -> int:
        """Samples in a frame (400 at 16 kHz): the shortest clip that has features."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """Samples from one frame to the next (160 at 16 kHz)."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def samples(self) -> int:
        """Samples that fill all ``frames`` (164,080 for 1024 frames at 16 kHz); more are never read."""
        return self.frame_length + (self.frames - 1) * self.frame_shift


def _preset(name: str) -> FeatureConfig:
    preset = FBANK_PRESETS[name]
    return FeatureConfig(frames=preset["target_length"], mean=preset["mean"], std=preset["std"])


# Statistics and lengths of the released fine-tuning recipes.
FEATURE_PRESETS: dict[str, FeatureConfig] = {name: _preset(name) for name in ("audioset", "esc50", "spc2")}


def log_mel(waveform: Tensor, config: FeatureConfig, lengths: Tensor | None = None) -> Tensor:
    """Normalised log-mel spectrogram, (B, 1, T, F) float32, of a waveform (B, n) or (n,) in [-1, 1].

    Each clip's mean is removed first. Clips shorter than T frames are padded with zeros *before* the normalisation, so
    that a pad frame is -mean / (2 std), +0.467 for AudioSet: that is what the published checkpoints saw.

    ``lengths`` (B,) int64: samples of each clip when they differ; what lies behind them is ignored.
    """
    wave_BN = waveform.unsqueeze(0) if waveform.dim() == 1 else waveform
    spec_BTF = fbank(
        remove_mean(wave_BN, lengths),
        lengths,
        sample_rate=config.sample_rate,
        num_mel_bins=config.mel_bins,
        frame_length_ms=config.frame_length_ms,
        frame_shift_ms=config.frame_shift_ms,
        low_freq=config.low_freq,
        high_freq=config.high_freq,
        window=config.window,
        preemphasis=config.preemphasis,
        target_length=config.frames,
        mean=config.mean,
        std=config.std,
        dtype=torch.float32,
    )
    return spec_BTF.unsqueeze(1)


def remove_mean(wave_BN: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The waveform, as float, minus each clip's own mean over its ``lengths`` samples; int16 is scaled by 2^-15.

    The sum is taken in float64: in float32 its last bits would depend on the padding, and so on the rest of the batch,
    which in a bin that holds nothing but rounding made 8e-5 of the feature.
    """
    wave_BN = wave_BN.float() / 32768 if wave_BN.dtype == torch.int16 else wave_BN.float()
    if lengths is None:
        return wave_BN - wave_BN.mean(dim=-1, keepdim=True, dtype=torch.float64).float()
    lengths_B1 = lengths.to(wave_BN.device).unsqueeze(-1)
    inside_BN = torch.arange(wave_BN.shape[-1], device=wave_BN.device) < lengths_B1
    wave_BN = torch.where(inside_BN, wave_BN, 0)
    mean_B1 = wave_BN.sum(dim=-1, keepdim=True, dtype=torch.float64) / lengths_B1.clamp(min=1)
    return torch.where(inside_BN, wave_BN - mean_B1.float(), 0)


def frames_in(features: FeatureConfig, samples: Tensor) -> Tensor:
    """Frames that fit wholly into so many samples (Kaldi's snip_edges)."""
    return 1 + (samples - features.frame_length).div(features.frame_shift, rounding_mode="floor")
