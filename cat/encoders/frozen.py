"""What a frozen audio encoder is: waveform in, one embedding a clip out.

Two commands need them: ``cat-audio embed`` computes the external embeddings that representation regularisation pulls
the student's CLS token towards, and ``cat-audio probe`` measures features. One file a family beside this one;
`cat.encoders.build` finds the one that is asked for.

Shapes: B clips, n samples, D embedding width.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# Of a clip, what goes to an encoder at once. The whole of a 10 h file took 9.8 GB.
WINDOW_SECONDS = 300


@runtime_checkable
class FrozenEncoder(Protocol):
    """What `embed` and `probe` ask of an encoder. Its parameters never change and it draws no random numbers: a clip's
    embedding depends on the clip alone, not on the clips beside it in the batch.

    An encoder may also have ``min_samples`` (at its sample rate): shorter clips are then refused when they are read. A
    clip that is longer than `WINDOW_SECONDS` comes in windows of equal length: as an iterable of arrays to the method
    ``of_stream(windows) -> (dim,)`` where there is one. An encoder without it embeds each, and what its method
    ``combine(rows (W, dim), lengths (W,))`` makes of theirs is the clip's embedding (dim,), or without such a method
    their mean, weighted by `lengths`. ``untrained_twin(seed)`` gives the same network with random weights.

    What else it may have: ``identity``, a text that is another one for other weights or settings
    (`cat.encoders.identity.identity_of` finds one out where it can); ``device``, where it computes; and ``threads``, of
    its own, which a copy of it in another process does not have.
    """

    name: str
    sample_rate: int
    dim: int

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform (B, n) float32 at `sample_rate`, clip b in its first ``lengths[b]`` samples -> (B, dim) float32."""
        ...


def weighted_mean(rows_WE: Tensor, lengths_W: Tensor) -> Tensor:
    """(dim,): the windows' mean, each with the weight of its samples."""
    weights_W1 = lengths_W.to(rows_WE)[:, None]
    return (rows_WE * weights_W1).sum(0) / weights_W1.sum()


def mean_direction(rows_WE: Tensor, lengths_W: Tensor) -> Tensor:
    """The same for embeddings of unit length, which the mean then has too."""
    return nn.functional.normalize(weighted_mean(rows_WE, lengths_W), dim=0)


def checked_lengths(waveform: Tensor, lengths: Tensor | None) -> Tensor:
    """Samples of each clip, (B,) int64 on the CPU."""
    if waveform.ndim != 2:
        raise ValueError(f"waveform must be (clips, samples), got shape {tuple(waveform.shape)}.")
    if lengths is None:
        return torch.full((waveform.shape[0],), waveform.shape[1], dtype=torch.int64)
    lengths_B = lengths.to("cpu", torch.int64)
    if lengths_B.shape != (waveform.shape[0],) or (lengths_B > waveform.shape[1]).any() or (lengths_B < 1).any():
        raise ValueError(
            f"lengths must hold one sample count in 1..{waveform.shape[1]} for each of the {waveform.shape[0]} clips, "
            f"got {lengths_B.tolist()}."
        )
    return lengths_B
