"""What happens to a clip between the manifest and the batch; everything a pure function of (seed, step).

Batch ``step`` takes positions p = step * B .. step * B + B - 1 of the endless sequence of epochs (`cat.data.sampling`):
epoch p // n, place p % n of that epoch's permutation. Crop, roll and gain come from a counter-based generator keyed by
(seed, epoch, clip). So a run is resumed by its step alone, and the number of workers changes nothing, nor does that of
the processes which share the batch out (`cat.data.share`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError
from cat.data.batch import Batch, Cut, Failure, gather
from cat.data.embeddings import EmbeddingFiles, EmbeddingStore, open_embeddings
from cat.data.features import FeatureConfig
from cat.data.guides import Guides
from cat.data.manifest import Manifest
from cat.data.masks import MaskConfig, inverse_block_masks
from cat.data.reading import FetchAhead, check_reading, first_readable, order_of, read_cut, training_cut
from cat.data.share import Share


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how they are read."""

    train: str = ""  # folder, .jsonl, .tsv or .json; folder or URL of shards
    valid: str | None = None
    global_batch: int | None = None  # clips of an update, over all processes; null: batch_size
    batch_size: int = 96  # the most clips that a process computes at once
    num_workers: int = 4  # 0 reads in the main process
    prefetch: int = 4  # batches each worker has ready
    crop: str = "random"  # of clips longer than features.frames: "random", "center" or "start"
    roll: bool = False  # rotate the waveform by a random amount
    gain: bool = False  # multiply the waveform by Beta(10, 10) + 0.5
    sampler: str = "shuffle"  # every clip once an epoch, or "weighted": clips of rare labels more often
    epoch_clips: int | None = None  # clips of an epoch, none twice; null: all
    features: str = "auto"  # log-mel on the run's device ("gpu"), or by the workers ("cpu"); "auto": "gpu" on a GPU
    shard_window: int | None = None  # clips of so many shards are mixed at a time; null: of all
    max_failed_share: float = 0.01  # stop when more of the distinct clips seen could not be read

    def __post_init__(self) -> None:
        check_reading(self)

    @property
    def update_clips(self) -> int:
        """Clips of an update, over all processes."""
        return self.global_batch or self.batch_size


class PretrainDataset(torch.utils.data.Dataset[Batch]):
    """``dataset[step]`` is the batch of that step; of a ``share`` of several pieces, the piece with that key."""

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        features: FeatureConfig,
        masks: MaskConfig | None,
        *,
        patch_size: int,
        seed: int,
        share: Share | None = None,
        waveforms: bool = False,
        guides: Guides | None = None,
    ) -> None:
        for name, size in (("frames", features.frames), ("mel_bins", features.mel_bins)):
            if size % patch_size:
                raise ValueError(f"features.{name} is {size}; it must be a multiple of the patch size, {patch_size}")
        self.manifest, self.data, self.features, self.masks = manifest, data, features, masks
        self.grid = (features.frames // patch_size, features.mel_bins // patch_size)
        self.seed, self.waveforms = seed, waveforms
        self.embeddings, self.guides = open_embeddings(manifest), guides or Guides()
        self.share = share or Share(data.update_clips)
        self._order = order_of(manifest, data, seed=seed)
        self._fetch_ahead = FetchAhead(manifest, data, self._order)

    def __getitem__(self, key: int) -> Batch:
        failures: list[Failure] = []
        step, places = self.share.place(key)
        positions = [step * self.share.clips + place for place in places]
        self._fetch_ahead(positions)
        read = [first_readable(self._order, p, self._read, failures, self.manifest.name) for p in positions]
        cuts, embeddings = [cut for cut, _, _ in read], [row for _, row, _ in read]
        batch = gather(step, cuts, embeddings, failures, self.manifest, self.features, waveforms=self.waveforms)
        told = self.guides.stacked([told for _, _, told in read])
        return dataclasses.replace(batch, visible=self._draw_masks(step, batch.clips), **told)

    def _read(self, epoch: int, index: int) -> tuple[Cut, np.ndarray | None, dict[str, np.ndarray]]:
        """A clip, its embedding, and what the guides have of it."""
        row = _embedding(self.embeddings, self.manifest, index)
        cut = training_cut(
            self.manifest,
            index,
            self.features,
            seed=self.seed,
            epoch=epoch,
            crop=self.data.crop,
            roll=self.data.roll,
            gain=self.data.gain,
            min_samples=self.features.frame_length,
        )
        return cut, row, self.guides.read(index)

    def _draw_masks(self, step: int, clips: Tensor) -> Tensor | None:
        if self.masks is None:
            return None
        return inverse_block_masks(self.masks, self.grid, seed=self.seed, step=step, clips=clips)


class EvalDataset(torch.utils.data.Dataset[Batch]):
    """``dataset[i]`` is clips i*B .. i*B + B - 1 of the manifest, centre-cropped; unreadable ones are left out."""

    def __init__(
        self,
        manifest: Manifest,
        features: FeatureConfig,
        batch_size: int,
        *,
        waveforms: bool = False,
        guides: Guides | None = None,
    ) -> None:
        self.manifest, self.features, self.batch_size, self.waveforms = manifest, features, batch_size, waveforms
        self.embeddings, self.guides = open_embeddings(manifest), guides or Guides()

    def __len__(self) -> int:
        return math.ceil(len(self.manifest) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        cuts, embeddings, told = [], [], []
        failures: list[Failure] = []
        for index in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.manifest))):
            try:
                row = _embedding(self.embeddings, self.manifest, index)
                cut = read_cut(self.manifest, index, self.features, "center", min_samples=self.features.frame_length)
                of_guides = self.guides.read(index)
            except AudioError as error:
                failures.append(Failure(error.path, error.reason))
                continue
            cuts.append(cut)
            embeddings.append(row)
            told.append(of_guides)
        batch = gather(number, cuts, embeddings, failures, self.manifest, self.features, waveforms=self.waveforms)
        return dataclasses.replace(batch, **self.guides.stacked(told))


def _embedding(store: EmbeddingStore | EmbeddingFiles | None, manifest: Manifest, index: int) -> np.ndarray | None:
    row = manifest.clips[index].embedding
    return None if store is None or row is None else store.rows([row])
