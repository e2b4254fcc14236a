"""Training clips parted from those that a model is chosen by or tested on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
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

    Stratified: ``share`` of every class is held out, at least one of its clips, and at least one stays. What belongs
    together stays together: clips that are the same file by whatever name or link, and with ``group_by`` clips that
    have the same value in that field of the manifest, such as "speaker". Then the share is only nearly met. A class
    that has nothing to part stays in the rest; the held-out manifest's notes say so.

    scikit-learn's splitters do not fit: the stratified ones take one label a clip and may give a small class nothing on
    one side, and the one that knows groups takes no share.

    Raises ManifestError when nothing can be held out, and for clips without the field ``group_by``.
    """
    groups = _groups(manifest, group_by)
    clips, columns = labels.entries(manifest)
    # Clips that have none of the classes are a class here.
    none = np.setdiff1d(np.arange(len(manifest)), clips)
    clips, columns = np.append(clips, none), np.append(columns, np.full(len(none), len(labels.classes)))
    held = _stratified(groups[clips], columns, share, seed)
    apart = held[groups]
    if not apart.any():
        what = "clip" if group_by is None else f"{group_by!r}"
        raise ManifestError(
            f"{manifest.name}: nothing can be held out, because no class has a second {what} that could stay; give "
            "clips to choose the model by (data.valid)"
        )
    rest, valid = manifest.take(np.flatnonzero(~apart)), manifest.take(np.flatnonzero(apart))
    missing = [label for label, count in zip(labels.classes, labels.counts(valid), strict=True) if count == 0]
    notes = [f"{len(valid)} of {len(manifest)} clips of {manifest.name} are held out to choose the model by"]
    if missing:
        notes.append(f"none of them is of the classes {', '.join(missing)}, which have too few clips to part")
    return rest, dataclasses.replace(valid, notes=tuple(notes))


def fold_split(manifest: Manifest, fold: int) -> tuple[Manifest, Manifest]:
    """The clips of all other folds, and those of this one: the training and the test split.

    Raises ManifestError as `folds`, and for a fold that does not exist.
    """
    number = folds(manifest)
    if not (number == fold).any():
        there = ", ".join(map(str, np.unique(number).tolist()))
        raise ManifestError(f"{manifest.name}: there is no fold {fold}; its folds are {there}")
    return manifest.take(np.flatnonzero(number != fold)), manifest.take(np.flatnonzero(number == fold))


def folds(manifest: Manifest) -> np.ndarray:
    """(n,) int64: every clip's fold, the field "fold" of its manifest.

    Raises ManifestError for a clip without one, for a single fold, and for a file that is in two.
    """
    values = _field(manifest, "fold")
    wrong = next((i for i, value in enumerate(values) if type(value) is not int), None)
    if wrong is not None:
        raise ManifestError(
            f'{manifest.name}: the "fold" of {manifest.clips[wrong].path} is {shorten(values[wrong])}; expected a '
            "whole number"
        )
    number = np.array(values, dtype=np.int64)
    if (number == number[0]).all():
        raise ManifestError(f"{manifest.name}: all clips are in fold {number[0]}; expected two folds or more")
    files = _files(manifest)
    first = np.zeros(files.max() + 1, dtype=np.int64)
    first[files] = number
    twice = np.flatnonzero(first[files] != number)
    if len(twice):
        raise ManifestError(
            f"{manifest.name}: {manifest.clips[int(twice[0])].path} is the same file as a clip of another fold; keep "
            "one of them"
        )
    return number


