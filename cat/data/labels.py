"""What clips are taught to be: the classes in order, and the targets of clips and of their frames.

A clip's labels are its own and those of its events. A clip without any is left out, with a note, unless its manifest
says ``"labels": []`` or ``"events": []`` and a clip may have several: then it is one that has none of the classes.
"""

# Shapes: n clips, B clips of a batch, H rows of patches, C classes.

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cat.data.clips import Clip
from cat.data.folder import AUDIO_SUFFIXES, is_hidden
from cat.data.manifest import Manifest
from cat.data.text import ManifestError, label_text, shorten

KINDS = ("single-label", "multi-label", "events")
TASKS = ("auto", *KINDS)

_PIECE = 1 << 16  # clips that are looked at at a time

Interval = tuple[float, float, str]  # onset, offset (seconds), label


@dataclass(frozen=True)
class Labels:
    """The classes of a task, in the order of the classifier's outputs.

    ``kind``: "single-label" (one class a clip), "multi-label" (any of them), "events" (any, from when to when).
    """

    kind: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]  # for people

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not self.classes or len(self.class_names) != len(self.classes):
            raise ValueError(
                f"{len(self.classes)} classes and {len(self.class_names)} class names; expected at least one class, "
                "and a name for each"
            )
        if len(self.column) < len(self.classes):
            twice = next(label for label in self.classes if self.classes.count(label) > 1)
            raise ValueError(f"the class {twice!r} is listed twice; remove one")

    @cached_property
    def column(self) -> dict[str, int]:
        """Label -> its number among the classes."""
        return {label: number for number, label in enumerate(self.classes)}

    def select(self, manifest: Manifest) -> Manifest:
        """The clips that can be trained on or scored, all of them labelled, with a note on those left out.

        Raises ManifestError for labels that are none of the classes, for several of one clip of a single-label task,
        and when no clip is left.
        """
        table = _Table(manifest)
        self._check_known(manifest, table)
        if self.kind == "single-label":
            _check_one_label(manifest, table)
        kept = table.counts > 0 if self.kind == "single-label" else table.known
        if not kept.any():
            raise _unlabelled(manifest)
        if kept.all():
            return manifest
        first = manifest.columns.paths[int(np.argmin(kept))]
        note = f"{manifest.name}: {len(kept) - int(kept.sum())} clips left out, without a label; the first: {first}"
        selected = manifest.take(np.flatnonzero(kept))
        return dataclasses.replace(selected, notes=(*manifest.notes, note))

    def entries(self, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
        """(m,) a clip, and (m,) a class that it has, for every label of every clip."""
        table = _Table(manifest)
        column = np.array([self.column[label] for label in table.labels], dtype=np.int64)
        return table.clips, column[table.ids]

    def counts(self, manifest: Manifest) -> np.ndarray:
        """(C,) int64: clips of every class."""
        return np.bincount(self.entries(manifest)[1], minlength=len(self.classes))

    def fingerprint(self, manifest: Manifest) -> str:
        """SHA-256 of what the clips are taught to be."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for piece in _taught(manifest):
            digest.update(piece)
        return digest.hexdigest()

    def targets(self, manifest: Manifest, indices: Iterable[int]) -> Tensor:
        """(n, C) float32: 1 for every label of the clip."""
        rows = [clip_labels(manifest.clips[index]) or () for index in indices]
        targets = torch.zeros(len(rows), len(self.classes))
        for row, labels in zip(targets, rows, strict=True):
            row[[self.column[label] for label in labels]] = 1
        return targets

    def frame_targets(self, intervals: Iterable[Interval], rows: int, row_seconds: float) -> Tensor:
        """(H, C) float32: 1 in every row of patches that is half covered by an event of the class or more; one that
        covers no half is in the row of its middle."""
        targets = torch.zeros(rows, len(self.classes))
        for onset, offset, label in intervals:
            first, end = round(onset / row_seconds), round(offset / row_seconds)
            if first == end:
                first = int((onset + offset) / 2 / row_seconds)
                end = first + 1
            targets[min(first, rows - 1) : end, self.column[label]] = 1
        return targets

    def _check_known(self, manifest: Manifest, table: _Table) -> None:
        unknown = [number for number, label in enumerate(table.labels) if label not in self.column]
        if not unknown:
            return
        clips = np.bincount(table.ids, minlength=len(table.labels))
        some = ", ".join(f"{shorten(table.labels[i])} ({_clips(clips[i])})" for i in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        affected = len(np.unique(table.clips[np.isin(table.ids, unknown)]))
        raise ManifestError(
            f"{manifest.name}: {_clips(affected)} with labels that are none of the {len(self.classes)} classes: "
            f"{some}{more}; the classes are {_some(self.classes)}. Mend the labels, remove the clips, or train on data "
            "that has them"
        )


def labels_of(manifest: Manifest, task: str = "auto", classes: Sequence[str] | None = None) -> Labels:
    """The classes of a training set, and what kind of task they make.

    Args:
        task: "single-label", "multi-label" or "events"; "auto" is "events" if some clip has events (the manifest's
            field), "multi-label" if some clip has several labels or says that it has none, else "single-label".
        classes: the classes in order; None takes those of the manifest, in the order of its ``label_names``, else
            sorted.

    Raises ManifestError for a manifest without labels, a class without clips, a single class where a clip has to have
    one, labels that are none of the given classes, and several labels of a clip in a single-label task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
    table = _Table(manifest)
    if not table.labels:
        raise _unlabelled(manifest)
    kind = _kind(table) if task == "auto" else task
    if classes is None:
        present = set(table.labels)
        named = list(manifest.label_names)
        ordered = (*named, *sorted(present.difference(named)))
        _check_folders(manifest)
    else:
        ordered = tuple(label_text(label, "the list of classes") for label in classes)
    labels = Labels(kind, ordered, tuple(manifest.label_names.get(label, label) for label in ordered))
    labels._check_known(manifest, table)
    if kind == "single-label":
        _check_one_label(manifest, table)
    empty = [label for label in ordered if label not in set(table.labels)]
    if empty:
        listed = "the label_names in its first line" if classes is None else "the list of classes"
        raise ManifestError(
            f"{manifest.name}: {len(empty)} of {len(ordered)} classes have no clip: {_some(empty)}; give them clips, "
            f"or remove them from {listed}"
        )
    if len(ordered) < 2 and (kind == "single-label" or bool((table.counts[table.known] > 0).all())):
        raise ManifestError(
            f"{manifest.name}: a single class, {ordered[0]!r}; there is nothing to tell it from. Add clips of "
            'another class, or, for a task with several labels a clip, clips that have none: "labels": []'
        )
    return labels


def balancing_weights(manifest: Manifest) -> np.ndarray:
    """(n,) float64: of each clip to be drawn, the sum over its labels of 1000 / (n_c + 0.01), where n_c clips have the
    label (the released AS-2M recipe); 0 for a clip without any.

    Raises ManifestError where no clip has one.
    """
    table = _Table(manifest)
    if not len(table.ids):
        raise _unlabelled(manifest)
    per_class = class_weights(np.bincount(table.ids, minlength=len(table.labels)))
    return np.bincount(table.clips, weights=per_class[table.ids], minlength=len(manifest))


def class_weights(counts: np.ndarray) -> np.ndarray:
    """(C,) float64: 1000 / (n_c + 0.01), where n_c clips have the label."""
    return 1000 / (counts + 0.01)


def clip_labels(clip: Clip) -> tuple[str, ...] | None:
    """A clip's labels and those of its events, each once; () when it is said to have none, None when nobody knows."""
    events = clip.extra.get("events")
    labels = tuple(dict.fromkeys([*clip.labels, *(event["label"] for event in events or ())]))
    return labels if labels or clip.negative or events is not None else None


def intervals_of(clip: Clip) -> list[Interval] | None:
    """A clip's events; None when it has no strong labels. A clip that is said to have no labels has no events."""
    events = clip.extra.get("events")
    if events is None:
        return [] if clip.negative else None
    return [(event["onset"], event["offset"], event["label"]) for event in events]


def moved(intervals: Iterable[Interval], *, start: float, length: float, roll: float = 0.0) -> list[Interval]:
    """Events after their clip was cut from ``start`` on to a ``length`` and then rolled; all in seconds. An event that
    is rolled over the end is two."""
    found: list[Interval] = []
    for onset, offset, label in intervals:
        first, end = max(onset - start, 0.0), min(offset - start, length)
        if first >= end:
            continue
        by = roll % length
        first, end = first + by, end + by
        found += [(max(a, 0.0), min(b, length), label) for a, b in ((first, end), (first - length, end - length))]
    return [(first, end, label) for first, end, label in found if first < end]


def _taught(manifest: Manifest) -> Iterator[bytes]:
    """The labels and events of one clip after the other, written out."""

    def taught(clip: Clip) -> bytes:
        return repr((clip_labels(clip), intervals_of(clip))).encode()

    if manifest.columns.mention("events"):
        yield from map(taught, manifest.clips)
        return
    # Eight times faster: the same few labels are not written out again.
    ids, ends, negative = manifest.columns.label_table
    names = manifest.columns.labels
    known: dict[bytes, bytes] = {}
    for first in range(0, len(manifest), _PIECE):
        bounds, none = 8 * ends[first : first + _PIECE + 1], negative[first : first + _PIECE].tolist()
        content = ids[bounds[0] // 8 : bounds[-1] // 8].tobytes()
        places = (bounds - bounds[0]).tolist()
        if len(known) > _PIECE:
            known.clear()
        piece = []
        for place, is_negative in enumerate(none):
            key = content[places[place] : places[place + 1]] or bytes([is_negative])
            if key not in known:
                labels = tuple([names[i] for i in ids[ends[first + place] : ends[first + place + 1]]])
                known[key] = taught(Clip("", labels=labels, negative=bool(is_negative)))
            piece.append(known[key])
        yield b"".join(piece)


class _Table:
    """The labels of all clips, as arrays: what is asked of millions of clips is asked once."""

    def __init__(self, manifest: Manifest) -> None:
        ids, ends, negative = manifest.columns.label_table
        self.labels: Sequence[str] = manifest.columns.labels
        self.clips = np.repeat(np.arange(len(negative)), np.diff(ends))  # (m,) the clip of every entry
        self.ids, self.known, self.strong = ids, negative, False  # (m,) its label; (n,) see `clip_labels`
        if manifest.columns.mention("events"):
            self._with_events(manifest)
        self.counts = np.bincount(self.clips, minlength=len(self.known))  # (n,) labels a clip
        self.known = self.known | (self.counts > 0)

    def _with_events(self, manifest: Manifest) -> None:
        numbers: dict[str, int] = {}
        clips, ids = [], []
        for index, clip in enumerate(manifest.clips):
            labels = clip_labels(clip)
            self.known[index] = labels is not None
            self.strong |= "events" in clip.extra
            for label in labels or ():
                clips.append(index)
                ids.append(numbers.setdefault(label, len(numbers)))
        self.labels = tuple(numbers)
        self.clips, self.ids = np.array(clips, dtype=np.int64), np.array(ids, dtype=np.int64)


def _kind(table: _Table) -> str:
    if table.strong:
        return "events"
    several = bool((table.counts > 1).any()) or bool((table.known & (table.counts == 0)).any())
    return "multi-label" if several else "single-label"


def _check_one_label(manifest: Manifest, table: _Table) -> None:
    several = np.flatnonzero(table.counts > 1)
    if len(several):
        first = manifest.clips[int(several[0])]
        raise ManifestError(
            f"{manifest.name}: {_clips(len(several))} with several labels in a single-label task, the first "
            f"{first.path}: {_some(clip_labels(first) or ())}; leave one label a clip, or set task=multi-label"
        )


def _check_folders(manifest: Manifest) -> None:
    """A folder of folders: one that has no clips was meant to be a class."""
    if manifest.source is None or manifest.source != manifest.root or manifest.members is not None:
        return
    classes = {path.partition("/")[0] for path in manifest.columns.paths if "/" in path}
    folders = sorted(entry.name for entry in manifest.source.iterdir() if entry.is_dir() and not entry.is_symlink())
    empty = [name for name in folders if name not in classes and not is_hidden(name)]
    if empty:
        raise ManifestError(
            f"{manifest.source}: {len(empty)} of its folders have no clips, and a folder is a class: {_some(empty)}; "
            f"put audio ({', '.join(AUDIO_SUFFIXES[:6])}, ...) into them, or remove them"
        )


def _unlabelled(manifest: Manifest) -> ManifestError:
    return ManifestError(
        f'{manifest.name}: none of its {len(manifest)} clips has a label; give them a field "labels", or put them '
        "into a folder a class"
    )


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _some(labels: Sequence[str], most: int = 8) -> str:
    more = f", and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + more
