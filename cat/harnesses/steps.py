"""Frame embeddings more often than an encoder has rows of patches, and the settings that come from the environment.

A row of patches is 160 ms long. Encoding the waveform again without its first 40, 80 and 120 ms gives the rows between:
each is a row as the encoder makes it, of a window that overlaps its neighbours'.

===================  ===============================================================================================
``CAT_CHECKPOINT``   what `CATEncoder.from_pretrained` takes, for harnesses that build their model without an argument
``CAT_STEP_MS``      from one frame's embedding to the next: 40 (the default), 80 or 160
===================  ===============================================================================================
"""

# Shapes: B clips, n samples, t frames, D embedding width.

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from cat.encoders.audio import CATEncoder

CHECKPOINT, STEP_MS = "CAT_CHECKPOINT", "CAT_STEP_MS"


def load(path: str = "") -> CATEncoder:
    """The encoder that `path`, or else the environment, names."""
    path = path or os.environ.get(CHECKPOINT, "")
    if not path:
        raise ValueError(f"no checkpoint was named; set {CHECKPOINT} to a run, a checkpoint or a .safetensors file")
    return CATEncoder.from_pretrained(path)


def step_of(encoder: CATEncoder) -> int:
    """Samples from one frame to the next."""
    text, row = os.environ.get(STEP_MS, "40"), row_samples(encoder)
    try:
        step = float(text) * encoder.sample_rate / 1000
    except ValueError:
        step = 0.0
    if not (1 <= step <= row and step.is_integer() and row % int(step) == 0):
        milliseconds = ", ".join(f"{1000 * row / parts / encoder.sample_rate:g}" for parts in (4, 2, 1))
        raise ValueError(f"{STEP_MS} is {text!r}; expected a whole part of a row of patches, such as {milliseconds}")
    return int(step)


def row_samples(encoder: CATEncoder) -> int:
    return encoder.patch_size * encoder.features.frame_shift


def first_centre(encoder: CATEncoder) -> float:
    """Of frame 0, in samples: the middle of what the spectrogram frames of one row of patches hear."""
    return (row_samples(encoder) - encoder.features.frame_shift + encoder.features.frame_length) / 2


def audible(encoder: CATEncoder, clip: Tensor) -> Tensor:
    """The clip (n,) at the encoder's rate, with zeros behind it where it is shorter than one spectrogram frame."""
    return pad(clip, (0, max(0, encoder.min_samples - len(clip))))


def frames_every(encoder: CATEncoder, clips: Sequence[Tensor], step: int) -> list[Tensor]:
    """(t, D) of every clip (n,) at the encoder's rate. Frame k is centred at `first_centre` + k * `step` samples; there
    are those whose centre lies inside the clip, and at least one."""
    first, parts = first_centre(encoder), row_samples(encoder) // step
    counts = [max(1, math.ceil((len(clip) - first) / step)) for clip in clips]
    frames: list[Tensor] = [torch.empty(0)] * len(clips)
    for part in range(min(parts, max(counts))):
        chosen = [number for number, count in enumerate(counts) if part < count]
        heard = [audible(encoder, clips[number][part * step :]) for number in chosen]
        found_BHD = encoder(heard, encoder.sample_rate, patches=False).frames
        for number, found_HD in zip(chosen, found_BHD, strict=True):
            if part == 0:
                frames[number] = found_HD.new_empty(counts[number], found_HD.shape[1])
            places_tD = frames[number][part::parts]
            places_tD.copy_(found_HD[: len(places_tD)])
    return frames


def frames_of_steps(encoder: CATEncoder, clips: Sequence[Tensor], step: int) -> list[Tensor]:
    """(ceil(n / step), D) of every clip: for the k-th `step` samples the frame that is centred nearest to their middle,
    for harnesses that know a frame's time by its number."""
    late = round((first_centre(encoder) - step / 2) / step)  # steps by which frame 0 comes after the first middle
    found = []
    for clip, frames_tD in zip(clips, frames_every(encoder, clips, step), strict=True):
        places = torch.arange(math.ceil(len(clip) / step)) - late
        found.append(frames_tD[places.clamp(0, len(frames_tD) - 1).to(frames_tD.device)])
    return found
