"""Which clips a data set has: a folder, a released ``.tsv`` or ``.json`` list, or our JSON Lines manifest.

JSON Lines, one clip a line (only ``path`` is required; paths are relative to the manifest's own folder)::

    {"format": "cat-audio manifest", "version": 1, "embeddings": "clap.npy"}
    {"path": "bells/0001.wav", "samples": 80000, "sample_rate": 16000, "labels": ["bell"], "embedding": 0}

The first line is an optional header. Fields of your own are ignored, unless they look like a misspelt one of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cat.files import replacing

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".au")
FORMAT = "cat-audio manifest"
VERSION = 1
_CLIP_FIELDS = ("path", "samples", "sample_rate", "labels", "embedding")
_HEADER_FIELDS = ("format", "version", "embeddings", "embeddings_fingerprint", "label_names")


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the line where there is one, and the remedy."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file. ``samples`` and ``sample_rate`` are None where the list does not say; the file's own header
    always decides, because released lists are known to count samples at another rate than the files have.
    """

    path: str  # relative to the manifest's root, or absolute
    samples: int | None = None
    sample_rate: int | None = None
    labels: tuple[str, ...] = ()
    embedding: int | None = None  # row of the data set's embedding file


@dataclass(frozen=True)
class Manifest:
    """The clips of a data set, in order, and where they and their external embeddings lie."""

    clips: tuple[Clip, ...]
    root: Path
    embeddings: Path | None = None  # one (rows, D_e) .npy; a clip's row is its ``embedding``
    embeddings_fingerprint: str | None = None  # of the manifest that the embeddings were computed for
    embedding_files: tuple[Path, ...] | None = None  # released layout: one .npy a clip; ``embedding`` indexes it
    label_names: dict[str, str] = dataclasses.field(default_factory=dict)  # label -> name for people, in class order
    source: Path | None = None  # the file or folder it was read from

    def __len__(self) -> int:
        return len(self.clips)

    def path(self, index: int) -> Path:
        """Where clip ``index`` lies."""
        return self.root / self.clips[index].path

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Every label that occurs: in the order of ``label_names`` where that is known, otherwise sorted."""
        present = {label for clip in self.clips for label in clip.labels}
        known = [label for label in self.label_names if label in present]
        return tuple(known + sorted(present.difference(known)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the clip paths in order; labels and embedding rows may change without changing it."""
        digest = hashlib.sha256()
        for clip in self.clips:
            digest.update(Path(clip.path).as_posix().encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What makes a run on these clips the same run: JSON-able, and equal for the same clips in the same order with
        the same embedding rows. The rows' content is `EmbeddingStore.identity`."""
        identity: dict[str, str | int] = {"clips": len(self), "fingerprint": self.fingerprint}
        if self.embeddings is not None or self.embedding_files is not None:
            rows = ",".join(str(clip.embedding) for clip in self.clips)
            identity["embedding_rows"] = hashlib.sha256(rows.encode()).hexdigest()
        return identity


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a folder of audio, a ``.tsv``, ``.json`` or ``.jsonl`` manifest.

    A folder is searched recursively and sorted by path; a file in a subfolder is labelled with the first subfolder's
    name. ``.tsv`` is fairseq's and EAT's (root line, then ``path<TAB>samples``), with labels from a ``.lbl`` beside it.
    ``.json`` is the released CAT list (``wav_path``, ``num_frame``, ``clap_path``) or AST's (``data``: ``wav``,
    ``labels``).

    Raises ManifestError with the line or entry number and the remedy.
    """
    if not os.fspath(path):
        raise ManifestError("no data set given; name a folder of audio or a manifest (data.train, for pre-training)")
    path = Path(path)
    if path.is_dir():
        manifest = _load_folder(path)
    elif not path.exists():
        raise ManifestError(
            f"{path}: no such file or folder; give a folder of audio or a .jsonl, .tsv or .json manifest"
        )
    else:
        loaders = {".jsonl": _load_jsonl, ".tsv": _load_tsv, ".json": _load_json}
        if path.suffix.lower() not in loaders:
            raise ManifestError(
                f"{path}: a manifest ends in {', '.join(loaders)}, or is a folder of audio; got {path.suffix!r}"
            )
        manifest = loaders[path.suffix.lower()](path)
    if not manifest.clips:
        kinds = ", ".join(AUDIO_SUFFIXES)
        raise ManifestError(f"{path}: no clips in it" + (f" (looked for {kinds})" if path.is_dir() else ""))
    return manifest


def write_manifest(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Write JSON Lines at ``path``, atomically, with every path relative to its folder where that is possible."""
    path = Path(path)
    folder = path.parent.resolve()
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if manifest.embeddings is not None:
        header["embeddings"] = _relative(manifest.embeddings, folder)
        header["embeddings_fingerprint"] = manifest.embeddings_fingerprint
    elif manifest.embedding_files is not None:
        raise ManifestError(
            f"{path}: one .npy a clip cannot be written as JSON Lines; gather them into one file first "
            "(cat.data.embeddings.gather_embeddings)"
        )
    if manifest.label_names:
        header["label_names"] = manifest.label_names
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(header, ensure_ascii=False) + "\n")
        for clip in manifest.clips:
            entry = {k: v for k, v in dataclasses.asdict(clip).items() if v is not None and v != ()}
            entry["path"] = _relative(manifest.root / clip.path, folder)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder)).as_posix()
    except ValueError:  # another drive
        return path.resolve().as_posix()


