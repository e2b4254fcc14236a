"""Which clips a data set has: a folder, a released ``.tsv`` or ``.json`` list, our JSON Lines manifest, or shards.

JSON Lines, one clip a line (only ``path`` is required; paths are relative to the manifest's own folder)::

    {"format": "cat-audio manifest", "version": 1, "embeddings": "clap.npy"}
    {"path": "bells/0001.wav", "samples": 80000, "sample_rate": 16000, "labels": ["bell"], "embedding": 0}

The first line is an optional header. Fields of your own are kept (``Clip.extra``, ``Manifest.extra``) and written
again, unless they look like a misspelt one of ours, which is an error. Two of these are read for fine-tuning: "fold"
(`cat.data.splits`) and "events" (`cat.data.labels`), what sounds from when to when in seconds::

    {"path": "street.wav", "events": [{"onset": 0.5, "offset": 2.25, "label": "car"}]}

``"labels": []`` says that a clip has none of the labels; without the field nobody knows. ``"shards": FOLDER`` in the
header says that the clips lie in shards (`cat.data.shards`), whose index knows them by their paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np

from cat.data.clips import CLIP_FIELDS, Clip, Clips, Fields, Texts
from cat.data.folder import AUDIO_SUFFIXES, find_clips
from cat.data.matching import last_places
from cat.data.parsed import read_once
from cat.data.released import Listed, read_json, read_tsv
from cat.data.remote import is_url
from cat.data.shards.index import folder_of, is_sharded, open_index
from cat.data.shards.members import Member, Members
from cat.data.text import (
    ManifestError,
    check_fields,
    check_path,
    event_list,
    label_list,
    label_text,
    lines,
    parse_json,
    shorten,
    whole_number,
)
from cat.files import replacing

__all__ = ["AUDIO_SUFFIXES", "Clip", "Manifest", "ManifestError", "is_written", "load_manifest", "write_manifest"]

FORMAT = "cat-audio manifest"
VERSION = 1
_CLIP_FIELDS = (*CLIP_FIELDS, "events")
_SHARDS = "shards"  # field of the header
_HEADER_FIELDS = ("format", "version", "embeddings", "embeddings_fingerprint", "label_names")


@dataclass(frozen=True)
class Manifest:
    """The clips of a data set, in order, and where they and their external embeddings lie.

    ``clips`` may be given as any sequence; it is kept in a few arrays (`cat.data.clips`), and a `Clip` is made when one
    is asked for.
    """

    clips: Sequence[Clip]
    root: Path
    embeddings: Path | None = None  # one (rows, D_e) .npy; a clip's row is its ``embedding``
    embeddings_fingerprint: str | None = None  # of the manifest that the embeddings were computed for
    embedding_files: Sequence[Path] | None = None  # released layout: one .npy a clip; ``embedding`` indexes it
    label_names: dict[str, str] = field(default_factory=dict)  # label -> name for people, in class order
    source: Path | None = None  # the file or folder it was read from
    extra: dict[str, Any] = field(default_factory=dict)  # the header's own fields
    shards: str | Path | None = None  # folder or URL of the index of clips that lie in shards
    members: Members | None = None  # where each clip lies in them
    notes: tuple[str, ...] = ()  # sentences for people: what was left out when it was read, what has no label

    def __post_init__(self) -> None:
        if not isinstance(self.clips, Clips):
            object.__setattr__(self, "clips", Clips(self.clips))
        if self.members is not None and len(self.members) != len(self.clips):
            raise ValueError(f"{len(self.clips)} clips, but {len(self.members)} members of shards; use Manifest.take")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        if isinstance(self.shards, str) and self.source is None:
            return self.shards
        return "the manifest" if self.source is None else str(self.source)

    def path(self, index: int) -> Path:
        """Where clip ``index`` lies; of one in a shard only what it is called. `audio` is what can be read."""
        return self.root / self.columns.paths[index]

    def audio(self, index: int) -> Path | Member:
        """What `cat.data.audio` reads of clip ``index``: a file, or a member of a shard."""
        member = None if self.members is None else self.members.get(index, self.columns.paths[index])
        return self.path(index) if member is None else member

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64: each clip's embedding row, -1 for none."""
        return self.columns.rows

    def take(self, indices: np.ndarray) -> Manifest:
        """The manifest of these clips, in this order; without embeddings, which belong to the whole one."""
        return dataclasses.replace(
            self,
            clips=self.columns.take(indices),
            members=None if self.members is None else self.members.take(indices),
            embeddings=None,
            embeddings_fingerprint=None,
            embedding_files=None,
        )

    @property
    def columns(self) -> Clips:
        """The clips, in the arrays that they are kept in."""
        return cast(Clips, self.clips)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Every label that occurs: in the order of ``label_names`` where that is known, otherwise sorted."""
        present = set(self.columns.labels)
        known = [label for label in self.label_names if label in present]
        return tuple(known + sorted(present.difference(known)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the clip paths in order; labels and embedding rows may change without changing it."""
        digest = hashlib.sha256()
        for piece in _posix_lines(self.columns.paths):
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What makes a run on these clips the same run: JSON-able, and equal for the same clips in the same order with
        the same embedding rows. The rows' content is `EmbeddingStore.identity`."""
        identity: dict[str, str | int] = {"clips": len(self), "fingerprint": self.fingerprint}
        if self.embeddings is not None or self.embedding_files is not None:
            identity["embedding_rows"] = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return identity


