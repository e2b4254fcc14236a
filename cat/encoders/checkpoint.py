"""A CAT checkpoint as a frozen encoder.

Shapes: B clips, n samples, T frames, F mel bins, P patch, H = T/P, W = F/P, L = H*W patches, D embedding width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cat.checkpoints import load_encoder
from cat.data.features import FeatureConfig, frames_in, log_mel
from cat.encoders.frozen import checked_lengths
from cat.model import Encoder

POOLINGS = ("mean", "cls", "both")


class CatEncoder:
    """A CAT encoder without a mask, its tokens pooled to one vector a clip.

    Clips are padded or cropped to the `frames` the features ask for, as in pre-training. The mean runs over the patches
    that hold at least one real frame: padding would otherwise dominate a short clip. dim is D, or 2 D for "both".
    """

    def __init__(
        self,
        encoder: Encoder,
        features: FeatureConfig,
        *,
        name: str = "cat",
        pooling: str = "mean",
        device: torch.device | str = "cpu",
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.features, self.name, self.pooling, self.device = features, name, pooling, torch.device(device)
        self.sample_rate = features.sample_rate
        self.dim = encoder.config.embed_dim * (2 if pooling == "both" else 1)
        self.min_samples, self.max_samples = features.frame_length, features.samples

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        weights: str = "student",
        pooling: str = "mean",
        device: torch.device | str = "cpu",
    ) -> CatEncoder:
        """The encoder of a run (its newest checkpoint), a checkpoint directory or a .safetensors file."""
        encoder, info = load_encoder(path, weights=weights)
        return cls(encoder, info.features, name=f"cat:{path}", pooling=pooling, device=device)

    def untrained_twin(self, seed: int = 0) -> CatEncoder:
        """The same architecture, features and pooling, freshly initialised from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = Encoder(self.encoder.config)
        return CatEncoder(encoder, self.features, name=f"untrained:{seed}", pooling=self.pooling, device=self.device)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths)
        spec_B1TF = log_mel(waveform.to(self.device), self.features, lengths=lengths_B.to(self.device))
        tokens_BSD = self.encoder(spec_B1TF).float()
        cls_BD, patches_BLD = tokens_BSD[:, 0], tokens_BSD[:, 1:]
        if self.pooling == "cls":
            return cls_BD
        mean_BD = self._mean_of_real_patches(patches_BLD, lengths_B, spec_B1TF.shape[-2])
        return mean_BD if self.pooling == "mean" else torch.cat([cls_BD, mean_BD], dim=1)

    def _mean_of_real_patches(self, patches_BLD: Tensor, lengths_B: Tensor, frames: int) -> Tensor:
        clips, _, width = patches_BLD.shape
        patch = self.encoder.config.patch_size
        rows_BHD = patches_BLD.reshape(clips, frames // patch, -1, width).mean(dim=2)
        real_B = frames_in(self.features, lengths_B).clamp(1, frames).to(self.device)
        used_BH = torch.arange(rows_BHD.shape[1], device=self.device) * patch < real_B[:, None]
        return (rows_BHD * used_BH[..., None]).sum(1) / used_BH.sum(1, keepdim=True)
