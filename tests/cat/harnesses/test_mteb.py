"""MTEB: its encoder interface, and its own mock run."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from cat.harnesses import mteb
from tests.cat.harnesses.conftest import noise


def items(*arrays: np.ndarray, rate: int = 16000) -> list[dict]:
    return [{"array": array, "sampling_rate": rate} for array in arrays]


def test_embeddings_of_a_loaders_batches_in_their_order(saved, encoder, monkeypatch):
    monkeypatch.setattr(mteb, "ModelMeta", mteb.ModelMeta or types.SimpleNamespace)
    model = mteb.load(str(saved))
    waves = [noise(samples, seed=samples).numpy() for samples in (20000, 5000, 100)]
    stereo = np.stack([waves[1], waves[1]])
    found = model.encode([{"audio": items(*waves)}, {"audio": items(stereo) + items(noise(44100).numpy(), rate=44100)}])
    assert (found.shape, found.dtype) == ((5, 16), np.float32)
    for row, wave in zip(found, [*waves[:2], np.pad(waves[2], (0, 300)), waves[1]], strict=False):
        alone = encoder(torch.from_numpy(wave), 16000).clip[0]
        np.testing.assert_allclose(row, alone, rtol=1e-4, atol=1e-5)
    meta = model.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.modalities) == ("cat/small.safetensors", 16, ["audio"])


def test_without_mteb(saved, monkeypatch):
    monkeypatch.setattr(mteb, "ModelMeta", None)
    with pytest.raises(ImportError, match="pip install mteb"):
        mteb.load(str(saved))


@pytest.mark.slow
def test_mtebs_own_mock_run(saved):
    package = pytest.importorskip("mteb")
    results = package.mock_run(mteb.load(str(saved)))
    assert results.all_passed, results.to_markdown()
    (state,) = [state for state, modality, _ in results.modality_summary() if modality == "audio"]
    if state == "skipped":
        pytest.skip("mteb cannot decode audio here: it lacks torchcodec, or librosa with datasets below 4")
    assert state.startswith("✓")
