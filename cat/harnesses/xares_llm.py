"""XARES-LLM: its runner is handed this file, or ``cat.harnesses.xares_llm.XaresLLMEncoder``.

It takes the one name here that ends in "Encoder": ``CAT_CHECKPOINT`` names the checkpoint, ``CAT_STEP_MS`` the time
between two frames (40 ms).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cat.harnesses.steps import frames_of_steps, load, step_of


class XaresLLMEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = load()
        self.step = step_of(self.encoder)
        self.output_dim = self.encoder.config.model.embed_dim

    def forward(self, audio: Tensor, audio_attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Frames (B, t, D) float32 and their mask (B, t) int64, of audio (B, n) and its mask (B, n): 1 for a clip's
        samples, 0 for padding. Padding is cut away before anything hears it, so that a clip's frames are those of the
        clip alone; behind them are zeros, masked. Without a mask all is audio."""
        clips = list(torch.atleast_2d(audio))
        if audio_attention_mask is not None:
            clips = [clip[mask.bool()] for clip, mask in zip(clips, audio_attention_mask, strict=True)]
        frames = frames_of_steps(self.encoder, clips, self.step)
        masks = [torch.ones(len(found), dtype=torch.int64, device=found.device) for found in frames]
        return pad_sequence(frames, batch_first=True), pad_sequence(masks, batch_first=True)
