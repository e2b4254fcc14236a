"""What is exported: spectrogram, or waveform, in; named tensors out. Plain PyTorch operations alone.

Shapes: B clips, n samples, T frames, S samples a frame, N points of the FFT, F mel bins, P patch, H x W = T/P x F/P
patches, L = H * W, D embedding width, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.data.features import FeatureConfig
from cat.model import Classifier, Encoder
from cat.model.classifier import rows_of_tokens
from cat.model.encoder import MAX_ROWS
from cat_kernels.mel.reference import ENERGY_FLOOR, FbankSettings, mel_matrix, window


class LogMel(nn.Module):
    """`cat.data.log_mel` of clips of one length, in operations that every exporter knows: (B, n) -> (B, 1, T, F).

    From a frame's samples to its spectrum all is linear (mean removed, pre-emphasis, window, Fourier transform), so it
    is one matrix, made in float64; its product is as near to the formula in float64 as the FFT in float32 is. Behind
    the last whole frame the spectrogram is filled up with zeros before the normalisation, to whole patches, and to
    ``least_frames`` where it is shorter.
    """

    def __init__(self, features: FeatureConfig, patch_size: int, least_frames: int = 0) -> None:
        super().__init__()
        self.features, self.patch_size = features, patch_size
        self.least_rows = math.ceil(least_frames / patch_size)
        settings = FbankSettings(
            features.sample_rate,
            features.mel_bins,
            features.frame_length_ms,
            features.frame_shift_ms,
            features.low_freq,
            features.high_freq,
            features.window,
        )
        self.spectrum: Tensor
        self.mel: Tensor
        self.register_buffer("spectrum", spectrum_matrix(settings, features.preemphasis).float(), persistent=False)
        mel_NF = mel_matrix(settings, torch.device("cpu"), torch.float64)
        self.register_buffer("mel", mel_NF.float(), persistent=False)

    def forward(self, wave_BN: Tensor) -> Tensor:
        f, P = self.features, self.patch_size
        wave_BN = wave_BN - wave_BN.mean(-1, keepdim=True, dtype=torch.float64).to(wave_BN.dtype)
        T = 1 + (wave_BN.shape[1] - f.frame_length) // f.frame_shift
        # Not `unfold`: its export would hold for more than one clip and more than one frame only.
        sample_TS = torch.arange(T)[:, None] * f.frame_shift + torch.arange(f.frame_length)
        real_BTN, imaginary_BTN = (wave_BN[:, sample_TS] @ self.spectrum).chunk(2, dim=-1)
        power_BTN = real_BTN.square() + imaginary_BTN.square()
        spec_BTF = (power_BTN @ self.mel).clamp(min=ENERGY_FLOOR).log()
        rows: Any = (T + P - 1) // P
        if self.least_rows:
            rows = torch.sym_max(rows, self.least_rows)
        spec_BTF = F.pad(spec_BTF, (0, 0, 0, rows * P - T))
        return ((spec_BTF - f.mean) / (2 * f.std)).unsqueeze(1)


def spectrum_matrix(settings: FbankSettings, preemphasis: float) -> Tensor:
    """(S, 2 * (N/2 + 1)) float64: what a frame is multiplied by for the real and the imaginary part of its spectrum."""
    S, N = settings.frame_length, settings.fft_length
    identity_SS = torch.eye(S, dtype=torch.float64)
    centred_SS = identity_SS - 1 / S  # a frame times this is the frame without its mean
    before_SS = torch.cat([identity_SS[:, :1], identity_SS[:, :-1]], dim=1)
    window_S = window(settings, torch.device("cpu"), torch.float64)
    turns_SN = torch.arange(S)[:, None] * torch.arange(N // 2 + 1) % N
    angle_SN = 2 * math.pi / N * turns_SN.double()
    fourier_SN = torch.cat([angle_SN.cos(), -angle_SN.sin()], dim=1)
    return centred_SS @ (identity_SS - preemphasis * before_SS) @ (window_S[:, None] * fourier_SN)


class Graph(nn.Module):
    """An encoder or a classifier with names for what it puts out, which is what ``outputs`` lists.

    Of an encoder: ``clip`` (B, D), the mean of the patches; ``cls`` (B, D); ``frames`` (B, H, D), every row of patches'
    mean; ``patches`` (B, L, D). Of a classifier: ``scores`` (B, C) in 0..1, and with a frame head ``frame_scores``
    (B, H, C). With ``spectrogram`` it comes last, as the model sees it, (B, 1, T, F).

    Input: ``waveform`` (B, n) where ``log_mel`` is given, else ``spectrogram`` (B, 1, T, F), T a multiple of P.
    """

    def __init__(
        self, model: Encoder | Classifier, log_mel: LogMel | None = None, *, spectrogram: bool = False
    ) -> None:
        super().__init__()
        self.model, self.log_mel, self.spectrogram = model, log_mel, spectrogram
        self.encoder_config = (model if isinstance(model, Encoder) else model.encoder).config
        self.input = "spectrogram" if log_mel is None else "waveform"
        if isinstance(model, Encoder):
            self.outputs: tuple[str, ...] = ("clip", "cls", "frames", "patches")
        else:
            self.outputs = ("scores", "frame_scores") if model.config.kind == "frames" else ("scores",)
        if spectrogram:
            self.outputs = (*self.outputs, "spectrogram")

    def forward(self, audio: Tensor) -> tuple[Tensor, ...]:
        spec_B1TF = audio if self.log_mel is None else self.log_mel(audio)
        outputs = self._outputs(spec_B1TF)
        return (*outputs, spec_B1TF) if self.spectrogram else outputs

    def _outputs(self, spec_B1TF: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Classifier):
            clip_BC, frames_BHC = self.model(spec_B1TF)
            logits = (clip_BC,) if frames_BHC is None else (clip_BC, frames_BHC)
            return tuple(self.model.probabilities(x) for x in logits)
        tokens_BSD, P = self.model(spec_B1TF), self.encoder_config.patch_size
        frames_BHD = rows_of_tokens(tokens_BSD, (spec_B1TF.shape[2] // P, spec_B1TF.shape[3] // P))
        return frames_BHD.mean(1), tokens_BSD[:, 0], frames_BHD, tokens_BSD[:, 1:]

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Shape of one clip of so many rows of patches, as the input has it."""
        frames = rows * self.encoder_config.patch_size
        if self.log_mel is None:
            return (1, frames, self.encoder_config.mel_bins)
        return (samples_of(self.log_mel.features, frames),)

    @property
    def most_samples(self) -> int:
        """The longest waveform that the table of positions covers."""
        if self.log_mel is None:
            raise ValueError("a graph that takes spectrograms; expected one with the log-mel features inside")
        features = self.log_mel.features
        return samples_of(features, MAX_ROWS * self.encoder_config.patch_size) + features.frame_shift - 1


def samples_of(features: FeatureConfig, frames: int) -> int:
    """The fewest samples that give so many frames."""
    return features.frame_length + (frames - 1) * features.frame_shift


def with_kernels(model: Encoder | Classifier, kernels: str) -> Encoder | Classifier:
    """The same weights, which stay shared, in a model of other kernels (`ModelConfig.kernels`)."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    config = dataclasses.replace(encoder.config, kernels=kernels)
    with torch.device("meta"):
        twin = Encoder(config) if isinstance(model, Encoder) else Classifier(config, model.config, model.classes)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()
