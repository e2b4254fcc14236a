"""What a fine-tuning recipe holds, and how what it leaves open is filled in: from the encoder and from the data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cat.checkpoints.encoder import read_model
from cat.config import ConfigError, from_mapping, read_yaml, to_mapping, with_overrides
from cat.data import AudioError, Manifest, load_manifest
from cat.data.audio import seconds_of
from cat.data.augment import AugmentConfig
from cat.data.features import FeatureConfig, frames_in
from cat.data.finetuning import FinetuneDataConfig
from cat.data.labels import TASKS, Labels, labels_of
from cat.data.shards.members import Member
from cat.model import HeadConfig, ModelConfig, rows_of
from cat.training.layerwise import FinetuneOptimConfig
from cat.training.losses import LossConfig
from cat.training.recipe import SECTION_PRESETS, RunConfig, check_fit, check_purpose, named

NONE = "none"  # in place of an encoder
# Of the encoder; the rest of `ModelConfig` is the decoder's, and what runs the operators.
ENCODER_FIELDS = ("stem", "resolutions", "channels", "embed_dim", "depth", "num_heads", "mlp_ratio", "mel_bins")
HEADS = {
    "single-label": {"kind": "clip", "pooling": "cls", "loss": "ce"},
    "multi-label": {"kind": "clip", "pooling": "cls", "loss": "bce"},
    "events": {"kind": "frames", "pooling": "linear", "loss": "bce"},
}
MOST_FRAMES = 1024  # that clips are given where the recipe says nothing: 10.24 s, the released recipes' most
_LOOKED_AT = 200  # clips whose length is looked up for that


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole recipe; each section is the dataclass of the module that uses it.

    Attributes:
        encoder: the run, checkpoint or .safetensors file that the encoder begins with; "none": from scratch.
        weights: which encoder of a pre-training checkpoint.
        freeze: what is not trained: "encoder", all but the head; or the lowest so many blocks, and what is below them.
        task: "single-label", "multi-label" or "events"; "auto": what the labels are.
        classes: labels in the order of the classifier's outputs; none: all that occur in training.
        class_names: the same for people.
    """

    data: FinetuneDataConfig
    encoder: str = "none"
    weights: Literal["student", "teacher"] = "student"
    freeze: int | Literal["encoder"] = 0
    task: str = "auto"
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_fit(self.model, self.features)
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        if isinstance(self.freeze, int) and not 0 <= self.freeze <= self.model.depth:
            raise ValueError(
                f"freeze is {self.freeze}; expected 0 to {self.model.depth}, the number of blocks, or 'encoder'"
            )
        if self.run.cuda_graph:
            raise ValueError("run.cuda_graph=true; expected false: batches of clips of all lengths have no one graph")
        if self.run.compile == "step" and self.data.padding == "mask":
            raise ValueError(
                "run.compile='step' with data.padding='mask'; expected 'blocks', 'none' or data.padding='fill': the "
                "step has other shapes for clips of other lengths"
            )
        if self.data.fold is not None and self.data.test:
            raise ValueError(
                f"data.fold is {self.data.fold} and data.test {self.data.test}; expected one of them: a fold is the "
                "test split"
            )
        self._check_head()

    def _check_head(self) -> None:
        wanted = HEADS.get(self.task)
        if wanted is not None and self.head.kind != wanted["kind"]:
            raise ValueError(f"head.kind is {self.head.kind!r} with task={self.task}; expected {wanted['kind']!r}")
        if self.task in ("multi-label", "events") and self.head.loss != "bce":
            raise ValueError(f"head.loss is {self.head.loss!r} with task={self.task}; expected 'bce': classes overlap")
        if self.head.loss == "bce" and self.loss.label_smoothing:
            raise ValueError(
                f"loss.label_smoothing is {self.loss.label_smoothing} with head.loss='bce'; it is for 'ce' alone: use 0"
            )
        if self.head.loss == "ce" and self.loss.over != "clips":
            raise ValueError(f"loss.over is {self.loss.over!r} with head.loss='ce'; expected 'clips'")

    @property
    def run_dir(self) -> Path:
        return self.run.path

    @property
    def end(self) -> int:
        """The update after which the run ends: of the whole schedule, unless stopped earlier."""
        return min(self.optim.steps, self.run.stop_at or self.optim.steps)

    def labelled(self, labels: Labels) -> FinetuneConfig:
        """With what the data say of task and classes."""
        names = self.class_names or labels.class_names
        return dataclasses.replace(self, task=labels.kind, classes=labels.classes, class_names=names)


