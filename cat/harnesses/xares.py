"""X-ARES (arXiv 2505.16369): its runner is handed this file, or ``cat.harnesses.xares``.

It takes the one name here that ends in "Encoder", and builds it without arguments: ``CAT_CHECKPOINT`` names the
checkpoint, ``CAT_STEP_MS`` the time between two frames (40 ms).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cat.harnesses.steps import frames_of_steps, load, step_of


class XaresEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = load()
        self.step = step_of(self.encoder)
        self.sampling_rate = self.encoder.sample_rate
        self.output_dim = self.encoder.config.model.embed_dim
        self.hop_size_in_ms = 1000 * self.step / self.sampling_rate

    def forward(self, audio: Tensor) -> Tensor:
        """(B, t, D) float32 of audio (B, n), or (1, t, D) of (n,), of any length: frame k is that of the k-th
        ``hop_size_in_ms``."""
        return torch.stack(frames_of_steps(self.encoder, list(torch.atleast_2d(audio)), self.step))
