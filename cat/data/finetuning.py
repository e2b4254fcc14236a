"""Batches of labelled clips: augmented ones to train on, and every clip once to be scored.

As in pre-training (`cat.data.dataset`), a batch is a pure function of (seed, step).

What a clip shorter than ``features.frames`` is filled up with is silence: with padding="fill" it is a part of the clip
that the network sees, as the released models do; with padding="mask" it is hidden from the network, a row of patches at
a time (``Batch.rows``). A clip shorter than one frame is filled up to one in both.
"""

# Shapes: B clips, H rows of patches, C classes.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError
from cat.data.augment import Augmentation, AugmentConfig, draw
from cat.data.batch import Batch, Cut, Failure, as_float, gather
from cat.data.features import FeatureConfig, frames_in
from cat.data.labels import Interval, Labels, intervals_of, moved
from cat.data.loader import every_clip
from cat.data.manifest import Manifest
from cat.data.reading import FetchAhead, check_choice, check_reading, first_readable, order_of, read_cut, training_cut
from cat.data.share import Share
from cat.data.workers import prefetched
from cat.progress import say

PADDINGS = ("mask", "fill")


@dataclass(frozen=True)
class FinetuneDataConfig:
    """Which labelled clips, and how they are read."""

    train: str = ""  # folder of folders, .jsonl, .tsv or .json; folder or URL of shards
    valid: str | None = None  # to choose the model by; null: held out of train
    test: str | None = None  # scored once, at the end
    valid_share: float = 0.1  # of train, held out where there is no valid
    fold: int | None = None  # the clips of train whose field "fold" is this are the test split
    group_by: str | None = None  # a field of the manifest, e.g. speaker: clips that share it are held out together
    global_batch: int | None = None  # clips of an update, over all processes; null: batch_size
    batch_size: int = 48  # the most clips that a process computes at once
    num_workers: int = 4  # 0 reads in the main process
    prefetch: int = 4  # batches each worker has ready
    padding: str = "mask"  # of short clips: hidden from the network ("mask"), or a part of the clip ("fill")
    crop: str = "start"  # of clips longer than features.frames: "random", "center" or "start"
    sampler: str = "shuffle"  # every clip once an epoch, or "weighted": clips of rare classes more often
    epoch_clips: int | None = None  # clips of an epoch, none twice; null: all
    features: str = "auto"  # log-mel on the run's device ("gpu"), or by the workers ("cpu"); "auto": "gpu" on a GPU
    shard_window: int | None = None  # clips of so many shards are mixed at a time; null: of all
    max_failed_share: float = 0.01  # stop when more of the distinct clips seen could not be read

    def __post_init__(self) -> None:
        check_reading(self)
        check_choice("padding", self.padding, PADDINGS)
        if not 0.0 < self.valid_share < 1.0:
            raise ValueError(f"data.valid_share is {self.valid_share}; it is a share, between 0 and 1")

    @property
    def update_clips(self) -> int:
        """Clips of an update, over all processes."""
        return self.global_batch or self.batch_size


def finetune_batches(
    manifest: Manifest,
    labels: Labels,
    data: FinetuneDataConfig,
    augment: AugmentConfig,
    features: FeatureConfig,
    *,
    patch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    share: Share | None = None,
    waveforms: bool = False,
    warn: Callable[[str], None] = say,
) -> Iterator[Batch]:
    """Batches of the steps ``start_step`` .. ``start_step + num_steps - 1``: the same ones in whatever run, process or
    number of workers they are asked for. `Batch.with_features`, then `Batch.augmented` make them ready to train on.

    Args:
        manifest: clips that `Labels.select` has chosen.
        share, waveforms, warn: as in `cat.data.loader.pretrain_batches`.

    A clip that cannot be read gives its place to the next one of the epoch's order that can, with that clip's own
    targets; it is named in ``Batch.failures``.
    """
    dataset = FinetuneDataset(
        manifest, labels, data, augment, features, patch_size=patch_size, seed=seed, share=share, waveforms=waveforms
    )
    keys = dataset.share.keys(start_step, num_steps)
    return prefetched(dataset, keys, num_workers=data.num_workers, prefetch=data.prefetch, warn=warn)


