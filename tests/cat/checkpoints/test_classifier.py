"""Classifiers from disk."""

from __future__ import annotations

import pytest
import torch

from cat.checkpoints import CheckpointError, load_classifier, load_encoder, save_tensors
from cat.config import to_mapping
from cat.data import FeatureConfig
from cat.model import Classifier, Encoder, HeadConfig, ModelConfig

MODEL = ModelConfig(channels=(8, 16), embed_dim=32, depth=1, num_heads=2, decoder_dim=32)
CONFIG = {
    "task": "single-label",
    "classes": ["dog", "cat"],
    "class_names": ["Dog", "Cat"],
    "data": {"padding": "mask"},
    "model": to_mapping(MODEL),
    "head": to_mapping(HeadConfig()),
    "features": to_mapping(FeatureConfig()),
}


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(MODEL, HeadConfig(), 2)


def save(path, model, config=None, extra=()):
    save_tensors(path, {**model.state_dict(), **dict(extra)}, config=config or CONFIG, step=7)
    return path


def test_a_classifier_comes_back_whole(tmp_path, model):
    loaded, info = load_classifier(save(tmp_path / "a.safetensors", model))
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert (info.classes, info.class_names, info.task, info.padding) == (
        ("dog", "cat"),
        ("Dog", "Cat"),
        CONFIG["task"],
        "mask",
    )
    assert (info.step, info.model, info.head) == (7, MODEL, HeadConfig())


def test_the_average_is_what_is_used(tmp_path, model):
    average = {f"average.{name}": 2 * tensor for name, tensor in model.state_dict().items()}
    path = save(tmp_path / "a.safetensors", model, extra=average)
    assert torch.equal(load_classifier(path)[0].encoder.cls, 2 * model.encoder.cls)
    assert torch.equal(load_encoder(path)[0].cls, 2 * model.encoder.cls)


def test_its_encoder_loads_alone(tmp_path, model):
    path = save(tmp_path / "a.safetensors", model)
    assert torch.equal(load_encoder(path)[0].cls, model.encoder.cls)
    with pytest.raises(CheckpointError, match="is fine-tuned, and has one encoder"):
        load_encoder(path, "teacher")


def test_a_pre_trained_encoder_is_no_classifier(tmp_path):
    path = tmp_path / "a.safetensors"
    pre_trained = {key: CONFIG[key] for key in ("model", "features")}
    save_tensors(path, Encoder(MODEL).state_dict(), config=pre_trained)
    with pytest.raises(CheckpointError, match="cat-audio finetune RECIPE encoder="):
        load_classifier(path)


@pytest.mark.parametrize("change", [
    {"classes": ["dog"]},
    {"classes": [], "class_names": []},
    {"task": "regression"},
    {"data": {}},
    {"head": {"pooling": "median"}},
])  # fmt: skip
def test_what_does_not_say_its_classes_is_refused(tmp_path, model, change):
    with pytest.raises(CheckpointError, match="does not say what its classes are"):
        load_classifier(save(tmp_path / "a.safetensors", model, {**CONFIG, **change}))


def test_a_head_of_other_classes_does_not_fit(tmp_path, model):
    three = {"classes": ["a", "b", "c"], "class_names": ["a", "b", "c"]}
    with pytest.raises(CheckpointError, match=r"head.linear.weight is \(2, 32\), expected \(3, 32\)"):
        load_classifier(save(tmp_path / "a.safetensors", model, {**CONFIG, **three}))
