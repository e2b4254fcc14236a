"""Encoders that never learned: log-mel statistics, and a random projection of them.

Shapes: B clips, n samples, T frames, F mel bins.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from cat.data.features import FeatureConfig, frames_in, log_mel
from cat.encoders.frozen import checked_lengths, mean_direction


class LogMelStatistics:
    """Mean and standard deviation over time of every log-mel bin: (B, 2 F). No learning at all: the honest floor.

    Over the whole clip, real frames only. `features`: AudioSet's by default.
    """

    def __init__(self, features: FeatureConfig | None = None, *, device: torch.device | str = "cpu") -> None:
        self.features, self.device = features or FeatureConfig(), torch.device(device)
        self.name, self.sample_rate, self.dim = "logmel", self.features.sample_rate, 2 * self.features.mel_bins
        self.min_samples = self.features.frame_length

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).to(self.device)
        frames_B = frames_in(self.features, lengths_B).clamp(min=1)
        whole = dataclasses.replace(self.features, frames=int(frames_B.max()))
        spec_BTF = log_mel(waveform.to(self.device), whole, lengths=lengths_B).squeeze(1).float()
        real_BT1 = (torch.arange(spec_BTF.shape[1], device=self.device) < frames_B[:, None])[..., None]
        count_B1 = frames_B[:, None]
        mean_BF = (spec_BTF * real_BT1).sum(1) / count_B1
        variance_BF = ((spec_BTF - mean_BF[:, None]).square() * real_BT1).sum(1) / count_B1
        return torch.cat([mean_BF, variance_BF.sqrt()], dim=1)

    def combine(self, rows_WE: Tensor, lengths_W: Tensor) -> Tensor:
        """(2 F,): the whole clip's, but for the frames across the windows' edges, which are in none."""
        count_W1 = frames_in(self.features, lengths_W).clamp(min=1).double()[:, None]
        means_WF, deviations_WF = rows_WE.double().chunk(2, dim=1)
        mean_F = (means_WF * count_W1).sum(0) / count_W1.sum()
        spread_WF = deviations_WF.square() + (means_WF - mean_F).square()
        return torch.cat([mean_F, ((spread_WF * count_W1).sum(0) / count_W1.sum()).sqrt()]).to(rows_WE.dtype)


class RandomProjection:
    """Control for representation regularisation: R s / |R s|, with R (dim, 2 F) drawn once from N(0, 1) with `seed`
    and s = `LogMelStatistics`, its means and its deviations each less their average over the bins.

    It has CLAP's width (512) and CLAP's scale (unit length), and knows about the clip only the shape of its average
    spectrum, not the level: a gain over it is what the external encoder's learning is worth. (With the averages left
    in, the mean embedding has 58 % of the energy on the sounds of ``cat-audio synth``; without them 32 %.)
    """

    combine = staticmethod(mean_direction)

    def __init__(self, dim: int = 512, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        self.statistics = LogMelStatistics(device=device)
        self.name, self.sample_rate, self.dim = f"random:{seed}", self.statistics.sample_rate, dim
        self.min_samples, self.device = self.statistics.min_samples, self.statistics.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same matrix on every device
        self.matrix = torch.randn(dim, self.statistics.dim, generator=generator).to(device)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        halves_B2F = self.statistics(waveform, lengths).unflatten(1, (2, -1))
        shape_BS = (halves_B2F - halves_B2F.mean(dim=2, keepdim=True)).flatten(1)
        return nn.functional.normalize(shape_BS @ self.matrix.T, dim=1)
