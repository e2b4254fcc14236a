"""Small classifiers: one with random weights, on disk, and one that hears tones, whose answer is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cat.checkpoints import ClassifierInfo, store
from cat.config import to_mapping
from cat.data import FeatureConfig
from cat.model import Classifier, HeadConfig, ModelConfig
from cat.model.classifier import ClassifierOutput
from cat.prediction import CATClassifier

MODEL = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
FEATURES = FeatureConfig(frames=128)
FRAMES = HeadConfig("frames", "linear", "bce")
CLASSES, NAMES = ("low", "high", "none"), ("Low tone", "High tone", "Nothing")
TONES = {"low": 500.0, "high": 4000.0}  # Hz


def configuration(head: HeadConfig, padding: str) -> dict:
    task = "events" if head.kind == "frames" else "single-label" if head.loss == "ce" else "multi-label"
    return {
        "task": task,
        "classes": list(CLASSES),
        "class_names": list(NAMES),
        "data": {"padding": padding},
        "model": to_mapping(MODEL),
        "head": to_mapping(head),
        "features": to_mapping(FEATURES),
    }


@pytest.fixture
def save_run(tmp_path: Path) -> Callable[..., Path]:
    """`save_run()`: a fine-tuning run with one checkpoint of random weights."""

    def save(kind: str = "clip", loss: str = "ce", padding: str = "mask") -> Path:
        torch.manual_seed(0)
        head = HeadConfig() if kind == "clip" else FRAMES
        head = dataclasses.replace(head, loss=loss if kind == "clip" else "bce")
        model = Classifier(MODEL, head, len(CLASSES))
        for parameter in model.head.parameters():  # far from 0.5, which zeros would give
            nn.init.normal_(parameter, std=0.5)
        run = tmp_path / f"{kind}-{loss}-{padding}"
        config = configuration(head, padding)
        store.save(run / "checkpoints", step=3, model=model.state_dict(), optimizer={}, config=config)
        return run

    return save


class Tones(nn.Module):
    """A frame head that is right: a class is there where its tone is loud, in more than half of a row of patches.
    The clip's score of a class is its highest row's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, spec: Tensor, *, rows: Sequence[int] | None = None) -> ClassifierOutput:
        self.calls += 1
        spec_BTF = spec[:, 0] * 2 * FEATURES.std + FEATURES.mean
        loud = torch.stack([spec_BTF[..., 25:45].amax(-1), spec_BTF[..., 92:104].amax(-1)], -1) > 1  # padding is 0
        share = loud.unflatten(1, (-1, 16)).float().mean(2)
        share = torch.nn.functional.pad(share, (0, 1))  # nothing of the third
        if rows is not None:
            share = torch.where(torch.arange(share.shape[1])[:, None] < torch.tensor(rows)[:, None, None], share, 0)
        logits = (share.clamp(0.01, 0.99)).logit()
        return ClassifierOutput(logits.amax(1), logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


@pytest.fixture
def tones(tmp_path: Path) -> CATClassifier:
    config, path = configuration(FRAMES, "mask"), tmp_path / "tones" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"no weights")
    info = ClassifierInfo(path, 1, "events", CLASSES, NAMES, MODEL, FRAMES, FEATURES, "mask", config)
    return CATClassifier(Tones(), info)


@pytest.fixture
def sound() -> Callable[..., np.ndarray]:
    """`sound(seconds, (label, onset, offset), ...)`, (n,) float32: tones in faint noise."""

    def make(seconds: float, *events: tuple[str, float, float], rate: int = FEATURES.sample_rate) -> np.ndarray:
        time = np.arange(round(seconds * rate)) / rate
        wave = 1e-4 * np.random.default_rng(0).standard_normal(len(time))
        for label, onset, offset in events:
            wave += 0.3 * np.sin(2 * np.pi * TONES[label] * time) * ((time >= onset) & (time < offset))
        return wave.astype(np.float32)

    return make
