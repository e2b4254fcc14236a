"""MTEB, with the audio benchmark MAEB: ``mteb.evaluate(cat.harnesses.mteb.load("runs/mine"), tasks)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cat.encoders.audio import CATEncoder
from cat.encoders.waveforms import as_clips
from cat.harnesses.steps import audible

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
except ImportError:  # every module of ours imports without what only some use; `load` says it
    ModelMeta, AbsEncoder = None, object


def load(path: str, device: str | None = None) -> MtebModel:
    """The encoder of a run, a checkpoint or a .safetensors file, as mteb takes one."""
    if ModelMeta is None:
        raise ImportError("MTEB needs the package 'mteb': pip install mteb")
    return MtebModel(path, device=device)


class MtebModel(AbsEncoder):
    """Clip embeddings of whatever audio mteb's loaders deliver: any sample rate and number of channels."""

    def __init__(self, model_name: str, revision: str | None = None, device: str | None = None, **_: Any) -> None:
        self.model = CATEncoder.from_pretrained(model_name, device=device or "cpu")
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        unknown = ("release_date", "license", "open_weights", "public_training_code", "public_training_data")
        self.mteb_model_meta = ModelMeta(
            **dict.fromkeys((*unknown, "languages", "training_datasets", "max_tokens")),
            loader=MtebModel,
            name=f"cat/{Path(model_name).name}",
            revision=revision,
            n_parameters=parameters,
            memory_usage_mb=4 * parameters / 2**20,
            embed_dim=self.model.dim,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            modalities=["audio"],
        )

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        """(n, D) float32, in their order: ``inputs`` is a loader of batches whose "audio" is a list of {"array",
        "sampling_rate"}, arrays (samples,) or (channels, samples)."""
        return np.concatenate([self._embed(batch["audio"]) for batch in inputs])

    def _embed(self, items: list[Any]) -> np.ndarray:
        clips = []
        for item in items:
            wave = np.asarray(item["array"])
            wave = wave.mean(0) if wave.ndim > 1 else wave
            clips += as_clips(wave, item["sampling_rate"], self.model.sample_rate)
        clips = [audible(self.model, clip) for clip in clips]
        return self.model(clips, self.model.sample_rate, patches=False).clip.cpu().numpy()
