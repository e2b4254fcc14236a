"""Audio files as a command line names them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cat.data.clips import Clip
from cat.data.manifest import Manifest, load_manifest

MANIFESTS = (".jsonl", ".tsv", ".json")


def listed(names: Iterable[str | os.PathLike[str]]) -> Manifest:
    """The files that are meant: files, all in folders, all in manifests; each once, in order, under the paths by which
    they were named. A file that is not there is listed: it is for whoever reads it to say so.

    Raises: `ManifestError` for folders and manifests that cannot be read.
    """
    paths: dict[str, None] = {}
    notes: list[str] = []
    for name in map(Path, names):
        if name.is_dir() or name.suffix.lower() in MANIFESTS:
            manifest = load_manifest(name)
            notes += manifest.notes
            paths.update((str(manifest.path(index)), None) for index in range(len(manifest)))
        else:
            paths[str(name)] = None
    return Manifest([Clip(path) for path in paths], Path(), notes=tuple(notes))


def listed_files(names: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Where they lie."""
    manifest = listed(names)
    return [manifest.path(index) for index in range(len(manifest))]
