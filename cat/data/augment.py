"""What a fine-tuning batch goes through: noise and roll of frames, mixup, SpecAugment, in this order.

All draws are small tensors that the data workers make; they are applied to the spectrograms on whatever device these
lie, which is not waited for. A draw is a pure function of (seed, step) for the batch and of (seed, epoch, clip) for a
clip, each kind from a stream of its own: no option changes another's numbers, and neither does the number of workers.

Roll and gain of the waveform are applied where it is read (`cat.data.reading`).
"""

# Shapes: B clips, T frames, F mel bins, C classes.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cat.data.features import FeatureConfig
from cat.data.randomness import Purpose, generator
from cat_kernels.philox import philox_words


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentations of labelled clips. Off by default; the released recipes say which they use."""

    roll: bool = False  # rotate the waveform by a random amount
    gain: bool = False  # multiply the waveform by Beta(10, 10) + 0.5
    noise: float = 0.0  # add U(0, 1) a bin, times U(0, noise) a clip, to the normalised spectrogram
    roll_frames: int = 0  # rotate the spectrogram by -n .. n-1 frames
    mixup: float = 0.0  # alpha: a batch and its reverse are mixed by one Beta(alpha, alpha); 0 is off
    mixup_probability: float = 0.9  # of a batch to be mixed
    mask_bins: float = 0.0  # SpecAugment: largest width of the mask, as a share of the mel bins
    mask_frames: float = 0.0  # the same of the frames (padding="mask": of the clip's own)

    def __post_init__(self) -> None:
        for name in ("noise", "roll_frames", "mixup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must be 0 (off) or more")
        for name in ("mixup_probability", "mask_bins", "mask_frames"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it is a share, from 0 to 1")


@dataclass(frozen=True)
class Augmentation:
    """What was drawn for a batch; None is off."""

    seed: int
    noise_B: Tensor | None = None  # float32: amplitude
    clips_B2: Tensor | None = None  # int64: epoch and clip, the counters of the noise
    roll_B2: Tensor | None = None  # int64: by how many frames, among how many
    mix: Tensor | None = None  # () float32: the share of the batch, the rest is its reverse
    bins_B2: Tensor | None = None  # int64: first masked bin, and the one behind the last
    frames_B2: Tensor | None = None  # int64: the same of the frames

    def each(self, function: Callable[[Tensor], Tensor]) -> Augmentation:
        """The same with ``function`` of every tensor."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Augmentation(self.seed, **{name: function(tensor) for name, tensor in tensors.items()})

    def mixed(self, values: Tensor) -> Tensor:
        """(B, ...) targets or spectrograms, mixed with those of the reversed batch."""
        return values if self.mix is None else self.mix * values + (1 - self.mix) * values.flip(0)

    @torch.no_grad()
    def apply(self, spec: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrograms (B, 1, T, F) and targets (B, C) as they are trained on."""
        return self.masked(self.mixed(self.shifted(spec))), self.mixed(targets)

    def shifted(self, spec: Tensor) -> Tensor:
        """With noise, then rolled."""
        T, F = spec.shape[-2:]
        if self.noise_B is not None and self.clips_B2 is not None:
            uniform_BTF = _uniforms(self.seed, self.clips_B2, T, F)
            spec = spec + (self.noise_B[:, None, None] * uniform_BTF).unsqueeze(1)
        if self.roll_B2 is not None:
            by_B1, among_B1 = self.roll_B2.split(1, dim=1)
            frame_1T = torch.arange(T, device=spec.device)[None]
            source_BT = torch.where(frame_1T < among_B1, (frame_1T - by_B1).remainder(among_B1), frame_1T)
            spec = spec.gather(2, source_BT[:, None, :, None].expand_as(spec))
        return spec

    def masked(self, spec: Tensor) -> Tensor:
        """With one mask an axis and clip: 0, the mean of the normalised spectrogram."""
        for dim, span_B2 in ((-1, self.bins_B2), (-2, self.frames_B2)):
            if span_B2 is not None:
                place_1S = torch.arange(spec.shape[dim], device=spec.device)[None]
                inside_BS = (span_B2[:, :1] <= place_1S) & (place_1S < span_B2[:, 1:])
                inside = inside_BS[:, None, None, :] if dim == -1 else inside_BS[:, None, :, None]
                spec = spec.masked_fill(inside, 0.0)
        return spec


def draw(
    config: AugmentConfig,
    features: FeatureConfig,
    *,
    seed: int,
    step: int,
    epochs: Sequence[int],
    clips: Sequence[int],
    frames: Sequence[int],
) -> Augmentation | None:
    """What is done to the batch ``step`` of these clips, each in its epoch, with audio in its first ``frames`` frames
    (all of them, where padding counts as part of a clip). None when nothing is."""
    mix = _draw_mix(config, seed, step)
    pairs = list(zip(epochs, clips, strict=True))
    own_B = np.array(frames, dtype=np.int64)
    # A mixed clip goes as far as the longer one of the two.
    masked_B = own_B if mix is None else np.maximum(own_B, own_B[::-1])
    fields: dict[str, Tensor] = {} if mix is None else {"mix": torch.tensor(mix, dtype=torch.float32)}
    if config.noise > 0:
        amplitudes = [generator(seed, Purpose.NOISE, *pair).random() * config.noise for pair in pairs]
        fields["noise_B"] = torch.tensor(amplitudes, dtype=torch.float32)
        fields["clips_B2"] = torch.tensor(pairs, dtype=torch.int64)
    if config.roll_frames > 0:
        n = config.roll_frames
        by = [int(generator(seed, Purpose.FRAME_ROLL, *pair).random() * 2 * n) - n for pair in pairs]
        fields["roll_B2"] = torch.from_numpy(np.stack([np.array(by, dtype=np.int64), own_B], axis=1))
    if config.mask_bins > 0 or config.mask_frames > 0:
        uniforms_B4 = np.stack([generator(seed, Purpose.SPEC_MASKS, *pair).random(4) for pair in pairs])
        bins_B = np.full(len(pairs), features.mel_bins)
        if config.mask_bins > 0:
            fields["bins_B2"] = _spans(uniforms_B4[:, :2], config.mask_bins, bins_B)
        if config.mask_frames > 0:
            fields["frames_B2"] = _spans(uniforms_B4[:, 2:], config.mask_frames, masked_B)
    return Augmentation(seed, **fields) if fields else None


def _draw_mix(config: AugmentConfig, seed: int, step: int) -> float | None:
    if config.mixup == 0:
        return None
    random = generator(seed, Purpose.MIXUP, step)
    chosen = random.random() < config.mixup_probability
    return float(random.beta(config.mixup, config.mixup)) if chosen else None


def _spans(uniforms_B2: np.ndarray, largest: float, sizes_B: np.ndarray) -> Tensor:
    """(B, 2) begin and end: width floor(U x largest x size), all places equally likely."""
    width_B = np.floor(uniforms_B2[:, 0] * largest * sizes_B).astype(np.int64)
    start_B = np.floor(uniforms_B2[:, 1] * (sizes_B - width_B + 1)).astype(np.int64)
    return torch.from_numpy(np.stack([start_B, start_B + width_B], axis=1))


def _uniforms(seed: int, clips_B2: Tensor, T: int, F: int) -> Tensor:
    """(B, T, F) float32 in [0, 1), the same on any device, whatever the batch is: 16 of Philox's random bits a bin."""
    draws = torch.arange(-(-T * F // 8), device=clips_B2.device)[None]
    epochs_B1, numbers_B1 = clips_B2.split(1, dim=1)
    words = torch.stack(philox_words(seed ^ (Purpose.NOISE << 32), draws, epochs_B1, numbers_B1, Purpose.NOISE), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, : T * F]
    return halves.to(torch.float32).mul_(2.0**-16).reshape(-1, T, F)
