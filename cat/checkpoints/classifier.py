"""A fine-tuned classifier, from its run, a checkpoint or a single file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from cat.checkpoints.encoder import classifier_tensors, read_model
from cat.checkpoints.store import CheckpointError, PathLike, load_tensors
from cat.config import from_mapping
from cat.data.features import FeatureConfig
from cat.model import Classifier, HeadConfig, ModelConfig

TASKS = ("single-label", "multi-label", "events")


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier tells apart, how its input is made, and where it came from."""

    path: Path
    step: int | None
    task: str  # one of TASKS
    classes: tuple[str, ...]  # labels, in the order of the logits
    class_names: tuple[str, ...]  # the same for people
    model: ModelConfig
    head: HeadConfig
    features: FeatureConfig
    padding: Literal["fill", "mask"]
    """Behind a clip's end: "fill", zeros up to ``features.frames``, which the network sees (as released); "mask": what
    is there is hidden from it."""
    config: dict[str, Any]  # of the whole run


def load_classifier(path: PathLike, device: torch.device | str = "cpu") -> tuple[Classifier, ClassifierInfo]:
    """The classifier of a fine-tuning run (its best checkpoint), a checkpoint directory or a .safetensors file, in eval
    mode; the average of its weights, where the run kept one.

    Raises: `CheckpointError`, also for a pre-trained checkpoint, which has no head.
    """
    found = read_model(path, device)
    file, config = found.file, found.config
    if "head" not in config:
        raise CheckpointError(
            f"{file} is a pre-trained encoder and has no classes; expected a fine-tuned checkpoint: make one with "
            f"cat-audio finetune RECIPE encoder={path}"
        )
    try:
        head = from_mapping(HeadConfig, config["head"], source=f"{file} (its configuration)")
        classes, names = tuple(map(str, config["classes"])), tuple(map(str, config["class_names"]))
        task, padding = config["task"], config["data"]["padding"]
        if task not in TASKS or padding not in ("fill", "mask") or not classes or len(classes) != len(names):
            raise ValueError(f"task {task!r}, padding {padding!r}, {len(classes)} classes with {len(names)} names")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} does not say what its classes are ({error}); expected what cat-audio finetune writes"
        ) from None
    classifier = Classifier(found.model, head, len(classes)).to(device)
    load_tensors(classifier, classifier_tensors(found.tensors), str(file))
    padding = cast(Literal["fill", "mask"], padding)
    info = ClassifierInfo(file, found.step, task, classes, names, found.model, head, found.features, padding, config)
    return classifier.eval(), info
