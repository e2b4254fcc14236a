"""Which clips are kept, and what they are in the new manifest."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.clips import Clip, Clips
from cat.data.labels import clip_labels
from cat.data.manifest import Manifest
from cat.data.prepare.convert import Names

AUDIO = "audio"  # the folder of files that were written anew


@dataclass(frozen=True)
class Kept:
    """The new manifest; clips of every label in the order of classes; labels that no clip has any more."""

    manifest: Manifest
    counts: dict[str, int]
    lost: tuple[str, ...]


def same_content(records: np.ndarray, places: np.ndarray) -> list[list[int]]:
    """Places of files that have the same content, a list each time, in order."""
    _, inverse, counts = np.unique(records["content"][places], axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    several: dict[int, list[int]] = {}
    for at in np.flatnonzero(counts[inverse] > 1).tolist():
        several.setdefault(int(inverse[at]), []).append(int(places[at]))
    return sorted(several.values())


def described(manifest: Manifest, groups: list[list[int]]) -> list[dict[str, Any]]:
    """For people: the paths, and whether the labels are the same."""
    found = []
    for group in groups:
        labels = {frozenset(clip_labels(manifest.clips[place]) or ()) for place in group}
        found.append({"paths": [str(manifest.path(place)) for place in group], "same_labels": len(labels) == 1})
    return found


def kept_clips(
    manifest: Manifest, path: Path, records: np.ndarray, usable: np.ndarray, names: Names | None, sample_rate: int
) -> Kept:
    """The ``usable`` clips, with the samples that their files have; with ``names`` those of the files that were written
    at ``sample_rate`` beside the new manifest's ``path``."""
    before, after = Counter[str](), Counter[str]()

    def clips() -> Iterator[Clip]:
        for place, clip in enumerate(manifest.clips):
            labels = clip_labels(clip) or ()
            before.update(labels)
            if not usable[place]:
                continue
            after.update(labels)
            record = records[place]
            if names is None:
                samples, rate, name = int(record["samples"]), int(record["rate"]), clip.path
            else:
                samples, rate, name = int(record["heard"]), sample_rate, f"{AUDIO}/{names[place]}"
            yield dataclasses.replace(clip, path=name, samples=samples, sample_rate=rate, embedding=None)

    known = list(manifest.label_names)
    new = manifest.take(np.flatnonzero(usable)) if names is None else Manifest((), path.parent, extra=manifest.extra)
    new = dataclasses.replace(new, clips=Clips(clips()), source=path, notes=())
    order = [*known, *sorted(set(before).difference(known))]
    counts = {label: after[label] for label in order if after[label]}
    new = dataclasses.replace(new, label_names={label: manifest.label_names[label] for label in known if after[label]})
    return Kept(new, counts, tuple(label for label in order if before[label] and not after[label]))
