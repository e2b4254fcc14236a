"""Spectrograms with what the student sees of them."""

from __future__ import annotations

import numpy as np

from cat.figures.spectrograms import trailing_padding, visible_grid


def test_visible_grid():
    seen = visible_grid(np.array([0, 5]), frames=12, bins=8, patch_size=4)  # 3 x 2 patches, h * 2 + w
    assert seen.shape == (12, 8)
    assert seen.sum() == 2 * 16
    assert seen[:4, :4].all()
    assert seen[8:, 4:].all()


def test_trailing_padding():
    spec = np.random.default_rng(0).normal(size=(10, 4))
    assert trailing_padding(spec) == 0
    spec[7:] = 0.467
    assert trailing_padding(spec) == 3
