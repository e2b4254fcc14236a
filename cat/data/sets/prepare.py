"""What all data sets have in common: from an archive or a folder to manifests that are checked and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cat.data.clips import Clip
from cat.data.manifest import Manifest, is_written, write_manifest
from cat.data.sets.archives import ArchiveError, check_sha256, download, unpack
from cat.data.text import ManifestError
from cat.outputs import Output, claim


@dataclass
class Listing:
    """What is in a data set's folder: the clips of every manifest, and by manifest the files that should be there."""

    root: Path
    clips: dict[str, list[Clip]]
    label_names: dict[str, str]
    missing: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """A public data set."""

    name: str
    title: str
    licence: str
    markers: tuple[str, ...]  # files or folders of which it has one; names that no other data set has
    counts: Mapping[str, int]  # manifest -> clips
    read: Callable[[Path, Path], Listing]  # from the folder and the marker in it to what is there
    home: str  # where people get it
    url: str | None = None  # of its archive
    sha256: str | None = None  # of its archive, where one is published
    optional: frozenset[str] = frozenset()  # manifests that may be left out as a whole


@dataclass(frozen=True)
class Prepared:
    """The manifests that were written."""

    manifests: dict[Path, Manifest]
    notes: tuple[str, ...]


def prepare(
    data_set: DataSet,
    source: Path | None,
    out: Path,
    *,
    allow_missing: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Prepared:
    """Write the manifests of a data set into the folder ``out``.

    Args:
        source: its folder, of which nothing is copied, or its archive, which is unpacked into ``out/NAME``. None
            downloads the archive into ``out`` first, unless it is there already.
        allow_missing: clips that each manifest may lack.
        overwrite: replace manifests of other content.

    Raises ArchiveError, ManifestError for a folder that is not this data set's or has other clips than it should, and
    OutputError for a file in the way.
    """
    if source is None:
        source = _downloaded(data_set, out, progress)
    if not source.exists():
        raise ManifestError(f"{source}: no such file or folder; give the archive or the folder of {data_set.title}")
    folder = source if source.is_dir() else _unpacked(data_set, source, out, progress)
    marker = _find(data_set, folder, source)
    listing = data_set.read(folder, marker)
    notes = _check(data_set, listing, allow_missing)
    manifests = {}
    for name, clips in listing.clips.items():
        present = {label for clip in clips for label in clip.labels}
        manifests[out / f"{name}.jsonl"] = Manifest(
            clips,
            listing.root,
            label_names={label: text for label, text in listing.label_names.items() if label in present},
            source=out / f"{name}.jsonl",
            extra={"dataset": data_set.name, "licence": data_set.licence},
        )
    there = {path for path, manifest in manifests.items() if path.is_file() and is_written(manifest, path)}
    fresh = {path: manifest for path, manifest in manifests.items() if path not in there}
    claim([Output(path, lambda _: False, "another folder (-o)") for path in fresh], overwrite=overwrite)
    for path, manifest in fresh.items():
        write_manifest(manifest, path)
    return Prepared(manifests, notes)


def _downloaded(data_set: DataSet, out: Path, progress: bool) -> Path:
    if data_set.url is None:
        raise ArchiveError(f"{data_set.title} has no archive that could be downloaded; get it from {data_set.home}")
    archive = out / f"{data_set.name}{''.join(Path(data_set.url).suffixes[-2:])}"
    if not archive.exists():
        download(data_set.url, archive, data_set.sha256, progress=progress)
    elif data_set.sha256 is not None:
        check_sha256(archive, data_set.sha256)
    return archive


def _unpacked(data_set: DataSet, archive: Path, out: Path, progress: bool) -> Path:
    """Where the archive is unpacked. It appears as a whole, and is known by the archive's size in its name."""
    folder = out / f"{data_set.name}-{archive.stat().st_size}"
    if not folder.is_dir():
        unpack(archive, folder, lambda unpacked: _find(data_set, unpacked, archive), progress=progress)
    return folder


def _find(data_set: DataSet, folder: Path, source: Path) -> Path:
    """The marker: the folder itself, or in it or one or two further down, for archives have a folder around it all."""
    if folder.resolve().name in data_set.markers:
        return folder.resolve()
    for place in ("", "*/", "*/*/"):
        for marker in data_set.markers:
            found = sorted(folder.glob(place + marker))
            if found:
                return found[0]
    raise ManifestError(
        f"{source}: is not {data_set.title}, for it has no {' or '.join(data_set.markers)}; give its archive or its "
        f"folder, from {data_set.home}"
    )


def _check(data_set: DataSet, listing: Listing, allow_missing: int) -> tuple[str, ...]:
    """Notes on what is missing. Raises ManifestError when it is too much, or too many are there."""
    notes = []
    for name, expected in data_set.counts.items():
        if name not in listing.clips and name in data_set.optional:
            continue
        there, missing = len(listing.clips[name]), listing.missing.get(name, [])
        lacking = max(expected - there, len(missing))
        if there > expected:
            raise ManifestError(
                f"{listing.root}: {name} has {there} clips; {data_set.title} has {expected}. Is something else among "
                "them, or is it another version?"
            )
        if lacking == 0:
            continue
        text = f"{name} lacks {lacking} of {expected} clips{_some(missing)}"
        if lacking > allow_missing or there == 0:
            raise ManifestError(
                f"{listing.root}: {text}. Get them from {data_set.home}, or do without: --allow-missing {lacking}"
            )
        notes.append(text)
    return tuple(notes)


def _some(missing: Sequence[str], most: int = 5) -> str:
    more = f" and {len(missing) - most} more" if len(missing) > most else ""
    return f": {', '.join(missing[:most])}{more}" if missing else ""