def scoring_batches(
    manifest: Manifest,
    labels: Labels | None,
    features: FeatureConfig,
    *,
    patch_size: int,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    padding: str = "mask",
    crop: str = "start",
    waveforms: bool = False,
    warn: Callable[[str], None] = say,
) -> Iterator[Batch]:
    """All clips once, in order, as they are; the last batch may be smaller. Without ``labels`` there are no targets.

    A clip that cannot be read is left out and named in ``Batch.failures``; no batch is empty. RuntimeError if not one
    clip can be read. ``rank`` and ``processes`` as in `cat.data.loader.every_clip`.
    """
    check_choice("padding", padding, PADDINGS)
    dataset = ScoringDataset(
        manifest,
        labels,
        features,
        patch_size=patch_size,
        batch_size=batch_size,
        padding=padding,
        crop=crop,
        waveforms=waveforms,
    )
    return every_clip(dataset, num_workers=num_workers, rank=rank, processes=processes, warn=warn)


def crop_to_score(crop: str) -> str:
    """What of a longer clip is scored, where training took ``crop`` of it: of random places the one in the middle."""
    return "center" if crop == "random" else crop


class _Labelled:
    """What training and scoring have in common: from cuts of clips to a batch with targets."""

    def __init__(
        self,
        manifest: Manifest,
        labels: Labels | None,
        features: FeatureConfig,
        *,
        padding: str,
        patch_size: int,
        waveforms: bool,
    ) -> None:
        for name, size in (("frames", features.frames), ("mel_bins", features.mel_bins)):
            if size % patch_size:
                raise ValueError(f"features.{name} is {size}; it must be a multiple of the patch size, {patch_size}")
        self.manifest, self.labels, self.features = manifest, labels, features
        self.hidden, self.patch_size, self.waveforms = padding == "mask", patch_size, waveforms
        self.grid_rows = features.frames // patch_size

    def _frames(self, cuts: list[Cut]) -> list[int]:
        """Frames of every clip that the network sees."""
        if not self.hidden:
            return [self.features.frames] * len(cuts)
        found = frames_in(self.features, torch.tensor([len(cut.wave) for cut in cuts], dtype=torch.int64))
        return found.clamp(1, self.features.frames).tolist()

    def _batch(
        self, number: int, cuts: list[Cut], failures: list[Failure], augmentation: Augmentation | None = None
    ) -> Batch:
        batch = gather(number, cuts, [], failures, self.manifest, self.features, waveforms=self.waveforms)
        frames, rows = self._frames(cuts), None
        if self.hidden:
            rows = [-(-count // self.patch_size) for count in frames]
            if augmentation is not None and augmentation.mix is not None:
                rows = list(map(max, rows, reversed(rows)))
            batch = dataclasses.replace(batch, rows=tuple(rows))
        batch = dataclasses.replace(batch, augmentation=augmentation)
        if self.labels is None:
            return batch
        clip_targets = self.labels.targets(self.manifest, [cut.clip for cut in cuts])
        if self.labels.kind == "events":
            return self._with_events(batch, self.labels, clip_targets, cuts, frames)
        return dataclasses.replace(batch, targets=clip_targets)

    def _with_events(
        self, batch: Batch, labels: Labels, clip_targets: Tensor, cuts: list[Cut], frames: list[int]
    ) -> Batch:
        """With targets of the rows; and the clip's own without the events that are not in what was read of it."""
        targets = torch.zeros(len(cuts), self.grid_rows, len(labels.classes))
        known = torch.ones(len(cuts), self.grid_rows)
        augmentation = batch.augmentation
        rolls = [0] * len(cuts)
        if augmentation is not None and augmentation.roll_B2 is not None:
            rolls = augmentation.roll_B2[:, 0].tolist()
        for row, (cut, roll, count) in enumerate(zip(cuts, rolls, frames, strict=True)):
            intervals = intervals_of(self.manifest.clips[cut.clip])
            if intervals is None:
                known[row] = 0
            else:
                shift = self.features.frame_shift / self.features.sample_rate
                heard = self._moved(intervals, cut, roll * shift, count * shift)
                targets[row] = labels.frame_targets(heard, self.grid_rows, self.patch_size * shift)
                lost = {label for *_, label in intervals} - {label for *_, label in heard}
                clip_targets[row, [labels.column[label] for label in lost]] = 0
        if augmentation is not None and augmentation.mix is not None:
            known = known * known.flip(0)
        for row, seen in enumerate(batch.rows or ()):
            known[row, seen:] = 0
        return dataclasses.replace(batch, targets=clip_targets, frame_targets=targets, frame_weights=known)

    def _moved(self, intervals: list[Interval], cut: Cut, roll: float, length: float) -> list[Interval]:
        """Where the events are after the crop, the roll of the waveform, and that of the frames, all in seconds."""
        rate = self.features.sample_rate
        intervals = moved(intervals, start=cut.first / rate, length=len(cut.wave) / rate, roll=cut.rolled / rate)
        return moved(intervals, start=0.0, length=length, roll=roll) if roll else intervals


class FinetuneDataset(_Labelled, torch.utils.data.Dataset[Batch]):
    """``dataset[step]`` is the batch of that step; of a ``share`` of several pieces, the piece with that key."""

    def __init__(
        self,
        manifest: Manifest,
        labels: Labels,
        data: FinetuneDataConfig,
        augment: AugmentConfig,
        features: FeatureConfig,
        *,
        patch_size: int,
        seed: int,
        share: Share | None = None,
        waveforms: bool = False,
    ) -> None:
        super().__init__(manifest, labels, features, padding=data.padding, patch_size=patch_size, waveforms=waveforms)
        self.data, self.augment, self.seed = data, augment, seed
        self.share = share or Share(data.update_clips)
        self._order = order_of(manifest, data, seed=seed)
        self._fetch_ahead = FetchAhead(manifest, data, self._order)

    def __getitem__(self, key: int) -> Batch:
        failures: list[Failure] = []
        step, places = self.share.place(key)
        positions = [step * self.share.clips + place for place in places]
        self._fetch_ahead(positions)
        cuts = [first_readable(self._order, p, self._read, failures, self.manifest.name) for p in positions]
        augmentation = draw(
            self.augment,
            self.features,
            seed=self.seed,
            step=step,
            epochs=[cut.epoch for cut in cuts],
            clips=[cut.clip for cut in cuts],
            frames=self._frames(cuts),
        )
        return self._batch(step, cuts, failures, augmentation)

    def _read(self, epoch: int, index: int) -> Cut:
        cut = training_cut(
            self.manifest,
            index,
            self.features,
            seed=self.seed,
            epoch=epoch,
            crop=self.data.crop,
            roll=self.augment.roll,
            gain=self.augment.gain,
            min_samples=1,
        )
        return _filled(cut, self.features)


class ScoringDataset(_Labelled, torch.utils.data.Dataset[Batch]):
    """``dataset[i]`` is clips i*B .. i*B + B - 1 of the manifest; unreadable ones are left out."""

    def __init__(
        self,
        manifest: Manifest,
        labels: Labels | None,
        features: FeatureConfig,
        *,
        patch_size: int,
        batch_size: int,
        padding: str,
        crop: str,
        waveforms: bool = False,
    ) -> None:
        super().__init__(manifest, labels, features, padding=padding, patch_size=patch_size, waveforms=waveforms)
        self.batch_size, self.crop = batch_size, crop

    def __len__(self) -> int:
        return math.ceil(len(self.manifest) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        cuts: list[Cut] = []
        failures: list[Failure] = []
        for index in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.manifest))):
            try:
                cut = read_cut(self.manifest, index, self.features, self.crop, min_samples=1)
            except AudioError as error:
                failures.append(Failure(error.path, error.reason))
                continue
            cuts.append(_filled(cut, self.features))
        return self._batch(number, cuts, failures)


def _filled(cut: Cut, features: FeatureConfig) -> Cut:
    """At least one frame: silence behind a shorter clip. Its mean goes first, or the silence would be a step."""
    missing = features.frame_length - len(cut.wave)
    if missing <= 0:
        return cut
    wave = as_float(cut.wave)
    return dataclasses.replace(cut, wave=np.pad(wave - wave.mean(), (0, missing)))
