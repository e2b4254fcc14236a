"""HEAR (arXiv 2203.03022): its common API, to be named to the harness as the module ``cat.harnesses.hear``.

The steps between timestamps are 40 ms, or ``CAT_STEP_MS``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cat.harnesses.steps import audible, first_centre, frames_every, load, step_of


class HearModel(nn.Module):
    """What `load_model` gives: the sizes that the API asks for, and the encoder."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.encoder = load(path)
        self.step = step_of(self.encoder)
        self.sample_rate = self.encoder.sample_rate
        self.scene_embedding_size = self.encoder.dim
        self.timestamp_embedding_size = self.encoder.config.model.embed_dim


def load_model(model_file_path: str = "") -> HearModel:
    """``model_file_path``: a run, a checkpoint or a .safetensors file; empty: what ``CAT_CHECKPOINT`` names."""
    return HearModel(model_file_path)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """(n, D) float32 of audio (n, samples) in [-1, 1]: one embedding of each whole clip."""
    clips = [audible(model.encoder, clip) for clip in audio]
    return model.encoder(clips, model.sample_rate, patches=False).clip


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """((n, t, D) float32, (n, t) float64 centres in ms). A centre is a number of samples over the rate, never a sum of
    rounded steps, and lies inside the clip."""
    frames_ntD = torch.stack(frames_every(model.encoder, list(audio), model.step))
    samples_t = first_centre(model.encoder) + model.step * torch.arange(frames_ntD.shape[1]).double()
    samples_t = samples_t.clamp(max=(audio.shape[1] - 1) / 2) if len(samples_t) == 1 else samples_t
    return frames_ntD, (1000 * samples_t / model.sample_rate).to(frames_ntD.device).expand(len(audio), -1)
