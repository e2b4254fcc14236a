"""Dasheng (Dinkel et al., 2024, "Scaling up masked audio encoder learning") from its released files.

Shapes: B clips, n samples, T frames, F mel bins, L tokens, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat.checkpoints.store import CheckpointError
from cat.encoders.frozen import checked_lengths
from cat.encoders.untrained import drawn_again, initialise_layers, untrained_twin
from cat.encoders.vit import EPS, Block, real_tokens
from cat.encoders.weights import Weights, read_weights

SAMPLE_RATE, MEL_BINS, FFT, HOP, HIGHEST = 16_000, 64, 512, 160, 8_000
TOP_DB = 120.0
PATCH = 4  # frames; all bins
HEADS = {768: 12, 1280: 16, 1536: 24}  # of base, 0.6B and 1.2B, by their width
# What the front end below does; anything else would need another one.
SETTINGS = {
    "n_fft": FFT,
    "win_size": FFT,
    "hop_size": HOP,
    "n_mels": MEL_BINS,
    "f_min": 0,
    "f_max": HIGHEST,
    "center": True,
    "top_db": TOP_DB,
}
WINDOW, FILTERS = "front_end.0.spectrogram.window", "front_end.0.mel_scale.fb"


class DashengEncoder:
    """Dasheng: mean over the tokens, 25 a second: (B, 768) at 16 kHz (0.6B: 1280, 1.2B: 1536).

    `path` is ``dasheng_base.pt``, ``dasheng_06b.pt`` or ``dasheng_12b.pt`` of zenodo.org/records/11511780, or their
    tensors in a ``.safetensors`` file. Licence: Apache 2.0.

    The whole clip is heard, in pieces of 1008 frames that know nothing of each other; frames past the last whole 4 are
    left out, so that a clip must have 4 (480 samples). Padding beside longer clips is hidden from it. The spectrogram
    in dB ends 120 below the clip's own maximum. In the released code it is the batch's maximum, and so a clip's
    embedding depends on the clips beside it: ours is what that code gives of a clip alone.

    Raises: `CheckpointError`, ValueError, FileNotFoundError: a file that is none, or does not fit, in words.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        weights = read_weights(path, "Dasheng", settings="config")
        self.model = _network(weights, device)
        self.device = torch.device(device)
        self.name, self.sample_rate = f"dasheng:{path}", SAMPLE_RATE
        self.dim = self.model.time_pos_embed.shape[1]
        self.min_samples = (PATCH - 1) * HOP

    def untrained_twin(self, seed: int = 0) -> DashengEncoder:
        """The same network, initialised anew."""
        return untrained_twin(self, seed, lambda: drawn_again(self.model))

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths)
        if (least := int(lengths_B.min())) < self.min_samples:
            raise ValueError(f"a clip has {least} samples at 16 kHz; Dasheng hears no fewer than {self.min_samples}")
        spec_BFT = decibels(waveform.to(self.device), lengths_B)
        embedding: Tensor = self.model(spec_BFT, frames_of(lengths_B) // PATCH)
        return embedding.float()


class DashengNetwork(nn.Module):
    """Spectrogram (B, F, T) in dB -> (B, D), the mean of each clip's first ``tokens_B`` (on the CPU); `piece` tokens
    are heard at once."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, piece: int) -> None:
        super().__init__()
        self.init_bn = nn.ModuleDict({"1": nn.BatchNorm1d(MEL_BINS)})
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, (MEL_BINS, PATCH), (MEL_BINS, PATCH))})
        self.time_pos_embed = nn.Parameter(torch.empty(1, dim, 1, piece))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def initialise(self) -> None:
        """As before training, but that the input is normalised with AudioSet's statistics, which `init_bn` keeps."""
        initialise_layers(self, partial(nn.init.trunc_normal_, std=0.02))
        projection: Any = self.patch_embed["proj"]
        projection.reset_parameters()
        for parameter in (self.time_pos_embed, self.freq_pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, spec_BFT: Tensor, tokens_B: Tensor) -> Tensor:
        patches_BDL = self.patch_embed["proj"](self.init_bn["1"](spec_BFT)[:, None])[:, :, 0]
        piece, total_BD = self.time_pos_embed.shape[3], patches_BDL.new_zeros(patches_BDL.shape[:2])
        for start in range(0, patches_BDL.shape[2], piece):
            here_b = (tokens_B > start).nonzero()[:, 0]
            there_b = here_b.to(patches_BDL.device)
            total_BD[there_b] += self._sum(patches_BDL[there_b, :, start : start + piece], tokens_B[here_b] - start)
        return total_BD / tokens_B[:, None].to(total_BD.device)

    def _sum(self, patches_BDL: Tensor, tokens_B: Tensor) -> Tensor:
        """Of one piece's tokens, (B, D)."""
        length = patches_BDL.shape[2]
        places_1DL = (self.time_pos_embed[..., :length] + self.freq_pos_embed)[:, :, 0]
        x_BLD, real_BL = (patches_BDL + places_1DL).transpose(1, 2), real_tokens(tokens_B, length, patches_BDL.device)
        for block in self.blocks:
            x_BLD = block(x_BLD, real_BL)
        x_BLD = self.norm(x_BLD)
        return (x_BLD if real_BL is None else x_BLD * real_BL[..., None]).sum(1)


def frames_of(samples: Tensor) -> Tensor:
    """Frames are centred: half of the first one lies before the clip."""
    return 1 + samples // HOP


def decibels(waveform: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, F, T) float32: mel energies in dB, not below -100 and not more than 120 below the clip's loudest one. What
    lies behind a clip's frames is 0. Lengths are on the CPU; clips of one length are computed together."""
    spec_BFT = waveform.new_zeros((len(waveform), MEL_BINS, int(frames_of(lengths_B).max())), dtype=torch.float32)
    window, filters_NF = (table.to(waveform.device) for table in _tables())
    with torch.autocast(waveform.device.type, enabled=False):  # powers overflow float16
        for n in lengths_B.unique().tolist():
            clips_b = (lengths_B == n).nonzero()[:, 0].to(waveform.device)
            wave = waveform[clips_b, :n].float()
            stft = torch.stft(wave, FFT, HOP, window=window, pad_mode="reflect", return_complex=True)
            power_bFT = filters_NF.T @ stft.abs().square()
            db_bFT = 10 * power_bFT.clamp(min=1e-10).log10()
            spec_BFT[clips_b, :, : db_bFT.shape[2]] = db_bFT.maximum(db_bFT.amax((1, 2), keepdim=True) - TOP_DB)
    return spec_BFT


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """The periodic Hann window, and triangles (N, F) of height 1 that are even on HTK's mel scale, over hertz."""
    window = torch.hann_window(FFT, device="cpu")
    frequency_N1 = torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
    top = 2595 * math.log10(1 + HIGHEST / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, MEL_BINS + 2, dtype=torch.float64, device="cpu") / 2595) - 1)
    rising_NF = (frequency_N1 - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling_NF = (corners[2:] - frequency_N1) / (corners[2:] - corners[1:-1])
    return window, rising_NF.minimum(falling_NF).clamp(min=0).float()


def _network(weights: Weights, device: torch.device | str) -> DashengNetwork:
    weights.check_settings(SETTINGS)
    for name, ours in zip((WINDOW, FILTERS), _tables(), strict=True):  # a released file has them as buffers
        theirs = weights.tensors.pop(name, ours)
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-4):
            raise CheckpointError(
                f"{weights.path}: {name} {tuple(theirs.shape)} is not that of {MEL_BINS} HTK mel bins up to {HIGHEST} "
                f"Hz with an FFT of {FFT}; only Dasheng as released can be read"
            )
    _, dim, _, piece = weights.shape("time_pos_embed", 4)
    hidden, _ = weights.shape("blocks.0.mlp.fc1.weight", 2)
    heads = HEADS.get(dim, weights.settings.get("num_heads"))
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise CheckpointError(
            f"{weights.path}: num_heads is {heads!r} for a width of {dim}; expected a divisor of it in 'config', or a "
            f"released width: {', '.join(map(str, HEADS))}"
        )
    return weights.into(lambda: DashengNetwork(dim, weights.depth("blocks"), heads, hidden, piece), device)
