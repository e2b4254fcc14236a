"""The task of pre-training: which batches, which losses, what an evaluation is."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cat.config import ConfigError
from cat.data import Batch, Manifest, eval_batches, open_embeddings, pretrain_batches
from cat.data.guides import Guides
from cat.data.labels import balancing_weights
from cat.data.loader import nothing_readable
from cat.data.masks import inverse_block_masks
from cat.data.reading import order_of, sampling_advice
from cat.data.share import largest_piece, share_out
from cat.distributed import current
from cat.model import CAT
from cat.parts import part
from cat.progress import say
from cat.training.descent import LOW
from cat.training.flops import flops
from cat.training.guidance import Guidance, Stored, column, unwired, warning_of_unwired
from cat.training.guides import OpenGuides
from cat.training.identity import data_identity
from cat.training.optim import ema_decay, learning_rate, regularisation_weight
from cat.training.parallel import is_sharded
from cat.training.recipe import PretrainConfig, made_with, pick_features, pick_precision
from cat.training.records import CollapseCheck
from cat.training.step import Inputs, PretrainStep
from cat.training.task import Warn

# In the order of `PretrainOutput`; then "regularisation.NAME" of every other guide.
LOSSES = ("loss", "regression", "global", "regularisation", "pred_std", "target_std")
NOISE_PER_STEP = 1 << 32  # offsets of the decoder's noise that one step may use; a batch of 96 takes 2^25
EVAL_NOISE = 1 << 62  # where evaluation's offsets begin


class Pretraining:
    """A `cat.training.task.Task`. Weights depend on the seed alone, data order, crops and masks are `cat.data`'s, the
    decoder's noise is drawn here."""

    command = "cat-audio pretrain"
    one_shape = True
    network = CAT

    def __init__(self, config: PretrainConfig, manifest: Manifest, valid: Manifest | None = None) -> None:
        self.config, self.manifest, self.valid = config, manifest, valid
        run = config.run
        self.world = current()
        self.share = share_out(
            config.data.update_clips, config.data.batch_size, processes=self.world.size, rank=self.world.rank
        )
        self.device = self.world.device(run.device)
        self.precision = pick_precision(run.precision, self.device)
        self.features = pick_features(config.data.features, self.device)
        self._embeddings = open_embeddings(manifest) if config.objective.regularisation_weight else None
        self.guides = OpenGuides(config.guides, manifest, device=self.device, precision=self.precision)
        self.identity = data_identity(manifest, valid, self._embeddings)
        if config.guides:
            self.identity["guides"] = self.guides.identity
        order_of(manifest, config.data, seed=run.seed)  # an error of it comes before anything is written
        if config.data.sampler == "weighted":
            self.identity["labels"] = hashlib.sha256(balancing_weights(manifest).tobytes()).hexdigest()
        self._losses = (*LOSSES, *(column("regularisation", name) for name in config.guides))
        self._valid_guides = self._of_validation()
        if run.cuda_graph and self.device.type != "cuda":
            raise ConfigError(
                f"run.cuda_graph=true needs a GPU, but run.device={run.device} is {self.device} here; "
                "use run.cuda_graph=false"
            )
        if run.cuda_graph and self.share.pieces > 1:
            raise ConfigError(
                f"run.cuda_graph=true records a step of one process on one piece of the batch, and here there are "
                f"{self.world.size} processes and {self.share.pieces} pieces (data.global_batch, data.batch_size); "
                "use run.cuda_graph=false"
            )
        H, W = config.grid
        # Of offsets of the decoder's noise, four elements each.
        self._noise_per_clip = config.masks.num_masks * H * W * config.model.embed_dim // 4
        if self.share.clips * self._noise_per_clip > NOISE_PER_STEP:
            raise ConfigError(
                f"data.global_batch={self.share.clips} clips of this model need more noise than a step has; give at "
                f"most {NOISE_PER_STEP // self._noise_per_clip}"
            )
        self.model = self._build_model().to(self.device)
        self.step = PretrainStep(
            self.model,
            config.optim,
            precision=self.precision,
            compile=run.compile,
            cuda_graph=run.cuda_graph,
            pieces=self.share.pieces,
            world=self.world,
            parallel=run.parallel,
        )
        self.parameters = self.step.parameters
        self.values = (*self._losses, *self.step.descent.numbers)
        self._rng = torch.tensor([run.seed, 0], device=self.device)
        self._collapse = CollapseCheck(
            pred_std=run.collapse_pred_std, target_std=run.collapse_target_std, steps=run.collapse_steps
        )
        stored: dict[str, Stored] = {} if self._embeddings is None else {"": (self._embeddings, manifest.rows)}
        stored |= {name: (rows.store, rows.rows) for name, rows in self.guides.cached.items()}
        self._guidance = Guidance(config, manifest, self.model.terms, stored)
        self._unwired: list[str] = []
        self._flops: int | None = None  # of a clip

    def _build_model(self) -> CAT:
        store, run = self._embeddings, self.config.run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed if run.weights_seed is None else run.weights_seed)
            guides = {name: (guide, self.guides.dims[name]) for name, guide in self.config.guides.items()}
            return self.network(self.config.model, self.config.objective, store.dim if store else None, guides)

    def _of_validation(self) -> Guides:
        if self.valid is None:
            return Guides()
        guides, notes = self.guides.of_validation(self.valid)
        if self._embeddings is not None and open_embeddings(self.valid) is None:
            notes.append(f"validation goes without L_r: {self.valid.name} names no embeddings")
        for note in notes:
            say(note)
        return guides

    @property
    def whole(self) -> bool:
        return self.step.whole

    @property
    def made_with(self) -> dict[str, Any]:
        made = made_with(
            self.config.run, self.device, self.precision, self.config.model.kernels, self.features, self.share
        )
        return made | {f"guides.{name}.where": where for name, where in self.guides.where.items()}

    # ------------------------------------------------------------ updates

    def begin(self) -> None:
        """The weights are those of the seed already."""

    def advice(self) -> list[str]:
        return [*sampling_advice(self.config.data, self.manifest), *self._guidance.advice()]

    def train_mode(self) -> None:
        self.model.train()

    def batches(self, start: int, count: int, warn: Warn) -> Iterator[list[Batch]]:
        config = self.config
        batches = pretrain_batches(
            config.data,
            config.features,
            config.masks,
            patch_size=config.model.patch_size,
            seed=config.run.seed,
            start_step=start,
            num_steps=count,
            manifest=self.manifest,
            share=self.share,
            waveforms=self.features == "gpu",
            guides=self.guides.train,
            warn=warn,
        )
        return self.share.updates(self.guides.listen(batches, self.manifest))

    def train(self, pieces: Sequence[Batch], step: int) -> tuple[Tensor, dict[str, float]]:
        lr, decay = learning_rate(self.config.optim, step), ema_decay(self.config.ema, step + 1)
        told = {"lr": lr, "ema_decay": decay}
        scheduled = {name: term for name, term in self.model.terms.items() if term.scheduled}
        weights = {name: regularisation_weight(term, step) for name, term in scheduled.items()}
        told |= {column("regularisation_weight", name): weight for name, weight in weights.items()}
        return self.step.of_pieces(self._all_inputs(pieces, step), lr=lr, decay=decay, weights=weights), told

    def _all_inputs(self, pieces: Sequence[Batch], step: int) -> Iterator[Inputs]:
        """Of one piece after the other. Its noise is that of its place in the whole batch."""
        for number, batch in enumerate(pieces, start=self.share.first):
            first = number * self.share.size
            inputs = self._inputs(batch, step * NOISE_PER_STEP + first * self._noise_per_clip)
            if step == 0 and number == 0 and self.model.terms and self._guidance.warns:
                self._unwired = self._look_for_unwired(inputs)
            yield inputs

    def _inputs(self, batch: Batch, noise_offset: int) -> Inputs:
        """What the model takes, on its device."""
        with part("input"):
            batch = batch.to(self.device).with_features(self.config.features)
            self._rng[1].fill_(noise_offset)
        return cast(Tensor, batch.spec), cast(Tensor, batch.visible), batch.embedding, self._rng, batch.guides

    def _look_for_unwired(self, inputs: Inputs) -> list[str]:
        """The guides that do not move the student, by two clips, before anything is compiled or recorded."""
        # A sharded one computes in all processes or none, and this is the first update: it is as it was built.
        model = self._build_model().to(self.device) if is_sharded(self.model) else self.model
        spec, visible, embedding, rng, guides = inputs
        clones = visible[: 2 * self.config.masks.num_masks]

        def loss(weights: Mapping[str, Tensor]) -> Tensor:
            with torch.autocast(self.device.type, LOW.get(self.precision), enabled=self.precision in LOW):
                few = None if embedding is None else embedding[:2]
                others = {name: rows[:2] for name, rows in guides.items()}
                return model(spec[:2], clones, few, rng=rng, guides=others, weights=weights).loss

        with torch.compiler.set_stance("force_eager"):
            return unwired(model.student.cls, model.terms, loss)

    def flops(self, batch: Batch) -> int:
        if self._flops is None:
            self._flops = self._flops_of_a_clip()
        return self._flops * len(batch.clips)

    def _flops_of_a_clip(self) -> int:
        config, masks = self.config, self.config.masks
        plain = dataclasses.replace(config.model, kernels="reference")
        dim = None if self.model.regulariser is None else self.model.regulariser.out_features
        with torch.device("meta"):
            model = CAT(plain, config.objective, dim, {n: (g, self.guides.dims[n]) for n, g in config.guides.items()})
            spec = torch.empty(1, 1, config.features.frames, config.model.mel_bins)
            visible = torch.empty(masks.num_masks, masks.visible_count(math.prod(config.grid)), dtype=torch.int64)
            rows = {name: torch.empty(1, size) for name, size in {"": dim or 1, **self.guides.dims}.items()}
            rng = torch.empty(2, dtype=torch.int64)
        weights = {name: torch.ones((), device="meta") for name in model.terms}
        return flops(lambda: model(spec, visible, rows[""], rng=rng, guides=rows, weights=weights).loss.backward())

    def derived(self, row: Mapping[str, Any]) -> dict[str, float]:
        return self._guidance.derived(row)

    def warnings(self, rows: list[dict[str, Any]]) -> list[str]:
        found = [warning_of_unwired(name) for name in self._unwired]
        self._unwired = []
        return [*found, *self._collapse.update(rows), *self._guidance.update(rows)]

    # ------------------------------------------------------------ evaluation

    def scoring_batches(self, warn: Warn) -> Iterator[Batch]:
        data, valid = self.config.data, cast(Manifest, self.valid)
        batches = eval_batches(
            valid,
            self.config.features,
            largest_piece(data.update_clips, data.batch_size),
            data.num_workers,
            rank=self.world.rank,
            processes=self.world.size,
            waveforms=self.features == "gpu",
            guides=self._valid_guides,
            warn=warn,
        )
        return self.guides.listen(batches, valid)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """The validation losses: centre crops, with masks and noise that are the same every time, and L_r with the
        whole weight, whatever its schedule: checkpoints of one run are compared. As in training, noise and sums are
        those of batches of `DataConfig.update_clips`, whatever the pieces."""
        self.model.eval()
        with self.step.scoring():
            return self._evaluate(batches)

    def _evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        config, valid, clips = self.config, cast(Manifest, self.valid), 0
        total = torch.zeros(len(self._losses), device=self.device)
        for batch in batches:
            if len(batch.clips) == 0:
                continue
            visible = inverse_block_masks(config.masks, config.grid, seed=config.run.seed, step=0, clips=batch.clips)
            batch = dataclasses.replace(batch, visible=visible)
            whole, size = self.share.clips, largest_piece(config.data.update_clips, config.data.batch_size)
            number, place = divmod(batch.step * size, whole)
            offset = EVAL_NOISE + number * NOISE_PER_STEP + place * self._noise_per_clip
            parts = min(whole, len(valid) - number * whole) / min(size, len(valid) - batch.step * size)
            output = self.step.losses(*self._inputs(batch, offset), parts=parts)
            total += torch.stack([value.float() for value in output.numbers]) * len(batch.clips)
            clips += len(batch.clips)
        clips = sum(self.world.gathered(clips))
        if clips == 0:
            raise nothing_readable(valid, [])
        total = torch.stack(self.world.gathered_rows(total[None].cpu())).sum((0, 1))
        return dict(zip(self._losses, (total / clips).tolist(), strict=True))

    def told(self, values: Mapping[str, float]) -> str:
        return f"loss {values['loss']:.4f}"

    def score(self, values: Mapping[str, float]) -> float:
        return values["loss"]

    def enough(self, evaluations: list[dict[str, Any]]) -> bool:
        return False

    # ------------------------------------------------------------ checkpoints

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self.step.descent.tensors()

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        self.step.descent.restore(tensors)