def _stratified(units: np.ndarray, columns: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which units are held out, (units,) bool. Entry i says that a clip of unit ``units[i]`` has class ``columns[i]``.

    Classes take their turns, the rarest first, because it has the least choice (Sechidis, Tsoumakas and Vlahavas, "On
    the stratification of multi-label data", 2011); each takes units of its own in random order until it has its share.
    """
    count = int(units.max()) + 1
    total = np.bincount(columns)
    keys, clips_of_pair = np.unique(units * len(total) + columns, return_counts=True)
    unit_of_pair, class_of_pair = np.divmod(keys, len(total))
    begins = np.searchsorted(unit_of_pair, np.arange(count + 1))  # a unit's pairs follow each other
    wanted = np.minimum(np.maximum(np.rint(share * total), 1), total - 1)
    have, left = np.zeros(len(total)), np.bincount(class_of_pair, minlength=len(total))  # clips held; units that stay
    rank = generator(seed, Purpose.HOLD_OUT).permutation(count)
    in_turn = np.lexsort((rank[unit_of_pair], class_of_pair))  # pairs by class, then at random
    edges = np.searchsorted(class_of_pair[in_turn], np.arange(len(total) + 1))
    held = np.zeros(count, dtype=bool)
    for column in np.argsort(total, kind="stable").tolist():
        mine = in_turn[edges[column] : edges[column + 1]].tolist()
        for sparing in (True, False):  # first only units of which no class has its share already
            for pair in mine:
                if have[column] >= wanted[column]:
                    break
                unit = unit_of_pair[pair]
                own = slice(begins[unit], begins[unit + 1])
                classes = class_of_pair[own]
                nearer = have[column] == 0 or have[column] + clips_of_pair[pair] / 2 <= wanted[column]
                last = (left[classes] == 1).any()
                if held[unit] or last or not nearer or (sparing and (have[classes] >= wanted[classes]).any()):
                    continue
                held[unit] = True
                have[classes] += clips_of_pair[own]
                left[classes] -= 1
    return held


def _groups(manifest: Manifest, field: str | None) -> np.ndarray:
    """(n,) numbers: clips that have the same belong together."""
    files = _files(manifest)
    if field is None:
        return files
    values = _numbered([json.dumps(value, sort_keys=True) for value in _field(manifest, field)])
    # Two groups that have a file in common are one: every clip takes the least number among its file's and its value's
    # until none changes.
    groups = values
    while True:
        merged = _least(_least(groups, files), values)
        if (merged == groups).all():
            return _numbered(groups.tolist())
        groups = merged


def _least(numbers: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The least number among clips that have the same value in ``of``."""
    least = np.full(int(of.max()) + 1, len(numbers))
    np.minimum.at(least, of, numbers)
    return least[of]


def shared_files(train: Manifest, other: Manifest) -> list[int]:
    """Places in ``other`` of the clips whose files ``train`` has too, under whatever name or link."""
    known = set(_identities(train))
    return [index for index, file in enumerate(_identities(other)) if file in known]


def _files(manifest: Manifest) -> np.ndarray:
    """(n,) numbers: clips that are one file have the same."""
    return _numbered(_identities(manifest))


def _identities(manifest: Manifest) -> list[Hashable]:
    """What is equal where two paths lead to one file."""

    root = os.path.join(manifest.root, "")

    def identity(path: str) -> Hashable:
        path = path if path.startswith("/") else root + path
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # it will be recorded as a clip that cannot be read
            return os.path.abspath(path)
        return status.st_dev, status.st_ino

    paths = iter(manifest.columns.paths)
    begun = time.monotonic()
    found = [identity(path) for path in itertools.islice(paths, _TRIED)]
    if time.monotonic() - begun < _TRIED * _SLOW:
        return found + [identity(path) for path in paths]
    with ThreadPoolExecutor(32) as waiting:
        while piece := list(itertools.islice(paths, 1 << 16)):
            found += waiting.map(identity, piece, chunksize=64)
    return found


# A disk of this machine answers in 2 us, one of another machine in 300 us or more: two million clips, ten minutes. Many
# can be asked for at once, which would slow down the former.
_SLOW = 50e-6  # seconds
_TRIED = 256


def _field(manifest: Manifest, name: str) -> list[Any]:
    """Every clip's value of a field of the manifest's own."""
    values = [clip.extra.get(name) for clip in manifest.clips]
    if None in values:
        first = manifest.clips[values.index(None)].path
        missing = values.count(None)
        raise ManifestError(
            f'{manifest.name}: {missing} of {len(values)} clips have no field "{name}", the first {first}; every '
            "clip needs one"
        )
    return values


def _numbered(values: Sequence[Hashable]) -> np.ndarray:
    """The values as numbers from 0 on, in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
