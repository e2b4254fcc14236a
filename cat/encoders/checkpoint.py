"""A CAT checkpoint as a frozen encoder: `CATEncoder`, behind the interface of `embed` and `probe`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cat.checkpoints.hub import EncoderConfig
from cat.data.features import FeatureConfig
from cat.encoders.audio import CATEncoder, mean_of
from cat.encoders.frozen import checked_lengths
from cat.encoders.untrained import drawing
from cat.model import Encoder


class CatEncoder:
    """The clip embeddings of a `CATEncoder`, (B, dim) float32."""

    def __init__(
        self,
        encoder: Encoder,
        features: FeatureConfig,
        *,
        name: str = "cat",
        pooling: str = "mean",
        device: torch.device | str = "cpu",
    ) -> None:
        config = EncoderConfig(encoder.config, features, pooling)
        self.model = CATEncoder(config, encoder=encoder).to(device).requires_grad_(False)
        self.encoder, self.features, self.pooling = encoder, features, pooling
        self.name, self.device = name, torch.device(device)
        self.sample_rate, self.dim, self.min_samples = features.sample_rate, self.model.dim, self.model.min_samples

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        weights: str = "student",
        pooling: str = "mean",
        device: torch.device | str = "cpu",
    ) -> CatEncoder:
        """The encoder of whatever `CATEncoder.from_pretrained` takes."""
        model = CATEncoder.from_pretrained(path, weights=weights, pooling=pooling, device=device)
        return cls(model.encoder, model.features, name=f"cat:{path}", pooling=pooling, device=device)

    def untrained_twin(self, seed: int = 0) -> CatEncoder:
        """The same architecture, features and pooling, freshly initialised from `seed`."""
        with drawing(seed):
            encoder = Encoder(self.encoder.config)
        name = f"untrained:{seed}:{self.name}"
        return CatEncoder(encoder, self.features, name=name, pooling=self.pooling, device=self.device)

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        ends = checked_lengths(waveform, lengths).tolist()
        clips = [clip[:end] for clip, end in zip(waveform, ends, strict=True)]
        return self.model(clips, self.sample_rate, patches=False, batch_size=max(16, len(clips))).clip.float()

    def of_stream(self, chunks: Iterable[np.ndarray]) -> Tensor:
        """(dim,): of a clip that comes in chunks (n,)."""
        outputs = self.model.stream(chunks, self.sample_rate)
        return mean_of((output.clip[0], output.rows[0]) for output in outputs).float()
