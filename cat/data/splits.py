"""Training clips parted from those that a model is chosen by or tested on."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from typing import Any

import numpy as np

from cat.data.labels import Labels
from cat.data.manifest import Manifest
from cat.data.randomness import Purpose, generator
from cat.data.text import ManifestError, shorten


def hold_out(
    manifest: Manifest, labels: Labels, share: float, seed: int, *, group_by: str | None = None
) -> tuple[Manifest, Manifest]:
    """``share`` of the clips held out: the rest, and them, both in the manifest's order.

    Stratified: ``share`` of every class is held out, at least one clip, and at least one stays. What belongs together
    stays together: clips that are the same file by whatever name or link, and with ``group_by`` clips that share the
    value of that field of the manifest, such as "speaker".

    scikit-learn's splitters do not do this: its stratified ones take one label a clip, and may give a small class no
    clip on one side; the one for groups takes no share.

    Raises ManifestError when no clip can be held out, and for clips without the field ``group_by``.
    """
    groups = _Groups(manifest, labels, group_by)
    held = np.zeros(groups.count, dtype=bool)
    order = generator(seed, Purpose.HOLD_OUT).permutation(groups.count)
    for column in np.argsort(groups.clips.sum(axis=0), kind="stable"):  # a rare class first: it has the least choice
        ...