def _posix_lines(paths: Texts) -> Iterator[bytes]:
    """The bytes of all paths, each with a line end, in pieces."""
    content, ends = paths.arrays
    begins = ends[:-1]
    plain = os.sep == "/" and (begins < ends[1:]).all() and not (paths.mention("//") or paths.mention("/."))
    if not plain or (content[begins] == ord(".")).any() or (content[ends[1:] - 1] == ord("/")).any():
        for path in paths:
            yield PurePath(path).as_posix().encode("utf-8", "surrogateescape") + b"\n"
        return
    for first in range(0, len(paths), 1 << 16):  # as they are: a hundred times faster
        some = ends[first : first + (1 << 16) + 1]
        yield np.insert(content[some[0] : some[-1]], some[1:] - some[0], ord("\n")).tobytes()


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a folder of audio, a ``.tsv``, ``.json`` or ``.jsonl`` manifest, a folder or URL of shards.

    A folder is searched recursively and sorted by path; a file in a subfolder is labelled with the first subfolder's
    name. Every real folder is searched once: a link to a folder is followed unless it leads to one that is searched
    already or that it lies in. A file that several links lead to is one clip, under its own name where it has one here.
    What is left out (links to what is there already, hidden files, other suffixes) is counted in ``Manifest.notes``; a
    subfolder that cannot be listed is an error.

    ``.tsv`` is fairseq's and EAT's (root line, then ``path<TAB>samples``), with labels from a ``.lbl`` beside it.
    ``.json`` is the released CAT list (``wav_path``, ``num_frame``, ``clap_path``) or AST's (``data``: ``wav``,
    ``labels``).

    Labels lose the blanks around them, are brought to Unicode's composed form (NFC) and occur once a clip; an empty one
    is an error. Paths of any bytes are read and written: those that are not UTF-8 as ``\\udc80`` to ``\\udcff``.

    Raises ManifestError with the line or entry number and the remedy.
    """
    if not os.fspath(path):
        raise ManifestError("no data set given; name a folder of audio or a manifest (data.train, for pre-training)")
    if is_url(path):
        return _load_shards(path)
    path = Path(path if os.path.lexists(path) else os.path.expanduser(path))
    if is_sharded(path):
        return _load_shards(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{path}: no such file or folder; give a folder of audio or a .jsonl, .tsv or .json manifest"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"{shorten(str(path))}: {reason}; give a folder or a manifest that can be read") from None
    try:
        manifest = _load_folder(path) if path.is_dir() else _load_file(path)
    except RecursionError:
        raise ManifestError(f"{path}: an entry is nested too deeply; a clip is one flat object") from None
    if not manifest.clips:
        kinds = ", ".join(AUDIO_SUFFIXES)
        looked = f" (looked for {kinds})" if path.is_dir() else ""
        if path.is_dir() and any(path.glob("*.tar")):
            looked = ", but tar files, which need an index: cat-audio shards index"
        raise ManifestError("; ".join([f"{path}: no clips in it{looked}", *manifest.notes]))
    return manifest


def _load_folder(path: Path) -> Manifest:
    clips, notes = find_clips(path)
    return Manifest(clips, path, source=path, notes=notes)


def _load_shards(path: str | os.PathLike[str]) -> Manifest:
    index, folder = open_index(path), folder_of(path)
    embeddings, notes = index.info.get("embeddings"), []
    if embeddings is not None and isinstance(folder, str):
        notes.append(f"{folder}: its embeddings, {embeddings}, are not fetched")
        embeddings = None
    return Manifest(
        index.clips,
        Path(folder),
        embeddings=None if embeddings is None else Path(folder, embeddings),
        embeddings_fingerprint=index.info.get("embeddings_fingerprint"),
        label_names=index.info.get("label_names") or {},
        source=None if isinstance(folder, str) else folder,
        extra=index.info.get("extra") or {},
        shards=folder,
        members=index.members,
        notes=tuple(notes),
    )


def _load_file(path: Path) -> Manifest:
    readers = {".jsonl": _read_jsonl, ".tsv": read_tsv, ".json": read_json}
    if path.suffix.lower() not in readers:
        raise ManifestError(
            f"{path}: a manifest ends in {', '.join(readers)}, or is a folder of audio; got {path.suffix!r}"
        )
    if not path.is_file():
        raise ManifestError(f"{path}: is not a regular file; a manifest is read more than once")
    return _in_shards(Manifest(**read_once(path, readers[path.suffix.lower()])._asdict(), source=path))


def _in_shards(manifest: Manifest) -> Manifest:
    """With the place of every clip where the header names shards, whose index has them under the same paths."""
    extra = dict(manifest.extra)
    place = extra.pop(_SHARDS, None)
    if place is None:
        return manifest
    place = place if is_url(place) else manifest.root / place
    index = open_index(place)
    paths, there = manifest.columns.paths, index.clips.paths
    if all(map(np.array_equal, paths.arrays, there.arrays)):
        at = np.arange(len(paths))
    else:
        at = last_places(map(os.fsencode, paths), map(os.fsencode, there))
    if len(at) and at.min() < 0:
        raise ManifestError(
            f"{manifest.name}: {paths[int(at.argmin())]} is not in the shards of {place}; expected "
            "paths as their index has them"
        )
    return dataclasses.replace(manifest, root=Path(place), shards=place, members=index.members.take(at), extra=extra)


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Listed:
    header: dict[str, Any] = {}
    folder = path.parent

    def read() -> Iterator[Fields]:
        for number, line in lines(path):
            where = f"{path}:{number}"
            entry = parse_json(line, path, number)
            if not isinstance(entry, dict):
                raise ManifestError(f'{where}: expected an object such as {{"path": "a.wav"}}, got {shorten(line)}')
            if "path" in entry or not ("format" in entry or "version" in entry):
                yield _parse_clip(entry, folder, where)
            elif number == 1:
                header.update(_check_header(entry, folder, where))
            else:
                raise ManifestError(
                    f"{where}: a second header; the header is the first line only (were two manifests joined?)"
                )

    clips = Clips.of_fields(read())
    embeddings = header.get("embeddings")
    if embeddings is None and (clips.rows >= 0).any():
        with_row = clips.paths[int((clips.rows >= 0).argmax())]
        raise ManifestError(f"{path}: {with_row} has an embedding row, but the header names no embeddings file")
    return Listed(
        clips,
        folder,
        label_names=header.get("label_names") or {},
        embeddings=None if embeddings is None else folder / embeddings,
        embeddings_fingerprint=header.get("embeddings_fingerprint"),
        extra={key: value for key, value in header.items() if key not in _HEADER_FIELDS},
    )


def _check_header(entry: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    check_fields(entry, (*_HEADER_FIELDS, _SHARDS), where)
    version = entry.get("version")
    if entry.get("format") != FORMAT or version != VERSION or isinstance(version, bool):
        raise ManifestError(
            f"{where}: format {shorten(entry.get('format'))} version {shorten(version)}; "
            f"this release reads {FORMAT!r} version {VERSION}"
        )
    kinds = {"embeddings": str, "embeddings_fingerprint": str, "label_names": dict, _SHARDS: str}
    for name, kind in kinds.items():
        if entry.get(name) is not None and not isinstance(entry[name], kind):
            raise ManifestError(f"{where}: {name} must be {kind.__name__}, got {shorten(entry[name])}")
    if entry.get("embeddings") is not None:
        check_path(entry["embeddings"], "embeddings", folder, where)
    names = entry.get("label_names") or {}
    for label, name in names.items():
        if not isinstance(name, str):
            raise ManifestError(f"{where}: label_names[{shorten(label)}] must be a string, got {shorten(name)}")
    return {**entry, "label_names": {label_text(label, where): name for label, name in names.items()}}


def _parse_clip(entry: dict[str, Any], folder: Path, where: str) -> Fields:
    check_fields(entry, _CLIP_FIELDS, where)
    negative = entry.get("labels") == []
    events = entry.pop("events", None)
    if events is not None:
        entry["events"] = event_list(events, where)
    return (
        check_path(entry.pop("path", None), "path", folder, where),
        whole_number(entry.pop("samples", None), "samples", 0, where),
        whole_number(entry.pop("sample_rate", None), "sample_rate", 1, where),
        label_list(entry.pop("labels", None), where),
        whole_number(entry.pop("embedding", None), "embedding", 0, where),
        entry,
        negative,
    )


def write_manifest(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Write JSON Lines at ``path``, atomically, with every path relative to its folder where that is possible."""
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(_json_lines(manifest, path))


