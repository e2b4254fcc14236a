"""An index of tar files that are there: of shards of the WebDataset format that others wrote, or of our own.

Neighbours in a tar file whose names are the same up to the first dot are one sample: its audio, its JSON, other files
that are left alone. Of our own shards the index comes out as it was, but for what only the whole data set has: names
of labels, embeddings.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from cat.data.audio import AudioError, length_of
from cat.data.clips import CLIP_FIELDS, Clip, Clips
from cat.data.content import Held
from cat.data.folder import AUDIO_SUFFIXES
from cat.data.remote import RemoteFolder, is_url, names_below, size_of_remote
from cat.data.shards.index import INDEX, write_index
from cat.data.shards.members import LocalShard
from cat.data.text import ManifestError, event_list, label_list, parse_json, shorten
from cat.data.workers import prefetched
from cat.outputs import Output, claim
from cat.progress import track

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass
class _Found:
    """In one shard."""

    size: int = 0
    clips: list[Clip] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)  # offset, size, CRC-32
    failures: list[tuple[str, str]] = field(default_factory=list)
    left_out: int = 0  # samples without audio


def index_shards(
    place: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    labels: str = "labels",
    jobs: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[int, list[tuple[str, str]], list[str]]:
    """Writes ``out/shards.index`` of the tar files in a folder, or behind a URL, in the order of their names; ``out``
    is the folder itself where it is one of this machine. Every byte is read once.

    ``labels``: the field of a sample's JSON that has its labels, ``a.b`` for one in another; without it the file
    ``.cls`` of the sample counts. Returns the number of clips, what could not be read, and notes.

    Raises: `ManifestError` for a tar file that is cut off, compressed or none, and where no clip is found;
    `cat.outputs.OutputError` for an index that is not to be replaced; `cat.data.remote.RemoteError`; OSError.
    """
    if out is None and is_url(place):
        raise ManifestError(f"{place} is not on this machine; say where its index is to be written (-o FOLDER)")
    shards = _shards(place)
    folder = Path(place if out is None else out)
    claim([Output(folder / INDEX, lambda path: False, "another -o")], overwrite=overwrite)
    made = prefetched(
        _Reader(shards, labels), range(len(shards)), num_workers=min(jobs, len(shards)) if jobs > 1 else 0
    )
    rows_of, sizes, failures, left_out = [np.zeros((0, 3), np.int64)], list[int](), list[tuple[str, str]](), 0

    def clips() -> Iterator[Clip]:
        """One shard's at a time: of two million clips the objects would take a GB."""
        nonlocal left_out
        for found in track(made, len(shards), label="index", unit="shards", enabled=progress):
            rows_of.append(np.array(found.rows, dtype=np.int64).reshape(-1, 3))
            sizes.append(found.size)
            failures.extend(found.failures)
            left_out += found.left_out
            yield from found.clips

    all_clips = Clips(clips())
    rows = np.concatenate(rows_of)
    if not len(rows):
        first = f"; the first that failed: {': '.join(failures[0])}" if failures else ""
        raise ManifestError(f"{place}: no audio in its {len(shards)} tar files{first}")
    info: dict[str, Any] = {"failures": failures}
    if is_url(place):
        info["location"] = os.fspath(place).rstrip("/")
    elif folder.resolve() != Path(place).resolve():
        info["location"] = os.path.relpath(Path(place).resolve(), folder.resolve())
    columns = {
        "shard": np.repeat(np.arange(len(shards), dtype="<i4"), [len(one) for one in rows_of[1:]]),
        "offset": rows[:, 0].astype("<i8"),
        "size": rows[:, 1].astype("<i8"),
        "crc": rows[:, 2].astype("<u4"),
    }
    write_index(folder, all_clips, columns, [(name, size) for (name, _), size in zip(shards, sizes, strict=True)], info)
    kinds = ", ".join(AUDIO_SUFFIXES[:6])
    notes = [f"{left_out} samples without audio ({kinds}, ...) were left out"] if left_out else []
    return len(rows), failures, notes


