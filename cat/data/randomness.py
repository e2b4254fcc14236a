"""Random numbers by counters: a draw is a function of (seed, purpose, epoch or step, clip), not of earlier draws."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for. One's numbers do not depend on whether another is used."""

    PERMUTATION = 1
    WAVEFORM = 2  # crop, roll and gain
    WEIGHTED = 3
    MIXUP = 4
    SPEC_MASKS = 5
    NOISE = 6
    FRAME_ROLL = 7
    HOLD_OUT = 8
    DROP_PATH = 9
    SHARDS = 10  # their order
    WINDOW = 11  # the clips of some shards


def generator(seed: int, purpose: Purpose, epoch: int = 0, clip: int = 0) -> np.random.Generator:
    """A stream of its own for every (seed, purpose, epoch, clip): they are Philox's key and the upper counter words."""
    mask = (1 << 64) - 1
    return np.random.Generator(np.random.Philox(key=[seed & mask, int(purpose)], counter=[0, clip, epoch, 0]))
