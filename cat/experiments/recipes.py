"""The recipes of the experiments: the tiny model, minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cat.config import from_mapping
from cat.experiments.claims import CLAIMS
from cat.training.recipe import SECTION_PRESETS, PretrainConfig

RECIPE: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "objective": {"global_loss_reduction": "mean"},
    "features": {"preset": "audioset", "frames": 128},
    "data": {"batch_size": 16, "num_workers": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 15, "steps": 120},
    "ema": {"start": 0.99, "end": 0.999, "steps": 120},
    "run": {
        **{"log_every": 10, "checkpoint_every": 1000, "tensorboard": False, "figures": False},
        **{"collapse_steps": 0, "guidance_share": 0, "max_bad_steps": 1},
    },
}
OVERFIT: dict[str, Any] = {
    "data": {"batch_size": 4, "num_workers": 0},
    "optim": {"lr": 1e-3, "warmup_steps": 20, "steps": 400, "weight_decay": 0.0},
}
KERNELS: dict[str, Any] = {
    "masks": {"num_masks": 2},
    "features": {"frames": 64},
    "data": {"batch_size": 4, "num_workers": 0},
    "optim": {"lr": 3e-4, "warmup_steps": 30, "steps": 300},
    "ema": {"steps": 300},
}
# Of the studies: a quarter of an hour a run on one core. The teacher is that of recipes/tiny.yaml: one that goes from
# 0.99 to 0.999 in 600 updates moves so fast that training without a guide ends below the untrained encoder (sound: 34.7
# against 41.5 %), and a guide seems to save five steps in six.
STUDY: dict[str, Any] = {
    "data": {"batch_size": 16, "num_workers": 0},
    "optim": {"lr": 1e-3, "warmup_steps": 100, "steps": 1500},
    "ema": {"start": 0.998, "end": 0.9995, "steps": 1500},
}
VISIBLE: dict[str, Any] = {"features": {"frames": 160}, "data": {"batch_size": 1, "num_workers": 0, "features": "cpu"}}
FAILURES: dict[str, Any] = {
    "masks": {"num_masks": 1, "ratio": 0.5},  # a fifth of so few patches would tell little of the clip
    "features": {"frames": 64},
    "data": {"num_workers": 0},
    "optim": {"lr": 2e-3, "warmup_steps": 10, "steps": 100},
    "run": {"log_every": 5, "collapse_steps": 10, "guidance_share": 0.8},
}


def experiment_config(name: str, train: Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The recipe of an experiment on the manifest ``train``; `overrides` as for ``cat-audio pretrain``."""
    recipe = {section: dict(fields) for section, fields in RECIPE.items()}
    own = {"overfit": OVERFIT, "kernels": KERNELS, "failures": FAILURES, "visible": VISIBLE}
    layers: list[Mapping[str, Any]] = [own.get(name, {})]
    if name in CLAIMS:
        layers = [STUDY, CLAIMS[name].recipe]
    for layer in layers:
        for section, fields in layer.items():
            recipe[section] = recipe.get(section, {}) | fields
    recipe["data"]["train"] = str(train)
    recipe["run"]["name"] = name
    return from_mapping(
        PretrainConfig, recipe, source=f"experiment {name}", overrides=overrides, presets=SECTION_PRESETS
    )
