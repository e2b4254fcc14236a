"""The released lists: ``.tsv`` with ``.lbl`` and ``label_descriptors.csv`` (fairseq, EAT), ``.json`` (CAT, AST)."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cat.data.clips import CLIP_FIELDS, Clip, Clips, Files, Texts
from cat.data.text import (
    ManifestError,
    check_fields,
    check_path,
    comma_separated_labels,
    label_text,
    lines,
    nearest,
    parse_json,
    read_text,
    shorten,
    whole_number,
)

_JSON_FIELDS = ("wav_path", "wav", "num_frame", "labels", "clap_path")


class Listed(NamedTuple):
    """What a list says: fields of `cat.data.manifest.Manifest`."""

    clips: Clips
    root: Path
    label_names: dict[str, str]
    embedding_files: Files | None = None
    notes: tuple[str, ...] = ()
    embeddings: Path | None = None
    embeddings_fingerprint: str | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012


def companions(path: Path) -> tuple[Path, ...]:
    """The other files that are read with a list, where they exist: its labels, and their names."""
    if path.suffix.lower() not in (".tsv", ".json"):
        return ()
    return path.with_suffix(".lbl"), path.parent / "label_descriptors.csv"


def read_tsv(path: Path) -> Listed:
    """A line with the audio's root folder, then ``path<TAB>samples``."""
    numbered = lines(path)
    number, first = next(numbered, (0, ""))
    if not number:
        raise ManifestError(f"{path}: empty; the first line is the audio's root folder, then 'path<TAB>samples' lines")
    root = path.parent / check_path(first.strip(), "root", path.parent, f"{path}:{number}")
    if not os.path.isdir(root):
        raise ManifestError(
            f"{path}:{number}: the first line names the audio's root folder, and {root} does not exist; edit it"
        )
    clips = Clips(_tsv_clip(line, root, f"{path}:{number}") for number, line in numbered)
    return Listed(*_with_labels(path, clips, root))


def _tsv_clip(line: str, root: Path, where: str) -> Clip:
    fields = line.split("\t") if "\t" in line else line.rsplit(None, 1)
    samples = fields[-1].strip()
    if len(fields) != 2 or not fields[0].strip() or not samples.isdecimal() or len(samples) > 18:
        raise ManifestError(f"{where}: expected 'path<TAB>samples', got {shorten(line)}")
    if ".h5/" in fields[0] or ".hdf5/" in fields[0]:
        raise ManifestError(f"{where}: {fields[0]} lies inside an HDF5 file; unpack the audio to files first")
    return Clip(check_path(fields[0].strip(), "path", root, where), samples=int(samples))


def _with_labels(path: Path, clips: Clips, root: Path) -> tuple[Clips, Path, dict[str, str]]:
    """Labels from ``NAME.lbl`` ('name label,label', in the clips' order), else those that the list has; their names
    from ``label_descriptors.csv``."""
    label_path, names_path = companions(path)
    if not label_path.exists():
        named = names_path.exists() and any(clip.labels for clip in clips)
        return clips, root, _label_names(names_path) if named else {}
    labels = list(lines(label_path))
    if len(labels) != len(clips):
        raise ManifestError(f"{label_path}: {len(labels)} lines for the {len(clips)} clips of {path.name}")

    def labelled() -> Iterator[Clip]:
        for (number, line), clip in zip(labels, clips, strict=True):
            where = f"{label_path}:{number}"
            fields = line.split("\t") if "\t" in line else line.split()
            if len(fields) != 2:
                raise ManifestError(f"{where}: expected 'name label,label', got {shorten(line)}")
            name, stem = fields[0].strip(), Path(clip.path).stem
            if Path(name).stem != stem and name != stem:
                raise ManifestError(f"{where}: labels of {name!r}, but that clip of {path.name} is {clip.path!r}")
            yield dataclasses.replace(clip, labels=comma_separated_labels(fields[1], where))

    return Clips(labelled()), root, _label_names(names_path)


def _label_names(path: Path) -> dict[str, str]:
    """'index,label,name' lines: label -> name, in the order of the classes."""
    if not path.exists():
        return {}
    found: dict[int, tuple[str, str]] = {}
    rows = csv.reader(io.StringIO(read_text(path)), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not any(cell.strip() for cell in row) or (rows.line_num == 1 and row[0].strip() == "index"):
                continue
            if len(row) < 2 or not row[0].strip().isdecimal() or len(row[0]) > 18:
                raise ManifestError(f"{where}: expected 'index,label,name', got {shorten(','.join(row))}")
            index, label = int(row[0]), label_text(row[1], where)
            if index in found or any(label == other for other, _ in found.values()):
                raise ManifestError(f"{where}: index {index} or label {label!r} occurs a second time; remove one")
            found[index] = label, ", ".join(cell.strip() for cell in row[2:]) or label
    except csv.Error as error:
        raise ManifestError(f"{path}:{rows.line_num}: {error}; expected 'index,label,\"name\"'") from None
    return dict(found[index] for index in sorted(found))


def read_json(path: Path) -> Listed:
    """CAT's list of ``wav_path``, ``num_frame`` and ``clap_path``, or AST's ``data`` of ``wav`` and ``labels``."""
    content = parse_json(read_text(path), path)
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ManifestError(
            f'{path}: expected a list of {{"wav_path": ...}} or {{"data": [{{"wav": ..., "labels": ...}}]}}'
        )
    files, dropped, folder, name = Texts(), Counter[str](), path.parent, str(path)
    clips = Clips(
        _json_clip(entry, number, files, dropped, folder, f"{name}: entry {number}")
        for number, entry in enumerate(entries, 1)
    )
    if len(files) not in (0, len(clips)):
        raise ManifestError(f'{path}: {len(files)} of {len(clips)} entries have a "clap_path"; give all or none one')
    notes = tuple(
        f"{path}: the field {field!r} of {count} entries goes into no manifest written from it, which has such a field "
        "of its own; rename it to keep it"
        for field, count in dropped.items()
    )
    clips, root, names = _with_labels(path, clips, folder)
    return Listed(clips, root, names, Files(folder, files) if files else None, notes)


def _json_clip(entry: Any, number: int, files: Texts, dropped: Counter[str], folder: Path, where: str) -> Clip:
    wav = (entry.get("wav_path") or entry.get("wav")) if isinstance(entry, dict) else None
    if not isinstance(wav, str):
        raise ManifestError(f'{where}: expected an object with "wav_path" or "wav", got {shorten(entry)}')
    check_fields(entry, _JSON_FIELDS, where)
    clap = entry.get("clap_path")
    if clap is not None:
        files.append(check_path(clap, "clap_path", folder, where))
    extra = {field: value for field, value in entry.items() if field not in _JSON_FIELDS}
    for field in [field for field in extra if nearest(field, CLIP_FIELDS)]:
        dropped[field] += 1
        del extra[field]
    return Clip(
        check_path(wav, "wav", folder, where),
        whole_number(entry.get("num_frame"), "num_frame", 0, where),
        labels=comma_separated_labels(entry.get("labels"), where),
        embedding=None if clap is None else number - 1,
        extra=extra,
    )
