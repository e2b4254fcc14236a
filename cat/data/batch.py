"""A batch, and how one is made of the clips that were read."""

# Shapes: B clips, M masks per clip, N = B*M, K visible patches, n samples, T frames, F mel bins, D_e embedding width,
# H rows of patches, C classes.

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cat.data.augment import Augmentation
from cat.data.features import FeatureConfig, log_mel
from cat.data.guides import Heard
from cat.data.manifest import Manifest


@dataclass(frozen=True)
class Failure:
    """A clip that could not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Everything one step needs. Rows of all fields belong together: clip, labels and embedding never part.

    The clips are spectrograms (``spec``), or waveforms with their ``lengths`` that `with_features` makes those of. In
    fine-tuning they and the targets are as they were read until `augmented` has had its turn.
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
    targets: Tensor | None = None  # (B, C) float32: 1 for what is in the clip; between 0 and 1 where clips were mixed
    frame_targets: Tensor | None = None  # (B, H, C) float32: the same of every row of patches, from strong labels
    frame_weights: Tensor | None = None  # (B, H) float32: 1 where frame targets are known and seen, else 0
    rows: tuple[int, ...] | None = None  # rows of patches that are seen, when padding is hidden (mixed: of the longer)
    augmentation: Augmentation | None = None  # what `augmented` does to it
    guides: Mapping[str, Tensor] = field(default_factory=dict)  # (B, D_e) float32 of every other guide, by its name
    heard: Mapping[str, Heard] = field(default_factory=dict)  # what live guides in the training process are to encode

    @torch.no_grad()
    def with_features(self, config: FeatureConfig) -> Batch:
        """The batch with spectrograms in place of waveforms, made on the device they lie on; it is not waited for."""
        if self.waveform is None:
            return self
        spec = log_mel(self.waveform, config, self.lengths)
        return dataclasses.replace(self, spec=spec, waveform=None, lengths=None)

    @torch.no_grad()
    def augmented(self) -> Batch:
        """The batch as it is trained on, made on the device it lies on, which is not waited for. After `with_features`;
        a batch without augmentation stays as it is."""
        augmentation = self.augmentation
        if augmentation is None:
            return self
        if self.spec is None or self.targets is None:
            raise ValueError("a batch of waveforms cannot be augmented; call with_features first")
        spec, targets = augmentation.apply(self.spec, self.targets)
        frames = None if self.frame_targets is None else augmentation.mixed(self.frame_targets)
        return dataclasses.replace(self, spec=spec, targets=targets, frame_targets=frames, augmentation=None)

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
            targets=optional(self.targets),
            frame_targets=optional(self.frame_targets),
            frame_weights=optional(self.frame_weights),
            augmentation=None if self.augmentation is None else self.augmentation.each(function),
            guides={name: function(rows) for name, rows in self.guides.items()},
        )


def _stack(rows: list[np.ndarray | None]) -> Tensor | None:
    """(B, D_e); None without embeddings. Either all clips of a data set have one or none."""
    found = [row for row in rows if row is not None]
    return torch.from_numpy(np.concatenate(found)) if found else None


@dataclass(frozen=True)
class Cut:
    """What was read of a clip: its waveform from sample ``first`` on, then rolled by ``rolled`` samples."""

    clip: int
    wave: np.ndarray
    epoch: int = 0
    first: int = 0
    rolled: int = 0


def gather(
    number: int,
    cuts: list[Cut],
    embeddings: list[np.ndarray | None],
    failures: list[Failure],
    manifest: Manifest,
    features: FeatureConfig,
    *,
    waveforms: bool,
) -> Batch:
    """The batch of clips that were read: their waveforms, all of one width in every batch, or their spectrograms."""
    waves = [cut.wave for cut in cuts]
    longest = max((len(wave) for wave in waves), default=features.samples)
    wave_BN, lengths_B = _stack_waves(waves, features.samples if waveforms else longest)
    batch = Batch(
        step=number,
        spec=None,
        waveform=wave_BN,
        lengths=lengths_B,
        visible=None,
        clips=torch.tensor([cut.clip for cut in cuts], dtype=torch.int64),
        labels=[manifest.clips[cut.clip].labels for cut in cuts],
        embedding=_stack(embeddings),
        failures=failures,
    )
    if waveforms:
        return batch
    with one_thread():
        return batch.with_features(features)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For what data workers and the main process are to compute alike: the order in which sums are taken, and so the
    last bit, depends on the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stack_waves(waves: list[np.ndarray], width: int) -> tuple[Tensor, Tensor]:
    """(B, width), int16 when all clips are, else float32, with zeros behind each clip's end; and (B,) lengths."""
    dtype = np.int16 if all(wave.dtype == np.int16 for wave in waves) else np.float32
    wave_BN = np.zeros((len(waves), width), dtype)
    for row, wave in zip(wave_BN, waves, strict=True):
        row[: len(wave)] = wave if dtype == np.int16 else as_float(wave)
    lengths_B = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    return torch.from_numpy(wave_BN), lengths_B


def as_float(wave: np.ndarray) -> np.ndarray:
    return wave * np.float32(2**-15) if wave.dtype == np.int16 else wave