def is_written(manifest: Manifest, path: str | os.PathLike[str]) -> bool:
    """Whether the file holds what `write_manifest` would write there."""
    with open(path, "rb") as file:
        pairs = itertools.zip_longest(file, _json_lines(manifest, Path(path)))
        return all(there == wanted for there, wanted in pairs)


def _json_lines(manifest: Manifest, path: Path) -> Iterator[bytes]:
    relative = _RelativeTo(path.parent)
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if manifest.embeddings is not None:
        header["embeddings"] = relative(manifest.embeddings)
        header["embeddings_fingerprint"] = manifest.embeddings_fingerprint
    elif manifest.embedding_files is not None:
        raise ManifestError(
            f"{path}: one .npy a clip cannot be written as JSON Lines; gather them into one file first "
            "(cat.data.embeddings.gather_embeddings)"
        )
    if manifest.members is not None:
        if manifest.shards is None:
            raise ManifestError(f"{path}: clips of several sharded data sets cannot be written as one manifest")
        header[_SHARDS] = manifest.shards if isinstance(manifest.shards, str) else relative(manifest.shards)
    if manifest.label_names:
        header["label_names"] = manifest.label_names
    yield json_line({**header, **manifest.extra})
    for clip in manifest.clips:
        path_there = clip.path if manifest.members is not None else relative(manifest.root / clip.path)
        yield json_line({"path": path_there, **fields_of(clip)})


