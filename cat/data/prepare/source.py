"""What is to be prepared: a folder, a manifest, shards, or AudioSet's lists with a folder of their audio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cat.data.manifest import Manifest, load_manifest
from cat.data.sets.audioset import AUDIOSET, class_names, find_videos, listed_clips
from cat.data.text import ManifestError

_CLASSES = "class_labels_indices.csv"


@dataclass(frozen=True)
class Source:
    """The clips, and what a list names that there is no file of.

    ``missing``, ``reason``: what these are called, and what is said of them. ``searched``: the folder in which all
    audio files are clips, if there is one.
    """

    manifest: Manifest
    name: str  # for people
    missing: Sequence[str] = field(default=())
    reason: str = ""
    searched: Path | None = None


def read_source(names: Sequence[str | os.PathLike[str]], audio: Path | None = None) -> Source:
    """A folder of audio, a manifest, shards, or one or more ``*_segments.csv``; of these, ``audio`` is the folder that
    the videos' files are searched in (None: where the first list lies), and ``class_labels_indices.csv`` lies beside
    it.

    Raises: `ManifestError`.
    """
    lists = [Path(name) for name in names if Path(name).suffix.lower() == ".csv"]
    if lists and len(lists) == len(names):
        return _audioset(lists, audio)
    if len(names) != 1 or audio is not None:
        given = ", ".join(map(str, names)) or "nothing"
        raise ManifestError(
            f"given are {given}{'' if audio is None else f' and --audio {audio}'}; expected one folder of audio, one "
            "manifest, or one or more of AudioSet's *_segments.csv, to which --audio belongs"
        )
    manifest = load_manifest(names[0])
    return Source(manifest, str(names[0]), searched=manifest.root if manifest.source == manifest.root else None)


def _audioset(tables: Sequence[Path], audio: Path | None) -> Source:
    folder = tables[0].parent if audio is None else audio
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder; give the one with AudioSet's audio (--audio)")
    for table in (*tables, tables[0].with_name(_CLASSES)):
        if not table.is_file():
            raise ManifestError(f"{table}: no such file; AudioSet's lists and {_CLASSES} are at {AUDIOSET.home}")
    names = class_names(tables[0].with_name(_CLASSES))
    files, notes = find_videos(folder)
    clips, missing = listed_clips(tables, names, files)
    listed = ", ".join(map(str, tables))
    if not clips:
        raise ManifestError(
            f"{folder}: no file of the {len(missing)} videos in {listed}; a file is known by the video's id in its "
            "name, as in YTID.wav or YTID_30.000.flac. Give the folder that has them (--audio)"
            + "".join(f"; {note}" for note in notes)
        )
    extra = {"dataset": AUDIOSET.name, "licence": AUDIOSET.licence}
    manifest = Manifest(clips, folder, label_names=names, source=tables[0], extra=extra, notes=notes)
    return Source(manifest, listed, missing, f"no file of this video (looked in {folder})", folder)
