"""What tests of several rooms share: a fine-tuned checkpoint without the training, a small labelled data set."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cat.checkpoints.store import save
from cat.config import to_mapping
from cat.data import Clip, Manifest, write_manifest
from cat.data.features import FeatureConfig
from cat.model import Classifier, HeadConfig, ModelConfig

TINY = ModelConfig(channels=(8, 16), embed_dim=32, depth=1, num_heads=2, decoder_dim=32)
FEATURES = FeatureConfig(frames=64, mel_bins=128)


@pytest.fixture
def classifier_checkpoint() -> Callable[..., Path]:
    """``make(run_dir, classes, task="single-label", padding="mask", ...)`` writes the checkpoint of step 7 of a
    fine-tuning run, a tiny model of random weights, and returns its directory. ``change`` may alter the model."""

    def make(
        run_dir: Path,
        classes: Sequence[str],
        *,
        task: str = "single-label",
        padding: str = "mask",
        names: Sequence[str] | None = None,
        head: HeadConfig | None = None,
        model: ModelConfig = TINY,
        features: FeatureConfig = FEATURES,
        seed: int = 0,
        change: Callable[[Classifier], None] = lambda model: None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        kinds = {"single-label": HeadConfig(), "multi-label": HeadConfig(loss="bce")}
        head = head or kinds.get(task, HeadConfig(kind="frames", pooling="linear", loss="bce"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = Classifier(model, head, len(classes))
        with torch.no_grad():
            change(classifier)
        settings = {
            "task": task,
            "classes": list(classes),
            "class_names": list(names or classes),
            "data": {"padding": padding},
            "model": to_mapping(model),
            "head": to_mapping(head),
            "features": to_mapping(features),
            **(config or {}),
        }
        return save(
            run_dir / "checkpoints", step=7, model=classifier.state_dict(), optimizer={}, config=settings, score=-0.5
        )

    return make


@pytest.fixture
def sed_eval() -> None:
    """For tests of what it scores."""
    if importlib.util.find_spec("sed_eval") is None:
        pytest.skip("needs sed_eval")


@pytest.fixture(scope="session")
def two_sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, valid and test.jsonl: hiss and rumble, which any encoder tells apart."""
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 6), ("test", 6)):
        clips = []
        for i in range(count):
            noise = rng.normal(size=6000)
            wave = np.diff(noise, n=2, prepend=[0, 0]) if i % 2 else np.convolve(noise, np.ones(40))[:6000]
            wave *= rng.uniform(0.02, 0.1) / wave.std()
            soundfile.write(root / f"{split}{i}.wav", wave, 16000)
            clips.append(Clip(f"{split}{i}.wav", labels=("hiss" if i % 2 else "rumble",)))
        write_manifest(Manifest(tuple(clips), root), root / f"{split}.jsonl")
    return root