def fields_of(clip: Clip) -> dict[str, Any]:
    """What a manifest says of a clip beside its path."""
    told = ((name, getattr(clip, name)) for name in CLIP_FIELDS[1:])
    return {name: value for name, value in told if value is not None and (value != () or clip.negative)} | clip.extra


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_ASCII_ENCODER = json.JSONEncoder(allow_nan=False)


def json_line(entry: dict[str, Any]) -> bytes:
    try:
        return f"{_ENCODER.encode(entry)}\n".encode()
    except UnicodeEncodeError:  # a path that is not UTF-8, or half a surrogate pair in a field of the user's
        return f"{_ASCII_ENCODER.encode(entry)}\n".encode()


class _RelativeTo:
    """Paths relative to a folder. Links among the folders are resolved, once each; a link to a file keeps its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.realpath(folder)
        self._prefixes: dict[str, str] = {}

    def __call__(self, path: Path) -> str:
        parent, name = os.path.split(path)
        if parent not in self._prefixes:
            self._prefixes[parent] = self._relative(os.path.realpath(parent))
        return self._prefixes[parent] + name

    def _relative(self, folder: str) -> str:
        try:
            relative = PurePath(os.path.relpath(folder, self._folder)).as_posix()
        except ValueError:  # another drive
            relative = PurePath(folder).as_posix()
        return "" if relative == "." else relative.rstrip("/") + "/"
