"""AudioSet (Gemmeke et al., 2017): the segments' lists, and of their audio what could still be downloaded.

The lists are Google's ``{balanced_train,unbalanced_train,eval}_segments.csv`` and ``class_labels_indices.csv``. Audio
may lie in any folders below; a file is known by the video's id in its name: ``YTID``, ``YYTID``, ``YTID_30``,
``YTID_30.000_40.000``, ``YTID_30000``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cat.data.clips import Clip
from cat.data.folder import find_clips
from cat.data.sets.prepare import DataSet, Listing
from cat.data.text import ManifestError, read_text

_STEM = re.compile(r"Y?([A-Za-z0-9_-]{11})((_\d+(\.\d+)?){0,2})")
_LISTS = {"train": ("balanced_train",), "test": ("eval",), "train2m": ("balanced_train", "unbalanced_train")}


def _read(folder: Path, marker: Path) -> Listing:
    names = class_names(marker)
    files, _ = find_videos(folder)
    clips: dict[str, list[Clip]] = {}
    missing: dict[str, list[str]] = {}
    for split, parts in _LISTS.items():
        tables = [marker.with_name(f"{part}_segments.csv") for part in parts]
        absent = next((table for table in tables if not table.is_file()), None)
        if absent is not None and split == "train2m":
            continue
        if absent is not None:
            raise ManifestError(f"{absent}: no such file; it belongs beside {marker.name}. Get it from {AUDIOSET.home}")
        clips[split], missing[split] = listed_clips(tables, names, files)
    return Listing(folder, clips, names, missing)


def listed_clips(
    tables: Iterable[Path], names: Mapping[str, str], files: Mapping[str, str]
) -> tuple[list[Clip], list[str]]:
    """The clips of some lists of segments that have a file, and what the others are called.

    Args:
        names: `class_names`.
        files: of `find_videos`.
    """
    clips: list[Clip] = []
    missing: list[str] = []
    for table in tables:
        for video, start, labels in _segments(table, names):
            path = files.get(video)
            if path is None:
                missing.append(f"{video} from {start} s")
            else:
                clips.append(Clip(path, labels=labels))
    return clips, missing


def find_videos(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Video -> its file below the folder; of several the first one. And notes on what is left out."""
    found: dict[str, str] = {}
    clips, notes = find_clips(folder)
    for path in clips.paths:
        stem = path.rpartition("/")[2].rpartition(".")[0]
        # An id of 11 letters may begin with the Y that others write in front of ids.
        match = _STEM.fullmatch(stem) if len(stem) != 11 else re.fullmatch("(.+)", stem)
        if match is not None:
            found.setdefault(match[1], path)
    return found, notes


def class_names(table: Path) -> dict[str, str]:
    """Label -> name, of ``class_labels_indices.csv``."""
    rows = csv.DictReader(read_text(table).splitlines())
    if not {"mid", "display_name"}.issubset(rows.fieldnames or ()):
        raise ManifestError(f"{table}: its columns are {rows.fieldnames}; expected index, mid, display_name")
    return {row["mid"]: row["display_name"] for row in rows}


def _segments(table: Path, names: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Video, its start in seconds, and its labels."""
    rows = csv.reader(read_text(table).splitlines(), skipinitialspace=True)
    for row in rows:
        if not row or row[0].startswith("#"):
            continue
        where = f"{table}:{rows.line_num}"
        if len(row) != 4:
            raise ManifestError(f"{where}: expected YTID, start_seconds, end_seconds, positive_labels; got {row}")
        labels = tuple(dict.fromkeys(row[3].split(",")))
        unknown = next((label for label in labels if label not in names), None)
        if unknown is not None:
            raise ManifestError(f"{where}: the label {unknown!r} is not in class_labels_indices.csv")
        yield row[0], row[1], labels


AUDIOSET = DataSet(
    name="audioset",
    title="AudioSet",
    licence="labels CC BY 4.0; the audio is its uploaders'",
    markers=("class_labels_indices.csv",),
    counts={"train": 22160, "test": 20371, "train2m": 2063949},
    read=_read,
    home="https://research.google.com/audioset/download.html",
    optional=frozenset({"train2m"}),
)
