"""HEAR's common API, and its own validator."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from cat.harnesses import hear
from tests.cat.harnesses.conftest import noise


def test_the_common_api(checkpoint):
    model = hear.load_model()
    assert isinstance(model, torch.nn.Module)
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (16000, 16, 16)
    audio = noise(3, 20000)
    scenes = hear.get_scene_embeddings(audio, model)
    assert (scenes.shape, scenes.dtype) == ((3, 16), torch.float32)
    torch.testing.assert_close(scenes, model.encoder(audio, 16000).clip)
    frames, times = hear.get_timestamp_embeddings(audio, model)
    assert frames.shape == (*times.shape, 16)
    assert frames.dtype == torch.float32


@pytest.mark.parametrize(("milliseconds", "samples"), [(None, 20000), ("80", 16001), ("160", 90000)])
def test_timestamps_are_regular_and_end_inside_the_clip(checkpoint, monkeypatch, milliseconds, samples):
    if milliseconds is not None:
        monkeypatch.setenv("CAT_STEP_MS", milliseconds)
    step = float(milliseconds or 40)
    _, times = hear.get_timestamp_embeddings(noise(2, samples), hear.load_model(str(checkpoint)))
    assert torch.equal(times[0], 87.5 + step * torch.arange(times.shape[1], dtype=torch.float64))
    assert times[0, -1] < samples / 16 <= times[0, -1] + step


@pytest.mark.parametrize("samples", [1, 399, 400, 1399])
def test_a_very_short_clip_has_one_timestamp_inside_it(checkpoint, samples):
    model = hear.load_model()
    frames, times = hear.get_timestamp_embeddings(noise(2, samples), model)
    assert frames.shape == (2, 1, 16)
    assert 0 <= times[0, 0] < samples / 16
    assert hear.get_scene_embeddings(noise(2, samples), model).isfinite().all()


@pytest.mark.parametrize(("milliseconds", "warned"), [("40", False), ("80", True)])
def test_hears_own_validator(checkpoint, monkeypatch, milliseconds, warned):
    tensorflow = types.ModuleType("tensorflow")  # it asks whether a model is one of theirs
    tensorflow.Module = type("Module", (), {})
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    validate = pytest.importorskip("hearvalidator.validate")
    monkeypatch.setenv("CAT_STEP_MS", milliseconds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validate.ValidateModel("cat.harnesses.hear", str(checkpoint), "cpu")()
    assert any("interval between timestamps" in str(warning.message) for warning in caught) == warned