def load_finetune_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a recipe; a run without a name gets the file's.

    What it leaves open is filled in: ``model`` and ``features`` are the encoder's, ``task`` and ``classes`` what the
    training data have, ``head`` what the task needs, and ``features.frames`` as many as the longest clip has, up to
    10.24 s.

    Raises: `ConfigError`, also for a model that is not the encoder's; `cat.checkpoints.CheckpointError`,
    `cat.data.ManifestError`.
    """
    recipe = read_yaml(path)
    check_purpose(recipe, path, "finetune")
    given = with_overrides(recipe, overrides)
    encoder, train = given.get("encoder", NONE), _section(given, "data").get("train")
    if not train:
        raise missing_data()
    filled = dict(recipe)
    found = None if encoder == NONE else read_model(str(encoder))
    if found is not None:
        for section, settings in (("model", found.model), ("features", found.features)):
            if "preset" not in _section(given, section):
                filled[section] = {**to_mapping(settings), **_section(recipe, section)}
    manifest = load_manifest(str(train))
    task = str(given.get("task", "auto"))
    if task in TASKS:
        filled["task"] = labels_of(manifest, task, recipe.get("classes") or None).kind
        filled["head"] = {**HEADS[filled["task"]], **_section(recipe, "head")}
    config = from_mapping(FinetuneConfig, filled, source=str(path), overrides=overrides, presets=SECTION_PRESETS)
    if found is not None:
        check_model(config, found.model)
    if not _section(given, "features").keys() & {"preset", "frames"}:
        frames = fitting_frames(manifest, config.features, config.model.patch_size)
        config = dataclasses.replace(config, features=dataclasses.replace(config.features, frames=frames))
    return named(config.labelled(labels_of(manifest, filled["task"], config.classes or None)), path)


def _section(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = mapping.get(name)
    return section if isinstance(section, Mapping) else {}


def check_model(config: FinetuneConfig, model: ModelConfig) -> None:
    """Raises: `ConfigError` for a recipe whose model is not the encoder's."""
    differing = {
        name: (getattr(config.model, name), getattr(model, name))
        for name in ENCODER_FIELDS
        if getattr(config.model, name) != getattr(model, name)
    }
    if differing:
        listed = "; ".join(f"model.{name} is {ours}, there {theirs}" for name, (ours, theirs) in differing.items())
        raise ConfigError(
            f"the recipe's model is not that of encoder={config.encoder}: {listed}. Leave the section model out of the "
            "recipe, or give encoder=none to train it from scratch"
        )


def fitting_frames(manifest: Manifest, features: FeatureConfig, patch_size: int) -> int:
    """Frames that the longest clip fills, whole patches of them, up to `MOST_FRAMES`; a sample of the clips is looked
    at, and one that cannot be read is left out."""
    longest = 0.0
    for index in np.linspace(0, len(manifest) - 1, min(len(manifest), _LOOKED_AT)).astype(int).tolist():
        clip, audio = manifest.clips[index], manifest.audio(index)
        with contextlib.suppress(AudioError):
            if isinstance(audio, Member) and clip.samples and clip.sample_rate:  # its index looked into the file
                longest = max(longest, clip.samples / clip.sample_rate)
            else:
                longest = max(longest, seconds_of(audio))
    samples = torch.tensor(math.ceil(longest * features.sample_rate))
    frames = min(int(frames_in(features, samples)), MOST_FRAMES)
    return patch_size * rows_of(frames, patch_size)


def missing_data() -> ConfigError:
    return ConfigError(
        "data.train is missing; expected a folder with a folder for each class, or a manifest with labels: add "
        "data.train=PATH to the command"
    )
