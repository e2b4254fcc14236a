"""What a checkpoint holds, encoder or classifier, and what a file of it has to tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat.checkpoints import load_classifier, load_encoder
from cat.checkpoints.encoder import read_model
from cat.config import to_mapping
from cat.data.features import FeatureConfig
from cat.export.graph import Graph, LogMel
from cat.model import Classifier, Encoder
from cat.model.encoder import MAX_ROWS
from cat_kernels import __version__


@dataclass(frozen=True)
class Exportable:
    """A model with all that its file says of it."""

    model: Encoder | Classifier
    features: FeatureConfig
    least_frames: int  # to which shorter clips are filled up with zeros that the network sees; 0: to whole patches only
    about: dict[str, Any]
    path: Path

    def graph(self, model: Encoder | Classifier, *, waveform: bool, spectrogram: bool = False) -> Graph:
        """Of ``model``, which is this one or a twin of it."""
        log_mel = LogMel(self.features, self.about["patch_size"], self.least_frames) if waveform else None
        return Graph(model, log_mel, spectrogram=spectrogram).eval()


def load_exportable(path: str | Path, *, encoder: bool = False, weights: str = "student") -> Exportable:
    """The classifier of a fine-tuned checkpoint, or the encoder of any (of a fine-tuned one with ``encoder``).

    Raises: `CheckpointError`.
    """
    if "head" in read_model(path).config and not encoder:
        classifier, info = load_classifier(path)
        about = {
            "kind": "classifier",
            "task": info.task,
            "classes": list(info.classes),
            "class_names": list(info.class_names),
            "head": to_mapping(info.head),
            "padding": info.padding,
            **_about(info),
        }
        least_frames = info.features.frames if info.padding == "fill" else 0
        return Exportable(classifier, info.features, least_frames, about, info.path)
    found, told = load_encoder(path, weights)
    return Exportable(found, told.features, 0, {"kind": "encoder", "weights": told.weights, **_about(told)}, told.path)


def _about(info: Any) -> dict[str, Any]:
    P = info.model.patch_size
    return {
        "sample_rate": info.features.sample_rate,
        "features": to_mapping(info.features),
        "model": to_mapping(info.model),
        "patch_size": P,
        "most_frames": MAX_ROWS * P,
        "step": info.step,
        "cat_version": __version__,
    }
