"""What happens to a clip between the manifest and the batch; everything a pure function of (seed, step).

Batch ``step`` takes positions p = step * B .. step * B + B - 1 of the endless sequence of epochs: epoch p // n, place
p % n of that epoch's permutation. Crop, roll and gain come from a counter-based generator keyed by (seed, epoch, clip).
So a run is resumed by its step alone, and the number of workers changes nothing.
"""

# Shapes: B clips, M masks per clip, N = B*M, K visible patches, n samples, T frames, F mel bins, D_e embedding width.

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError, read_audio
from cat.data.embeddings import EmbeddingFiles, EmbeddingStore, open_embeddings
from cat.data.features import FeatureConfig, log_mel
from cat.data.manifest import Manifest

if TYPE_CHECKING:
    from cat.masks import MaskConfig

CROPS = ("random", "center", "start")
_PERMUTATION, _AUGMENT = 1, 2  # what a stream of random numbers is for
_GIVE_UP_AFTER = 100  # unreadable clips in a row


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how they are read."""

    train: str = ""  # folder, .jsonl, .tsv or .json
    valid: str | None = None
    batch_size: int = 96
    num_workers: int = 4  # 0 reads in the main process
    prefetch: int = 4  # batches each worker has ready
    crop: str = "random"  # of clips longer than features.frames: "random", "center" or "start"
    roll: bool = False  # rotate the waveform by a random amount
    gain: bool = False  # multiply the waveform by Beta(10, 10) + 0.5
    max_failed_share: float = 0.01  # stop when more of the distinct clips seen could not be read

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"data.crop is {self.crop!r}; choose one of {', '.join(CROPS)}")
        for name, least in (("batch_size", 1), ("num_workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0.0 <= self.max_failed_share <= 1.0:
            raise ValueError(f"data.max_failed_share is {self.max_failed_share}; it is a share, from 0 to 1")


@dataclass(frozen=True)
class Failure:
    """A clip that could not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Everything one step needs. Rows of all fields belong together: clip, labels and embedding never part."""

    step: int
    spec: Tensor  # (B, 1, T, F) float32, normalised
    visible: Tensor | None  # (N, K) int64 patch indices, pre-training only
    clips: Tensor  # (B,) int64 indices into the manifest
    labels: list[tuple[str, ...]]
    embedding: Tensor | None  # (B, D_e) float32
    failures: list[Failure]  # clips whose place was taken by another one (evaluation: that were left out)

    def pin_memory(self) -> Batch:
        """Page-locked tensors, for asynchronous copies to a GPU. The DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``; the copy does not block when they are pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return dataclasses.replace(
            self,
            spec=function(self.spec),
            visible=None if self.visible is None else function(self.visible),
            clips=function(self.clips),
            embedding=None if self.embedding is None else function(self.embedding),
        )