def _shards(place: str | os.PathLike[str]) -> list[tuple[str, Any]]:
    if is_url(place):
        remote = RemoteFolder(os.fspath(place).rstrip("/"), "to be indexed")
        names = [name for name in names_below(remote.url) if name.endswith(".tar")]
        found: list[tuple[str, Any]] = [
            (name, remote.file(name, size_of_remote(f"{remote.url}/{name}"))) for name in sorted(names)
        ]
    else:
        found = [(path.name, LocalShard(path)) for path in sorted(Path(place).glob("*.tar"))]
    if not found:
        raise ManifestError(f"{place}: no tar files in it (NAME.tar); expected a folder of shards")
    return found


class _Reader:
    """Item ``number`` is what that shard holds."""

    def __init__(self, shards: Sequence[tuple[str, Any]], labels: str) -> None:
        self._shards, self._labels = shards, labels

    def __getitem__(self, number: int) -> _Found:
        name, shard = self._shards[number]
        found = _Found()
        with open(shard.open(), "rb") as file:
            found.size = os.fstat(file.fileno()).st_size
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for key, sample in itertools.groupby(_files(tar), key=lambda member: _split(member.name)[0]):
                        self._take(found, name, key, file, [*sample])
                    _check_end(file, tar)
            except tarfile.TarError as error:
                raise ManifestError(f"{shard}: {_reason(file, error)}") from None
        return found

    def _take(self, found: _Found, shard: str, key: str, file: IO[bytes], sample: list[tarfile.TarInfo]) -> None:
        parts = {_split(member.name)[1]: member for member in sample}
        told = self._told(f"{shard}/{key}", parts, file)
        audio = next((member for end, member in parts.items() if f".{end}".endswith(AUDIO_SUFFIXES)), None)
        if audio is None:
            found.left_out += 1
            return
        content = _content(file, audio)
        path = told.pop("path", None)
        name = path if isinstance(path, str) and path else f"{shard}/{audio.name}"
        try:
            samples, rate = length_of(Held(name, content))
        except AudioError as error:
            found.failures.append((f"{shard}/{audio.name}", error.reason))
            return
        found.rows.append((audio.offset_data, len(content), zlib.crc32(content)))
        negative = told.pop("negative")
        found.clips.append(Clip(name, samples, rate, told.pop("labels"), None, told, negative))

    def _told(self, where: str, parts: dict[str, tarfile.TarInfo], file: IO[bytes]) -> dict[str, Any]:
        """What a sample's JSON says, with ``labels`` and ``negative``."""
        told: dict[str, Any] = {}
        if "json" in parts:
            content = _content(file, parts["json"])
            try:
                told = parse_json(content.decode("utf-8"), Path(f"{where}.json"))
            except UnicodeDecodeError:
                raise ManifestError(f"{where}.json: not UTF-8 text") from None
            if not isinstance(told, dict):
                raise ManifestError(f"{where}.json: expected an object, got {shorten(told)}")
        labels: Any = told
        for part in self._labels.split("."):
            labels = labels.get(part) if isinstance(labels, dict) else None
        if labels is None and "cls" in parts:
            labels = _content(file, parts["cls"]).decode("utf-8", "replace").strip()
        if isinstance(labels, str | int) and not isinstance(labels, bool):
            labels = [str(labels)]
        told = {name: value for name, value in told.items() if name == "path" or name not in CLIP_FIELDS}
        if told.get("events") is not None:
            told["events"] = event_list(told["events"], f"{where}.json")
        return {**told, "labels": label_list(labels, f"{where}.json"), "negative": labels == []}


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps all of them
        if member.isreg() and not member.issparse():
            yield member


def _split(name: str) -> tuple[str, str]:
    """Key and ending, as WebDataset has them: ``a/b.c.d`` -> ``a/b``, ``c.d``."""
    folder, base = posixpath.split(name)
    key, _, ending = base.partition(".")
    return posixpath.join(folder, key), ending.lower()


def _content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    content = os.pread(file.fileno(), member.size, member.offset_data)
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _check_end(file: IO[bytes], tar: tarfile.TarFile) -> None:
    """tarfile takes a file that ends between two members for a whole one."""
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")


def _reason(file: IO[bytes], error: Exception) -> str:
    kind = _COMPRESSED.get(os.pread(file.fileno(), 2, 0))
    if kind is not None:
        return f"compressed by {kind}, where no clip can be read alone; unpack it, and pack it again without"
    if "end of data" in str(error):
        return "cut off: it ends before its last file does, or without the empty block that ends a tar file"
    return f"no tar file ({error})"
