"""Audio-MAE (Huang et al., 2022, "Masked autoencoders that listen") from its released file.

Shapes: B clips, n samples, L tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat.checkpoints.store import CheckpointError
from cat.data.features import FeatureConfig, log_mel
from cat.encoders.frozen import checked_lengths
from cat.encoders.untrained import drawn_again, initialise_layers, untrained_twin
from cat.encoders.vit import EPS, Block
from cat.encoders.weights import Weights, read_weights

MEL_BINS, PATCH, HEAD_WIDTH = 128, 16, 64  # heads are 64 wide in its small, base and large ViT
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet's log-mel values
# The decoder, the heads, and the norm that pre-training has behind the encoder: the pooled vector has one of its own.
UNUSED = r"decoder_|mask_token$|norm\.|head\."


class AudioMAEEncoder:
    """Audio-MAE: mean over the patch tokens, then a LayerNorm: (B, 768) at 16 kHz, of norm 27.7 (not of unit length).

    `path` is ``pretrained.pth`` as github.com/facebookresearch/AudioMAE gives it, one of its fine-tuned files, or their
    tensors in a ``.safetensors`` file. Both code and weights are CC BY-NC 4.0: not for commercial use.

    A clip's mean is removed, then it becomes AudioSet's log-mel spectrogram of 1024 frames (10.26 s): shorter clips are
    padded with zeros before the normalisation, and of longer ones the beginning is heard. Padding is not hidden: the
    network was trained so. The LayerNorm is a fine-tuned file's ``fc_norm``; of a pre-trained file, which has none, it
    is without weights, and that file's ``norm`` is not used, as in the released code.

    Raises: `CheckpointError`, ValueError, FileNotFoundError: a file that is none, or does not fit, in words.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        weights = read_weights(path, "Audio-MAE").without(UNUSED)
        self.model = _network(weights, device)
        self.device = torch.device(device)
        frames = (self.model.pos_embed.shape[1] - 1) * PATCH * PATCH // MEL_BINS
        self.features = FeatureConfig(frames=frames, mean=MEAN, std=STD)
        self.name, self.sample_rate = f"audiomae:{path}", self.features.sample_rate
        self.dim = self.model.pos_embed.shape[2]
        self.min_samples = self.features.frame_length

    def untrained_twin(self, seed: int = 0) -> AudioMAEEncoder:
        """The same network, initialised anew."""
        return untrained_twin(self, seed, lambda: drawn_again(self.model))

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).to(self.device)
        spec_B1TF = log_mel(waveform.to(self.device), self.features, lengths=lengths_B)
        embedding: Tensor = self.model(spec_B1TF)
        return embedding.float()


class AudioMAENetwork(nn.Module):
    """Spectrogram (B, 1, T, 128) -> (B, D)."""

    def __init__(self, dim: int, depth: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, dim // HEAD_WIDTH, hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(dim, eps=EPS)

    def initialise(self) -> None:
        """MAE's, where positions are sines that are not learned: they stay."""
        initialise_layers(self, nn.init.xavier_uniform_)
        nn.init.normal_(self.cls_token, std=0.02)
        projection: Any = self.patch_embed["proj"]
        projection.reset_parameters()
        nn.init.xavier_uniform_(projection.weight.flatten(1))

    def forward(self, spec_B1TF: Tensor) -> Tensor:
        patches_BLD = self.patch_embed["proj"](spec_B1TF).flatten(2).transpose(1, 2)
        x_BLD = torch.cat([self.cls_token.expand(len(patches_BLD), -1, -1), patches_BLD], dim=1) + self.pos_embed
        for block in self.blocks:
            x_BLD = block(x_BLD)
        pooled: Tensor = self.fc_norm(x_BLD[:, 1:].mean(1))
        return pooled


def _network(weights: Weights, device: torch.device | str) -> AudioMAENetwork:
    _, tokens, dim = weights.shape("pos_embed", 3)
    hidden, _ = weights.shape("blocks.0.mlp.fc1.weight", 2)
    columns = MEL_BINS // PATCH
    if dim % HEAD_WIDTH or tokens < 2 or (tokens - 1) % columns:
        raise CheckpointError(
            f"{weights.path}: pos_embed has shape {(1, tokens, dim)}; expected a width that is a multiple of "
            f"{HEAD_WIDTH}, and a CLS token with {columns} patches for every {PATCH} frames"
        )
    weights.tensors.setdefault("fc_norm.weight", torch.ones(dim))
    weights.tensors.setdefault("fc_norm.bias", torch.zeros(dim))
    return weights.into(lambda: AudioMAENetwork(dim, weights.depth("blocks"), hidden, tokens), device)
