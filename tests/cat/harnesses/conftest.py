"""A small encoder on disk, named in the environment as a user of a harness would."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cat.checkpoints import save_tensors
from cat.data.features import FeatureConfig
from cat.encoders.audio import CATEncoder
from cat.model import Encoder, ModelConfig

MODEL = ModelConfig(channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1)
FEATURES = FeatureConfig(frames=96)  # windows of 0.96 s


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    torch.manual_seed(0)
    config = {"model": dataclasses.asdict(MODEL), "features": dataclasses.asdict(FEATURES)}
    save_tensors(path, Encoder(MODEL).state_dict(), config=config)
    return path


@pytest.fixture
def checkpoint(saved, monkeypatch) -> Path:
    monkeypatch.setenv("CAT_CHECKPOINT", str(saved))
    monkeypatch.delenv("CAT_STEP_MS", raising=False)
    return saved


@pytest.fixture
def encoder(saved) -> CATEncoder:
    return CATEncoder.from_pretrained(str(saved))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
