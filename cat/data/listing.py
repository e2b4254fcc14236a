"""Audio files as a command line names them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cat.data.clips import Clip
from cat.data.manifest import Manifest, load_manifest
from cat.data.shards.index import is_sharded
from cat.data.shards.members import Member, Members

MANIFESTS = (".jsonl", ".tsv", ".json")


def listed(names: Iterable[str | os.PathLike[str]]) -> Manifest:
    """The files that are meant: files, all in folders, in manifests and in shards; each once, in order, under the paths
    by which they were named. A file that is not there is listed: it is for whoever reads it to say so.

    Raises: `ManifestError` for folders and manifests that cannot be read.
    """
    paths: dict[str, None] = {}
    notes: list[str] = []
    parts: list[tuple[Members | None, int]] = []
    for name in names:
        before, members = len(paths), None
        if is_sharded(name) or Path(name).is_dir() or Path(name).suffix.lower() in MANIFESTS:
            manifest = load_manifest(name)
            notes += manifest.notes
            there = [str(manifest.path(index)) for index in range(len(manifest))]
            if manifest.members is not None:
                new = {path: index for index, path in reversed(list(enumerate(there))) if path not in paths}
                members = manifest.members.take(np.array([*reversed(new.values())], dtype=np.int64))
                there = [*reversed(new)]
            paths.update(dict.fromkeys(there))
        else:
            paths[str(Path(name))] = None
        parts.append((members, len(paths) - before))
    return Manifest([Clip(path) for path in paths], Path(), members=Members.joined(parts), notes=tuple(notes))


def listed_files(names: Iterable[str | os.PathLike[str]]) -> list[Path | Member]:
    """What is read of them."""
    manifest = listed(names)
    return [manifest.audio(index) for index in range(len(manifest))]
