"""The index of a sharded data set: one memory-mapped file that says of every clip where its bytes lie.

``FOLDER/shards.index`` has the clips as a manifest has them (`cat.data.clips`) with their shard, offset, size and
CRC-32, and in its header the names and sizes of the shards, which lie beside it or where ``location`` says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.clips import Clips
from cat.data.columns import ColumnsError
from cat.data.remote import RemoteFolder, is_url
from cat.data.shards.members import LocalShard, Members, Shard, Shards
from cat.data.text import ManifestError, shorten

INDEX = "shards.index"
FORMAT, VERSION = "cat-audio shards", 1
_MOST_HEADER = 100_000_000  # bytes; of a file that is none of ours they may say anything
COLUMNS = ("shard", "offset", "size", "crc")


@dataclass(frozen=True)
class Index:
    """``info``: what the header says, checked."""

    clips: Clips
    members: Members
    info: Mapping[str, Any]


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether a path or URL is to be opened by `open_index`."""
    return is_url(path) or Path(path).name == INDEX or os.path.isfile(os.path.join(path, INDEX))


def folder_of(path: str | os.PathLike[str]) -> str | Path:
    """The folder or URL of a sharded data set, which may be named by its index."""
    if is_url(path):
        return os.fspath(path).rstrip("/").removesuffix(f"/{INDEX}")
    return Path(path).parent if Path(path).name == INDEX else Path(path)


def write_index(
    folder: Path,
    clips: Clips,
    columns: Mapping[str, np.ndarray],
    shards: Sequence[tuple[str, int]],
    info: Mapping[str, Any],
) -> None:
    """``columns``: of `COLUMNS`, (n,) each; ``shards``: names and bytes. Whole or not at all."""
    header = {"format": FORMAT, "version": VERSION, "shards": [list(shard) for shard in shards], **info}
    clips.save(folder / INDEX, columns, header)


def open_index(place: str | os.PathLike[str]) -> Index:
    """Of a folder, an index itself, or a URL of a folder.

    Raises: `ManifestError` for an index that is damaged or not one; `cat.data.remote.RemoteError`.
    """
    folder = folder_of(place)
    remote = RemoteFolder(folder) if isinstance(folder, str) else None
    file = Path(folder, INDEX) if remote is None else remote.fetch(INDEX, _head_size)
    where = f"{folder}/{INDEX}"
    try:
        clips = Clips.open(file)
    except ColumnsError as error:
        raise ManifestError(f"{where}: {_about(str(error), file)}; make it again: cat-audio shards index") from None
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read: {error.strerror or error}") from None
    columns = clips.file
    info = {} if columns is None else columns.info
    if info.get("format") != FORMAT or info.get("version") != VERSION or columns is None:
        raise ManifestError(
            f"{where}: format {shorten(info.get('format'))} version {shorten(info.get('version'))}; this release reads "
            f"{FORMAT!r} version {VERSION}"
        )
    if remote is not None:
        remote = RemoteFolder(remote.url, columns.sha256)
    location = info.get("location")
    if location is not None:
        folder = location if is_url(location) else Path(folder, location)
        remote = RemoteFolder(location, columns.sha256) if isinstance(folder, str) else None
    shards: list[Shard] = [
        LocalShard(Path(folder, name)) if remote is None else remote.file(name, size) for name, size in info["shards"]
    ]
    members = Members(Shards(shards), **{name: columns[name] for name in COLUMNS})
    return Index(clips, members, info)


def _head_size(first: bytes) -> int:
    """Of a file that begins with these eight bytes: how many tell it from any other, for they have its SHA-256."""
    return min(8 + int.from_bytes(first, "little"), _MOST_HEADER)


def _about(text: str, file: Path) -> str:
    return text.removeprefix(f"{file}: ")
