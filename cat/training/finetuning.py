"""The task of fine-tuning: a classifier on a pre-trained encoder (or from scratch) and labelled clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cat.checkpoints import load_encoder
from cat.data import Batch, Manifest, load_manifest
from cat.data.finetuning import crop_to_score, finetune_batches, scoring_batches
from cat.data.labels import Labels, labels_of
from cat.data.reading import order_of, sampling_advice
from cat.data.share import share_out
from cat.data.splits import fold_split, hold_out, shared_files
from cat.distributed import current
from cat.evaluation.metrics import main_metric, scores_of
from cat.model import Classifier
from cat.parts import part
from cat.progress import say
from cat.training.drop_path import drop_path_factors
from cat.training.finetune_recipe import NONE, FinetuneConfig, check_model, missing_data
from cat.training.finetune_step import FinetuneStep, frozen_parts
from cat.training.flops import flops
from cat.training.identity import data_identity
from cat.training.layerwise import scaled_rate
from cat.training.parallel import is_sharded, load_whole
from cat.training.recipe import made_with, pick_features, pick_precision
from cat.training.task import Warn


@dataclass(frozen=True)
class Splits:
    """Labelled clips to train on, to choose the model by, and to score in the end."""

    labels: Labels
    train: Manifest
    valid: Manifest
    test: Manifest | None
    held_out: bool  # whether valid is a part of the training data


def read_splits(config: FinetuneConfig) -> Splits:
    """The clips that a recipe names.

    Raises: `ConfigError`, `cat.data.ManifestError` for data that cannot be trained on.
    """
    data = config.data
    if not data.train:
        raise missing_data()
    train = load_manifest(data.train)
    labels = labels_of(train, config.task, config.classes or None)
    train = labels.select(train)
    test = labels.select(load_manifest(data.test)) if data.test else None
    if data.fold is not None:
        train, test = fold_split(train, data.fold)
    if data.valid:
        valid = labels.select(load_manifest(data.valid))
    else:
        train, valid = hold_out(train, labels, data.valid_share, config.run.seed, group_by=data.group_by)
    for name, manifest in (("valid", valid), ("test", test)):
        if manifest is not None:
            _say_shared(train, manifest, name)
    notes = [*train.notes, *valid.notes, *(test.notes if test else ())]
    for note in dict.fromkeys(notes):  # parts of one manifest have the same
        say(note)
    return Splits(labels, train, valid, test, held_out=not data.valid)


def _say_shared(train: Manifest, other: Manifest, name: str) -> None:
    if shared := len(shared_files(train, other)):
        say(f"warning: {shared} of the {len(other)} clips of data.{name} are trained on: its scores will be too good")


class Finetuning:
    """A `cat.training.task.Task`. Weights of the head (and of an encoder from scratch) depend on the seed alone, data
    order and augmentations are `cat.data`'s, drop path's draws are a function of (seed, step)."""

    command = "cat-audio finetune"
    one_shape = False  # a batch is as long as its longest clip

    def __init__(self, config: FinetuneConfig, splits: Splits) -> None:
        self.config = config = config.labelled(splits.labels)
        self.splits, self.labels = splits, splits.labels
        self.manifest = splits.train
        self.valid: Manifest | None = splits.valid
        self.metric = main_metric(config.task)
        run = config.run
        self.world = current()
        self.share = share_out(
            config.data.update_clips,
            config.data.batch_size,
            processes=self.world.size,
            rank=self.world.rank,
            paired=config.augment.mixup > 0,
        )
        self.device = self.world.device(run.device)
        self.precision = pick_precision(run.precision, self.device)
        self.features = pick_features(config.data.features, self.device)
        self.identity = {
            **data_identity(splits.train, splits.valid, None),
            "labels": self.labels.fingerprint(splits.train),
        }
        order_of(splits.train, config.data, seed=run.seed)  # an error of it comes before anything is written
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed if run.weights_seed is None else run.weights_seed)
            self.model = Classifier(config.model, config.head, len(config.classes)).to(self.device)
        self.step = FinetuneStep(
            self.model,
            config.optim,
            config.loss,
            freeze=config.freeze,
            precision=self.precision,
            compile=run.compile,
            pieces=self.share.pieces,
            world=self.world,
            parallel=run.parallel,
        )
        self.parameters = self.step.parameters
        self.values = ("loss", *self.step.descent.numbers)
        self._flops: np.ndarray | None = None  # of a clip, as a polynomial of its rows of patches
        self._frozen_blocks = config.model.depth if config.freeze == "encoder" else config.freeze

    def begin(self) -> None:
        """Give the encoder the weights that it begins with."""
        config = self.config
        if config.encoder == NONE:
            return
        encoder, info = load_encoder(config.encoder, config.weights)
        check_model(config, info.model)
        # Shards must be of the same weights, wherever a process has read them.
        sharded = is_sharded(self.model)
        weights = self.world.tensors_from_main(encoder.state_dict()) if sharded else encoder.state_dict()
        for model in (self.model, self.step.scored):  # one and the same, or the average
            load_whole(model.encoder, weights, config.encoder)

    @property
    def whole(self) -> bool:
        return self.step.whole

    @property
    def made_with(self) -> dict[str, Any]:
        return made_with(
            self.config.run, self.device, self.precision, self.config.model.kernels, self.features, self.share
        )

    # ------------------------------------------------------------ updates

    def advice(self) -> list[str]:
        return sampling_advice(self.config.data, self.manifest)

    def train_mode(self) -> None:
        self.step.train_mode()

    def batches(self, start: int, count: int, warn: Warn) -> Iterator[list[Batch]]:
        config = self.config
        batches = finetune_batches(
            self.manifest,
            self.labels,
            config.data,
            config.augment,
            config.features,
            patch_size=config.model.patch_size,
            seed=config.run.seed,
            start_step=start,
            num_steps=count,
            share=self.share,
            waveforms=self.features == "gpu",
            warn=warn,
        )
        return self.share.updates(batches)

    def train(self, pieces: Sequence[Batch], step: int) -> tuple[Tensor, dict[str, float]]:
        with part("input"):
            inputs = [
                (batch.to(self.device).with_features(self.config.features).augmented(), self._keep(number, step))
                for number, batch in enumerate(pieces, start=self.share.first)
            ]
        values = self.step.of_pieces(inputs, step=step)
        return values, {"lr": scaled_rate(self.config.optim, step)}

    def _keep(self, piece: int, step: int) -> Tensor | None:
        """Of a piece's clips, by their places in the whole batch."""
        config = self.config
        if config.optim.drop_path == 0 or config.freeze == "encoder":
            return None
        keep = drop_path_factors(
            config.optim.drop_path,
            config.model.depth,
            self.share.clips,
            seed=config.run.seed,
            step=step,
            frozen=config.freeze,
        )
        return keep[self.share.places(piece)].to(self.device, non_blocking=True)

    def flops(self, batch: Batch) -> int:
        most = self.config.features.frames // self.config.model.patch_size
        if self._flops is None:
            # Attention grows with the square of a clip's length, all else with the length.
            sizes = [most, max(1, most // 2), max(1, most // 4)]
            self._flops = np.polyfit(sizes, [self._flops_of_a_clip(rows) for rows in sizes], min(2, len({*sizes}) - 1))
        return int(sum(np.polyval(self._flops, batch.rows or [most] * len(batch.clips))))

    def _flops_of_a_clip(self, rows: int) -> int:
        config = self.config
        plain = dataclasses.replace(config.model, kernels="reference")
        with torch.device("meta"):
            model = Classifier(plain, config.head, len(config.classes))
            spec = torch.empty(1, 1, rows * plain.patch_size, plain.mel_bins)
        for frozen in frozen_parts(model, config.freeze):
            frozen.requires_grad_(False)
        return flops(lambda: model(spec).clip.sum().backward())

    def derived(self, row: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def warnings(self, rows: list[dict[str, Any]]) -> list[str]:
        return []

    # ------------------------------------------------------------ evaluation

    def scoring_batches(self, warn: Warn) -> Iterator[Batch]:
        return self.batches_of(self.splits.valid, warn)

    def batches_of(self, manifest: Manifest, warn: Warn) -> Iterator[Batch]:
        data = self.config.data
        return scoring_batches(
            manifest,
            self.labels,
            self.config.features,
            patch_size=self.config.model.patch_size,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            rank=self.world.rank,
            processes=self.world.size,
            padding=data.padding,
            crop=crop_to_score(data.crop),
            waveforms=self.features == "gpu",
            warn=warn,
        )

    def evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Loss, without smoothing, and all metrics that `cat.evaluation.metrics` has for the task."""
        scores, targets, total, count = self.predictions(batches)
        if not len(scores):
            raise RuntimeError("not one clip of the split could be read; failures.jsonl of the run lists them")
        metrics = scores_of(scores, targets, self.config.task, self.config.classes).metrics
        if self.metric not in metrics:
            raise ValueError(
                f"{self.metric} is undefined: no class has a positive clip in this split; give another (data.valid)"
            )
        return {"loss": total / count, **metrics}

    @torch.no_grad()
    def predictions(self, batches: Iterator[Batch]) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Probabilities (n, C) and targets (n, C) of all clips, in whatever process's ``batches`` they are, the sum of
        their losses and what it is divided by."""
        self.model.eval()
        with self.step.scoring():
            return self._predictions(batches)

    def _predictions(self, batches: Iterator[Batch]) -> tuple[np.ndarray, np.ndarray, float, float]:
        none = torch.empty(0, len(self.config.classes), device=self.device)
        scores, targets, clips = [none.double()], [none], []
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            if len(batch.clips) == 0:
                continue
            clips += batch.clips.tolist()
            batch = batch.to(self.device).with_features(self.config.features)
            output = self.step.outputs(batch, scored=True)
            sums += torch.stack(self.step.losses(output, batch))
            scores.append(self.model.probabilities(output.clip.double()))  # float32 would make ties
            targets.append(cast(Tensor, batch.targets))
        order = torch.cat(self.world.gathered_rows(torch.tensor(clips, dtype=torch.int64))).argsort()
        rows = [torch.cat(self.world.gathered_rows(torch.cat(part).cpu()))[order].numpy() for part in (scores, targets)]
        total, count = torch.stack(self.world.gathered_rows(sums[None].cpu())).sum((0, 1)).tolist()
        return rows[0], rows[1], total, count

    def told(self, values: Mapping[str, float]) -> str:
        return f"loss {values['loss']:.4f}, {self.metric} {values[self.metric]:.4f}"

    def score(self, values: Mapping[str, float]) -> float:
        return -values[self.metric]

    def enough(self, evaluations: list[dict[str, Any]]) -> bool:
        """Whether the last ``optim.patience`` evaluations are all no better than the best before them."""
        patience, values = self.config.optim.patience, [row[self.metric] for row in evaluations]
        return 0 < patience < len(values) and max(values[-patience:]) <= max(values[:-patience])

    # ------------------------------------------------------------ checkpoints

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self.step.descent.tensors()

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        self.step.descent.restore(tensors)