# --- folders ---------------------------------------------------------------------------------------------------------


def _load_folder(root: Path) -> Manifest:
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith("."):
                found.append(Path(folder, name).relative_to(root).as_posix())
    clips = tuple(Clip(path, labels=(path.split("/")[0],) if "/" in path else ()) for path in sorted(found))
    return Manifest(clips, root, source=root)


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _load_jsonl(path: Path) -> Manifest:
    header: dict[str, Any] = {}
    clips: list[Clip] = []
    for number, line in _lines(path):
        entry = _parse_object(line, f"{path}:{number}")
        if "format" in entry or "version" in entry:
            if number != 1:
                raise ManifestError(
                    f"{path}:{number}: a second header; the header is the first line only (were two manifests joined?)"
                )
            header = _check_header(entry, f"{path}:{number}")
        else:
            clips.append(_parse_clip(entry, f"{path}:{number}"))
    embeddings = header.get("embeddings")
    if embeddings is None:
        with_row = next((clip for clip in clips if clip.embedding is not None), None)
        if with_row is not None:
            raise ManifestError(
                f"{path}: {with_row.path} has an embedding row, but the header names no embeddings file"
            )
    return Manifest(
        tuple(clips),
        path.parent,
        embeddings=None if embeddings is None else path.parent / embeddings,
        embeddings_fingerprint=header.get("embeddings_fingerprint"),
        label_names=header.get("label_names", {}),
        source=path,
    )


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON ({error.msg} at column {error.colno}): {_shorten(line)}") from None
    if not isinstance(entry, dict):
        raise ManifestError(f'{where}: expected an object such as {{"path": "a.wav"}}, got {_shorten(line)}')
    return entry


def _check_header(entry: dict[str, Any], where: str) -> dict[str, Any]:
    _check_fields(entry, _HEADER_FIELDS, where)
    if entry.get("format") != FORMAT or entry.get("version") != VERSION:
        raise ManifestError(
            f"{where}: format {entry.get('format')!r} version {entry.get('version')!r}; "
            f"this release reads {FORMAT!r} version {VERSION}"
        )
    for field, kind in (("embeddings", str), ("embeddings_fingerprint", str), ("label_names", dict)):
        if entry.get(field) is not None and not isinstance(entry[field], kind):
            raise ManifestError(f"{where}: {field} must be {kind.__name__}, got {entry[field]!r}")
    return {key: value for key, value in entry.items() if value is not None}


def _parse_clip(entry: dict[str, Any], where: str) -> Clip:
    _check_fields(entry, _CLIP_FIELDS, where)
    if not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ManifestError(f'{where}: "path" must be a file name, got {entry.get("path")!r}')
    for field, least in (("samples", 0), ("sample_rate", 1), ("embedding", 0)):
        value = entry.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ManifestError(f'{where}: "{field}" must be a whole number of at least {least}, got {value!r}')
    labels = entry.get("labels") or []
    if isinstance(labels, str):
        labels = [labels]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ManifestError(f'{where}: "labels" must be a list of strings, got {labels!r}')
    return Clip(entry["path"], entry.get("samples"), entry.get("sample_rate"), tuple(labels), entry.get("embedding"))


