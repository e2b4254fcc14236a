"""Kaldi's log-mel features as CAT reads them: `AutoFeatureExtractor`, with `trust_remote_code=True`.

By the compiled `fbank` of `cat_kernels` where that is installed (pip install cat-kernels), else in PyTorch: the same
numbers to rounding. The waveform loses its mean; behind its end frames are 0 before the normalisation.

Shapes: B clips, n samples, T frames, S samples a frame, F mel bins.
"""

import math

import torch
from torch import Tensor
from transformers import BatchFeature, SequenceFeatureExtractor

try:
    from cat.data.features import FeatureConfig, log_mel
except ImportError:
    FeatureConfig = None


class CATFeatureExtractor(SequenceFeatureExtractor):
    model_input_names = ["input_values", "num_frames"]  # noqa: RUF012

    def __init__(
        self, feature_size=128, sampling_rate=16000, padding_value=0.0, features=None, patch_size=16, **others
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **others)
        self.features, self.patch_size = features or {}, patch_size

    def __call__(self, raw_speech, sampling_rate=None, return_tensors="pt", **others):
        """A waveform (n,) in [-1, 1], or a list of them: "input_values" (B, T, F), T as the longest has, up to a whole
        patch, and "num_frames" (B,), the frames each clip has. Tensors, whatever `return_tensors` is."""
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate is {sampling_rate}; expected {self.sampling_rate} Hz: resample the waveform"
            )
        alone = not isinstance(raw_speech, list | tuple) and getattr(raw_speech, "ndim", 1) == 1
        waves = [torch.as_tensor(wave, dtype=torch.float32) for wave in ([raw_speech] if alone else raw_speech)]
        length, shift = (int(self.sampling_rate * self.features[f"frame_{x}_ms"] / 1000) for x in ("length", "shift"))
        if not waves or any(wave.ndim != 1 or len(wave) < length for wave in waves):
            shapes = [tuple(wave.shape) for wave in waves]
            raise ValueError(f"waveforms have the shapes {shapes}; expected (samples,) with at least {length} samples")
        frames = [1 + (len(wave) - length) // shift for wave in waves]
        T = -(-max(frames) // self.patch_size) * self.patch_size
        make = plain_log_mel if FeatureConfig is None else _log_mel
        spec = [make(wave[None], {**self.features, "frames": T}) for wave in waves]
        return BatchFeature({"input_values": torch.cat(spec), "num_frames": torch.tensor(frames)})


def _log_mel(wave_1n: Tensor, features: dict) -> Tensor:
    return log_mel(wave_1n, FeatureConfig(**features))[:, 0]


def plain_log_mel(wave_1n: Tensor, features: dict) -> Tensor:
    rate = features["sample_rate"]
    length, shift = (int(rate * features[f"frame_{x}_ms"] / 1000) for x in ("length", "shift"))
    wave_1n = wave_1n - wave_1n.mean(dtype=torch.float64).float()
    frames_1TS = wave_1n.unfold(1, length, shift)
    frames_1TS = frames_1TS - frames_1TS.mean(dim=-1, keepdim=True)
    before_1TS = torch.cat([frames_1TS[..., :1], frames_1TS[..., :-1]], dim=-1)
    frames_1TS = (frames_1TS - features["preemphasis"] * before_1TS) * window(features["window"], length)
    points = 1 << (length - 1).bit_length()
    power = torch.fft.rfft(frames_1TS, n=points).abs().square()
    mel = power @ mel_matrix(points, rate, features["mel_bins"], features["low_freq"], features["high_freq"])
    spec = mel.clamp(min=1.1920928955078125e-07).log()[:, : features["frames"]]
    spec = torch.nn.functional.pad(spec, (0, 0, 0, features["frames"] - spec.shape[1]))
    return (spec - features["mean"]) / (2 * features["std"])


def window(name: str, length: int) -> Tensor:
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64) / (length - 1)
    if name == "hamming":
        return (0.54 - 0.46 * phase.cos()).float()
    hann = 0.5 - 0.5 * phase.cos()
    return (hann**0.85 if name == "povey" else hann).float()


def mel_matrix(points: int, rate: int, bins: int, low_freq: float, high_freq: float) -> Tensor:
    """(points / 2 + 1, F): triangles that are linear in mel; the Nyquist bin is not used."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hertz.double() / 700)

    low = mel(torch.tensor(low_freq))
    high = mel(torch.tensor(high_freq if high_freq > 0 else rate / 2 + high_freq))
    width = (high - low) / (bins + 1)
    left_F = low + width * torch.arange(bins)
    bins_N1 = mel(torch.arange(points // 2) * rate / points)[:, None]
    weights = torch.minimum((bins_N1 - left_F) / width, (left_F + 2 * width - bins_N1) / width).clamp(min=0)
    return torch.nn.functional.pad(weights, (0, 0, 0, 1)).float()
