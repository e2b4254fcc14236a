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

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError, read_audio
from cat.data.embeddings import EmbeddingFiles, EmbeddingStore, open_embeddings
from cat.data.features import FeatureConfig, log_mel
from cat.data.manifest import Manifest
from cat.data.masks import MaskConfig, inverse_block_masks

CROPS = ("random", "center", "start")
FEATURES = ("auto", "gpu", "cpu")
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
    features: str = "auto"  # log-mel on the run's device ("gpu"), or by the workers ("cpu"); "auto": "gpu" on a GPU
    max_failed_share: float = 0.01  # stop when more of the distinct clips seen could not be read

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"data.crop is {self.crop!r}; choose one of {', '.join(CROPS)}")
        if self.features not in FEATURES:
            raise ValueError(f"data.features is {self.features!r}; choose one of {', '.join(FEATURES)}")
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
    """Everything one step needs. Rows of all fields belong together: clip, labels and embedding never part.

    The clips are spectrograms (``spec``), or waveforms with their ``lengths`` that `with_features` makes those of.
    """

    step: int
    spec: Tensor | None  # (B, 1, T, F) float32, normalised
    waveform: Tensor | None  # (B, n): int16 samples when all clips have such, else float32; zeros behind a clip's end
    lengths: Tensor | None  # (B,) int64 samples
    visible: Tensor | None  # (N, K) int64 patch indices, pre-training only
    clips: Tensor  # (B,) int64 indices into the manifest
    labels: list[tuple[str, ...]]
    embedding: Tensor | None  # (B, D_e) float32
    failures: list[Failure]  # clips whose place was taken by another one (evaluation: that were left out)

    @torch.no_grad()
    def with_features(self, config: FeatureConfig) -> Batch:
        """The batch with spectrograms in place of waveforms, made on the device they lie on; it is not waited for."""
        if self.waveform is None:
            return self
        spec = log_mel(self.waveform, config, self.lengths)
        return dataclasses.replace(self, spec=spec, waveform=None, lengths=None)

    def pin_memory(self) -> Batch:
        """Page-locked tensors, for asynchronous copies to a GPU. The DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``; the copy does not block when they are pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return dataclasses.replace(
            self,
            spec=optional(self.spec),
            waveform=optional(self.waveform),
            lengths=optional(self.lengths),
            visible=optional(self.visible),
            clips=function(self.clips),
            embedding=optional(self.embedding),
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
        waveforms: bool = False,
    ) -> None:
        for name, size in (("frames", features.frames), ("mel_bins", features.mel_bins)):
            if size % patch_size:
                raise ValueError(f"features.{name} is {size}; it must be a multiple of the patch size, {patch_size}")
        self.manifest, self.data, self.features, self.masks = manifest, data, features, masks
        self.grid = (features.frames // patch_size, features.mel_bins // patch_size)
        self.seed, self.waveforms = seed, waveforms
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
        batch = _batch(step, waves, indices, rows, failures, self.manifest, self.features, waveforms=self.waveforms)
        return dataclasses.replace(batch, visible=self._draw_masks(step, batch.clips))

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
        return _as_float(wave) * np.float32(gain) if self.data.gain else wave

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
        return inverse_block_masks(self.masks, self.grid, seed=self.seed, step=step, clips=clips)


class EvalDataset(torch.utils.data.Dataset[Batch]):
    """``dataset[i]`` is clips i*B .. i*B + B - 1 of the manifest, centre-cropped; unreadable ones are left out."""

    def __init__(
        self, manifest: Manifest, features: FeatureConfig, batch_size: int, *, waveforms: bool = False
    ) -> None:
        self.manifest, self.features, self.batch_size, self.waveforms = manifest, features, batch_size, waveforms
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
        return _batch(number, waves, indices, rows, failures, self.manifest, self.features, waveforms=self.waveforms)


def _read_clip(path: Path, features: FeatureConfig, start: float) -> np.ndarray:
    return read_audio(
        path,
        features.sample_rate,
        max_samples=features.samples,
        start=start,
        min_samples=features.frame_length,
        allow_int16=True,
    )


def _as_float(wave: np.ndarray) -> np.ndarray:
    return wave * np.float32(2**-15) if wave.dtype == np.int16 else wave


def _embedding(store: EmbeddingStore | EmbeddingFiles | None, manifest: Manifest, index: int) -> np.ndarray | None:
    row = manifest.clips[index].embedding
    return None if store is None or row is None else store.rows([row])


def _stack(rows: list[np.ndarray | None]) -> Tensor | None:
    """(B, D_e); None without embeddings. Either all clips of a data set have one or none."""
    found = [row for row in rows if row is not None]
    return torch.from_numpy(np.concatenate(found)) if found else None


def _batch(
    number: int,
    waves: list[np.ndarray],
    indices: list[int],
    rows: list[np.ndarray | None],
    failures: list[Failure],
    manifest: Manifest,
    features: FeatureConfig,
    *,
    waveforms: bool,
) -> Batch:
    """The clips that were read: their waveforms, all of one width in every batch, or their spectrograms."""
    longest = max((len(wave) for wave in waves), default=features.samples)
    wave_BN, lengths_B = _stack_waves(waves, features.samples if waveforms else longest)
    batch = Batch(
        step=number,
        spec=None,
        waveform=wave_BN,
        lengths=lengths_B,
        visible=None,
        clips=torch.tensor(indices, dtype=torch.int64),
        labels=[manifest.clips[index].labels for index in indices],
        embedding=_stack(rows),
        failures=failures,
    )
    if waveforms:
        return batch
    # On one thread: the order in which sums are taken, and so the last bit, depends on the threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return batch.with_features(features)
    finally:
        torch.set_num_threads(threads)


def _stack_waves(waves: list[np.ndarray], width: int) -> tuple[Tensor, Tensor]:
    """(B, width), int16 when all clips are, else float32, with zeros behind each clip's end; and (B,) lengths."""
    dtype = np.int16 if all(wave.dtype == np.int16 for wave in waves) else np.float32
    wave_BN = np.zeros((len(waves), width), dtype)
    for row, wave in zip(wave_BN, waves, strict=True):
        row[: len(wave)] = wave if dtype == np.int16 else _as_float(wave)
    lengths_B = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    return torch.from_numpy(wave_BN), lengths_B


def _generator(seed: int, purpose: int, epoch: int, clip: int) -> np.random.Generator:
    """A stream of its own for every (seed, purpose, epoch, clip): they are Philox's key and the upper counter words."""
    mask = (1 << 64) - 1
    return np.random.Generator(np.random.Philox(key=[seed & mask, purpose], counter=[0, clip, epoch, 0]))