def _check_fields(entry: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """A misspelt field would silently drop labels or embeddings."""
    for field in entry:
        near = None if field in known else _nearest(field, known)
        if near is not None:
            raise ManifestError(f"{where}: unknown field {field!r}; did you mean {near!r}?")


@lru_cache(maxsize=1024)  # the same few fields on every line
def _nearest(field: str, known: tuple[str, ...]) -> str | None:
    return next(iter(difflib.get_close_matches(field, known, n=1, cutoff=0.8)), None)


# --- released .tsv + .lbl --------------------------------------------------------------------------------------------


def _load_tsv(path: Path) -> Manifest:
    lines = list(_lines(path))
    if not lines:
        raise ManifestError(f"{path}: empty; the first line is the audio's root folder, then 'path<TAB>samples' lines")
    root = path.parent / lines[0][1].strip()
    if not root.is_dir():
        raise ManifestError(
            f"{path}:{lines[0][0]}: the first line names the audio's root folder, and {root} does not exist; edit it"
        )
    clips = []
    for number, line in lines[1:]:
        fields = line.split("\t") if "\t" in line else line.rsplit(None, 1)
        if len(fields) != 2 or not fields[0].strip() or not fields[1].strip().isdecimal():
            raise ManifestError(f"{path}:{number}: expected 'path<TAB>samples', got {_shorten(line)}")
        if ".h5/" in fields[0] or ".hdf5/" in fields[0]:
            raise ManifestError(
                f"{path}:{number}: {fields[0]} lies inside an HDF5 file; unpack the audio to files first"
            )
        clips.append(Clip(fields[0].strip(), samples=int(fields[1])))
    clips, names = _attach_labels(path, clips)
    return Manifest(tuple(clips), root, label_names=names, source=path)


def _attach_labels(path: Path, clips: list[Clip]) -> tuple[list[Clip], dict[str, str]]:
    """Labels from ``NAME.lbl`` ('name label,label', in the clips' order), names from ``label_descriptors.csv``."""
    label_path = path.with_suffix(".lbl")
    if not label_path.exists():
        return clips, {}
    lines = list(_lines(label_path))
    if len(lines) != len(clips):
        raise ManifestError(f"{label_path}: {len(lines)} lines for the {len(clips)} clips of {path.name}")
    labelled = []
    for (number, line), clip in zip(lines, clips, strict=True):
        fields = line.split()
        if len(fields) != 2:
            raise ManifestError(f"{label_path}:{number}: expected 'name label,label', got {_shorten(line)}")
        if Path(fields[0]).stem != Path(clip.path).stem and fields[0] != Path(clip.path).stem:
            raise ManifestError(
                f"{label_path}:{number}: labels of {fields[0]!r}, but that clip of {path.name} is {clip.path!r}"
            )
        labelled.append(dataclasses.replace(clip, labels=tuple(fields[1].split(","))))
    return labelled, _label_names(path.parent / "label_descriptors.csv")


def _label_names(path: Path) -> dict[str, str]:
    """'index,label,name' lines: label -> name, in the order of the classes."""
    if not path.exists():
        return {}
    rows = []
    for number, line in _lines(path):
        fields = line.split(",", 2)
        if len(fields) < 2 or not fields[0].strip().isdecimal():
            raise ManifestError(f"{path}:{number}: expected 'index,label,name', got {_shorten(line)}")
        rows.append((int(fields[0]), fields[1].strip(), fields[-1].strip().strip('"')))
    return {label: name for _, label, name in sorted(rows)}


# --- released .json --------------------------------------------------------------------------------------------------


def _load_json(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ManifestError(f"{path}{line}: not JSON ({error})") from None
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ManifestError(
            f'{path}: expected a list of {{"wav_path": ...}} or {{"data": [{{"wav": ..., "labels": ...}}]}}'
        )
    clips: list[Clip] = []
    embedding_files: list[Path] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        wav = (entry.get("wav_path") or entry.get("wav")) if isinstance(entry, dict) else None
        if not isinstance(wav, str):
            raise ManifestError(
                f'{where}: expected an object with "wav_path" or "wav", got {_shorten(json.dumps(entry))}'
            )
        samples, labels, embedding = entry.get("num_frame"), entry.get("labels") or "", entry.get("clap_path")
        if samples is not None and not isinstance(samples, int):
            raise ManifestError(f'{where}: "num_frame" must be a whole number, got {samples!r}')
        if not isinstance(labels, str):
            raise ManifestError(f'{where}: "labels" must be one string of labels with commas between, got {labels!r}')
        if embedding is not None:
            embedding_files.append(path.parent / embedding)
        clips.append(
            Clip(wav, samples, None, tuple(filter(None, labels.split(","))), None if embedding is None else number - 1)
        )
    if embedding_files and len(embedding_files) != len(clips):
        raise ManifestError(
            f'{path}: {len(embedding_files)} of {len(clips)} entries have a "clap_path"; give all or none one'
        )
    names: dict[str, str] = {}
    if path.with_suffix(".lbl").exists():
        clips, names = _attach_labels(path, clips)
    return Manifest(
        tuple(clips), path.parent, embedding_files=tuple(embedding_files) or None, label_names=names, source=path
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ManifestError(f"{path}:{line}: not UTF-8 text; save the manifest as UTF-8") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _shorten(text: str, limit: int = 80) -> str:
    text = text.strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")
