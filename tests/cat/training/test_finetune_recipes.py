"""The recipes that are shipped, against the released ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat.config import from_mapping, read_yaml
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.recipe import SECTION_PRESETS, find_recipe

pytest.importorskip("yaml")

RECIPES = Path(__file__).parents[3] / "recipes"
FINE_TUNING = (
    "finetune",
    "events",
    *(f"{n}{r}" for n in ("as20k", "as2m", "esc50", "spcv2") for r in ("", "-released")),
)

# batch, updates, warm-up, peak lr, frames, mean, std, mixup, bins and frames of SpecAugment, smoothing, head, over
PUBLISHED = {
    "as20k": (48, 40_000, 4_000, 5e-5, 1024, -4.268, 4.569, 0.8, 25.6, 204.8, 0.0, "bce", "positives"),
    "as2m": (96, 300_000, 30_000, 5e-5, 1024, -4.268, 4.569, 0.8, 25.6, 204.8, 0.0, "bce", "positives"),
    "esc50": (48, 4_000, 400, 5e-5, 512, -6.627, 5.359, 0.0, 51.2, 204.8, 0.1, "ce", "clips"),
    "spcv2": (256, 40_000, 4_000, 2e-4, 128, -6.846, 5.565, 0.8, 25.6, 25.6, 0.0, "bce", "clips"),
}


def read(name: str) -> FinetuneConfig:
    mapping = read_yaml(RECIPES / f"{name}.yaml")
    return from_mapping(FinetuneConfig, mapping, source=name, presets=SECTION_PRESETS)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_say_what_was_published(name, released):
    config = read(f"{name}-released" if released else name)
    data, features, optim, augment = config.data, config.features, config.optim, config.augment
    assert (
        *(data.batch_size, optim.steps, optim.warmup_steps, optim.lr),
        *(features.frames, features.mean, features.std, augment.mixup),
        *(augment.mask_bins * 128, augment.mask_frames * features.frames),
        *(config.loss.label_smoothing, config.head.loss, config.loss.over),
    ) == pytest.approx(PUBLISHED[name])
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_norm) == ((0.9, 0.95), 1e-8, 0.05, 0)
    assert (optim.layer_decay, optim.drop_path, optim.average) == (0.65, 0.1, 0)
    assert (optim.warmup_lr, optim.min_lr, augment.mixup_probability) == (1e-6, 1e-6, 0.9)
    assert (augment.roll, augment.gain, config.weights, data.crop) == (True, True, "student", "start")
    noisy = name == "spcv2"
    assert (augment.noise, augment.roll_frames) == ((0.1, 10) if noisy else (0, 0))
    assert (data.sampler, data.epoch_clips) == (("weighted", 200_000) if name == "as2m" else ("shuffle", None))
    theirs = ("all", False, False, "fill")
    assert (optim.weight_decay_on, optim.decay_stem, optim.scale_minimum, data.padding) == (
        theirs if released else ("matrices", True, True, "mask")
    )


PRE_TRAINING = {"base", "tiny", "quickstart"}  # of tests/cat/test_config.py


@pytest.mark.parametrize("name", sorted({path.stem for path in RECIPES.glob("*.yaml")} - PRE_TRAINING))
def test_every_recipe_can_be_read_and_keeps_what_it_evaluates(name):
    config = read(name)
    assert config.run.eval_every == 0  # with every checkpoint
    assert config.optim.steps % config.run.checkpoint_every == 0
    assert config.run.keep_best >= 1


def test_a_recipe_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("esc50") == RECIPES / "esc50.yaml"
    assert find_recipe("esc51") == Path("esc51")
    (tmp_path / "esc50").mkdir()
    assert find_recipe("esc50") == Path("esc50")  # what is there goes first
