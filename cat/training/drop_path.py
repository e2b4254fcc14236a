"""Drop path: in training, branches of blocks are left out, clip by clip (Huang et al., arXiv 1603.09382)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cat.data.randomness import Purpose, generator


def drop_path_factors(rate: float, depth: int, clips: int, *, seed: int, step: int, frozen: int = 0) -> Tensor:
    """(clips, depth, 2) float32, `Encoder.forward`'s ``keep``: 0, or 1 / (1 - p), where p rises from 0 at the first
    block to ``rate`` at the last. The lowest ``frozen`` blocks keep all. A function of (seed, step)."""
    rates_N = np.linspace(0.0, rate, depth)
    rates_N[:frozen] = 0.0
    uniform_BN2 = generator(seed, Purpose.DROP_PATH, step).random((clips, depth, 2))
    kept_BN2 = (uniform_BN2 >= rates_N[:, None]) / (1.0 - rates_N[:, None])
    return torch.from_numpy(kept_BN2.astype(np.float32))