class PretrainDataset(torch.utils.data.Dataset[Batch]):
    """``dataset[step]`` is the batch of that step."""

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        features: FeatureConfig,
        masks: MaskConfig | None,
        *,
        patch_size: int,
        seed: int,
    ) -> None:
        for name, size in (("frames", features.frames), ("mel_bins", features.mel_bins)):
            if size % patch_size:
                raise ValueError(f"features.{name} is {size}; it must be a multiple of the patch size, {patch_size}")
        self.manifest, self.data, self.features, self.masks = manifest, data, features, masks
        self.grid = (features.frames // patch_size, features.mel_bins // patch_size)
        self.seed = seed
        self.embeddings = open_embeddings(manifest)
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getitem__(self, step: int) -> Batch:
        waves, indices, rows = [], [], []
        failures: list[Failure] = []
        for position in range(step * self.data.batch_size, (step + 1) * self.data.batch_size):
            wave, index, row = self._read(position, failures)
            waves.append(wave)
            indices.append(index)
            rows.append(row)
        clips = torch.tensor(indices, dtype=torch.int64)
        return Batch(
            step=step,
            spec=_spectrograms(waves, self.features),
            visible=self._draw_masks(step, clips),
            clips=clips,
            labels=[self.manifest.clips[index].labels for index in indices],
            embedding=_stack(rows),
            failures=failures,
        )

    def _read(self, position: int, failures: list[Failure]) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Waveform, index and embedding of the clip at ``position``, or of the epoch's next one that can be read."""
        n = len(self.manifest)
        epoch, place = divmod(position, n)
        order = self._permutation(epoch)
        tries = min(n, _GIVE_UP_AFTER)
        for offset in range(tries):
            index = int(order[(place + offset) % n])
            try:
                row = _embedding(self.embeddings, self.manifest, index)
                return self._waveform(epoch, index), index, row
            except AudioError as error:
                failures.append(Failure(error.path, error.reason))
        raise RuntimeError(
            f"{tries} clips in a row could not be used, the last one {failures[-1].path}: {failures[-1].reason}; "
            f"check the paths of {self.manifest.source}"
        )

    def _waveform(self, epoch: int, index: int) -> np.ndarray:
        # All are drawn whether used or not, so that one option does not change another's numbers.
        random = _generator(self.seed, _AUGMENT, epoch, index)
        crop, roll, gain = random.random(), random.random(), random.beta(10, 10) + 0.5
        start = {"random": crop, "center": 0.5, "start": 0.0}[self.data.crop]
        wave = _read_clip(self.manifest.path(index), self.features, start)
        if self.data.roll:
            wave = np.roll(wave, int(roll * len(wave)))
        return wave * np.float32(gain) if self.data.gain else wave

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of the clips in ``epoch``. Drawing it takes O(n), so that the last ones are kept."""
        if epoch not in self._permutations:
            order = _generator(self.seed, _PERMUTATION, epoch, 0).permutation(len(self.manifest))
            self._permutations[epoch] = order
            if len(self._permutations) > 2:
                self._permutations.popitem(last=False)
        return self._permutations[epoch]

    def _draw_masks(self, step: int, clips: Tensor) -> Tensor | None:
        if self.masks is None:
            return None
        from cat.masks import inverse_block_masks

        return inverse_block_masks(self.masks, self.grid, seed=self.seed, step=step, clips=clips)


class EvalDataset(torch.utils.data.Dataset[Batch]):
    """``dataset[i]`` is clips i*B .. i*B + B - 1 of the manifest, centre-cropped; unreadable ones are left out."""

    def __init__(self, manifest: Manifest, features: FeatureConfig, batch_size: int) -> None:
        self.manifest, self.features, self.batch_size = manifest, features, batch_size
        self.embeddings = open_embeddings(manifest)

    def __len__(self) -> int:
        return math.ceil(len(self.manifest) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        waves, indices, rows = [], [], []
        failures: list[Failure] = []
        for index in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.manifest))):
            try:
                row = _embedding(self.embeddings, self.manifest, index)
                waves.append(_read_clip(self.manifest.path(index), self.features, start=0.5))
            except AudioError as error:
                failures.append(Failure(error.path, error.reason))
                continue
            indices.append(index)
            rows.append(row)
        return Batch(
            step=number,
            spec=_spectrograms(waves, self.features),
            visible=None,
            clips=torch.tensor(indices, dtype=torch.int64),
            labels=[self.manifest.clips[index].labels for index in indices],
            embedding=_stack(rows),
            failures=failures,
        )


def _read_clip(path: Path, features: FeatureConfig, start: float) -> np.ndarray:
    return read_audio(
        path, features.sample_rate, max_samples=features.samples, start=start, min_samples=features.frame_length
    )


def _embedding(store: EmbeddingStore | EmbeddingFiles | None, manifest: Manifest, index: int) -> np.ndarray | None:
    row = manifest.clips[index].embedding
    return None if store is None or row is None else store.rows([row])


def _stack(rows: list[np.ndarray | None]) -> Tensor | None:
    """(B, D_e); None without embeddings. Either all clips of a data set have one or none."""
    found = [row for row in rows if row is not None]
    return torch.from_numpy(np.concatenate(found)) if found else None


def _spectrograms(waves: list[np.ndarray], features: FeatureConfig) -> Tensor:
    """(B, 1, T, F), on one thread: the order in which sums are taken, and so the last bit, depends on the threads."""
    if not waves:
        return torch.empty(0, 1, features.frames, features.mel_bins)
    lengths = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    wave_BN = torch.zeros(len(waves), int(lengths.max()))
    for row, wave in zip(wave_BN, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return log_mel(wave_BN, features, lengths)
    finally:
        torch.set_num_threads(threads)


def _generator(seed: int, purpose: int, epoch: int, clip: int) -> np.random.Generator:
    """A stream of its own for every (seed, purpose, epoch, clip): they are Philox's key and the upper counter words."""
    mask = (1 << 64) - 1
    return np.random.Generator(np.random.Philox(key=[seed & mask, purpose], counter=[0, clip, epoch, 0]))
