"""Features of frozen encoders on disk, so that a probe that is run again does not hear every clip again.

An entry is a folder ``DIR/<key>``: a ``.npy`` an array, memory-mapped, and ``entry.json`` with their SHA-256. The key
is the SHA-256 of all that the features depend on: the encoder's weights and settings, what is kept of it, the batch
size (it decides the last bits), this package's code, PyTorch's version and the kind of device, and every clip's path,
size and times of change. So an entry is never out of date; one that nothing asks for any more is only in the way, and
the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

import cat_kernels
from cat.data.manifest import Manifest
from cat.data.partial import stamp
from cat.encoders.embed import Skipped, embed_manifest
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.identity import UnknownIdentity, device_of, identity
from cat.evaluation.features import Arrays, Features, Wanted, compute, features_of
from cat.files import format_bytes, new_folder, sha256_of

FORMAT = 1
ENTRY = "entry.json"
_HEADER = 128  # bytes of a .npy's header; enough for any number of rows, so that it can be written last
_CODE = ("data", "model", "encoders", "evaluation/features.py")  # of `cat`; what features go through


class DamagedEntry(ValueError):
    """A cache entry that is not, or no longer, what was written."""


@dataclass
class FeatureCache:
    """Features by way of ``folder``; None: nothing is kept, and tokens lie in a temporary folder while they are needed.

    To be used as a context. ``notes`` are for people: what was damaged, why nothing was kept.
    """

    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    computed: int = 0
    found: int = 0
    size: int = 0  # bytes of the entries in use
    _known: list[tuple[FrozenEncoder, Any]] = field(default_factory=list)  # encoders and their identities

    def __enter__(self) -> FeatureCache:
        self._stack = contextlib.ExitStack()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def features(self, manifest: Manifest, encoder: FrozenEncoder, wanted: Wanted, **options: Any) -> Features:
        """From the cache, or else computed and put there. ``options`` are those of `embed_manifest`.

        Raises ValueError when no clip of the manifest can be embedded.
        """
        place = self._place(manifest, encoder, wanted, options)
        if place is not None and (kept := self._kept(place, manifest, encoder, wanted, options)) is not None:
            self.found += 1
            return kept
        self.computed += 1
        if place is not None:
            try:
                return self._put(place, manifest, encoder, wanted, options)
            except OSError as error:
                if not error.filename or not Path(os.fsdecode(error.filename)).is_relative_to(place.parent):
                    raise
                self._note(f"features were not kept in {place.parent}: {error.strerror}")
                self.folder = None
        if wanted.tokens:
            temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cat-audio-probe-")))
            return self._put(temporary / "features", manifest, encoder, wanted, options)
        skipped: list[Skipped] = []
        chunks = list(compute(manifest, encoder, wanted, skipped, **options))
        if not chunks:
            raise _nothing(manifest, skipped)
        return features_of({name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}, wanted, skipped)

    def summary(self) -> str:
        """A line that says where features came from."""
        if self.folder is None:
            return f"features: {self.computed} sets computed, none kept"
        size = format_bytes(self.size)
        return f"features: {self.computed} sets computed, {self.found} from the cache ({size} of it in {self.folder})"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _place(
        self, manifest: Manifest, encoder: FrozenEncoder, wanted: Wanted, options: dict[str, Any]
    ) -> Path | None:
        if self.folder is None:
            return None
        try:
            who = self._identity(encoder)
        except UnknownIdentity as error:
            self._note(f"features of {encoder.name} were not kept: {error}")
            return None
        return self.folder / key_of(manifest, who, wanted, batch_size=options.get("batch_size", 16))

    def _identity(self, encoder: FrozenEncoder) -> Any:
        for known, found in self._known:
            if known is encoder:
                return found
        who = {"device": device_of(encoder).type, "encoder": identity(encoder)}
        self._known.append((encoder, who))  # all of its weights are read
        return self._known[-1][1]

    def _kept(
        self, place: Path, manifest: Manifest, encoder: FrozenEncoder, wanted: Wanted, options: dict[str, Any]
    ) -> Features | None:
        if not os.path.lexists(place):
            return None
        try:
            arrays, skipped = read_entry(place)
            features = features_of(arrays, wanted, skipped)
        except (DamagedEntry, KeyError, ValueError) as error:
            self._note(f"{place} was damaged ({error}); its features were computed again")
            _remove(place)
            return None
        if skipped and _can_be_read_now(manifest, encoder, skipped, options):
            _remove(place)
            return None
        self.size += _size(place)
        return features

    def _put(
        self, place: Path, manifest: Manifest, encoder: FrozenEncoder, wanted: Wanted, options: dict[str, Any]
    ) -> Features:
        skipped: list[Skipped] = []
        lost = False
        try:
            with new_folder(place) as folder:
                about = {"encoder": encoder.name, "clips": manifest.name, **dataclasses.asdict(wanted)}
                write_entry(folder, compute(manifest, encoder, wanted, skipped, **options), skipped, about)
                if not any(folder.iterdir()):
                    raise _nothing(manifest, skipped)
        except OSError as error:
            # Another process had the same features ready first; they are as good.
            lost = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and (place / ENTRY).is_file()
            if not lost:
                raise
        arrays, skipped = read_entry(place, check=lost)
        self.size += _size(place)
        if place.parent == self.folder and self._place(manifest, encoder, wanted, options) != place:
            _remove(place)  # the arrays that are open stay readable
            self._note(f"features were not kept in {place.parent}: a clip was changed while it was read")
        return features_of(arrays, wanted, skipped)


def _nothing(manifest: Manifest, skipped: list[Skipped]) -> ValueError:
    first = f"{skipped[0].path}: {skipped[0].reason}" if skipped else "there is none"
    return ValueError(f"no clip of the manifest could be embedded ({len(manifest)} clips). First: {first}")


def _can_be_read_now(
    manifest: Manifest, encoder: FrozenEncoder, skipped: list[Skipped], options: dict[str, Any]
) -> bool:
    """Whether a clip that failed when the entry was made, perhaps for want of a network, does so no more."""
    again = manifest.take(np.array([clip.index for clip in skipped], dtype=np.int64))
    return any(len(indices) for indices, _, _ in embed_manifest(again, encoder, **{**options, "progress": False}))


# ---------------------------------------------------------------- entries


def write_entry(folder: Path, chunks: Iterable[Arrays], skipped: list[Skipped], about: dict[str, Any]) -> None:
    """The arrays, chunk by chunk, into ``folder``; nothing at all where there is no chunk. ``about`` is for people."""
    with contextlib.ExitStack() as stack:
        writers: dict[str, _Writer] = {}
        for chunk in chunks:
            for name, array in chunk.items():
                if name not in writers:
                    writers[name] = _Writer(stack.enter_context(open(folder / f"{name}.npy", "wb")), array)
                writers[name].append(array)
        for writer in writers.values():
            writer.complete()
    if writers:
        sums = {name: sha256_of(folder / f"{name}.npy") for name in writers}
        left_out = [dataclasses.asdict(clip) for clip in skipped]
        entry = {"format": FORMAT, "about": about, "sha256": sums, "skipped": left_out}
        (folder / ENTRY).write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def read_entry(folder: Path, *, check: bool = True) -> tuple[Arrays, list[Skipped]]:
    """The arrays, memory-mapped, and the clips that have no row in them. Raises DamagedEntry."""
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        if entry["format"] != FORMAT:
            raise DamagedEntry(f"{ENTRY}: of format {entry['format']!r}, expected {FORMAT}")
        for name, expected in entry["sha256"].items():
            if check and sha256_of(folder / f"{name}.npy") != expected:
                raise DamagedEntry(f"{name}.npy: not what was written")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in entry["sha256"]}
        return arrays, [Skipped(**clip) for clip in entry["skipped"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, DamagedEntry) else DamagedEntry(str(error)) from None


class _Writer:
    """Streams an array into a ``.npy`` along its first axis."""

    def __init__(self, file: IO[bytes], like: np.ndarray) -> None:
        self._file, self._dtype, self._shape, self._count = file, like.dtype, like.shape[1:], 0
        file.write(b" " * _HEADER)

    def append(self, array: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(array, dtype=self._dtype).data)
        self._count += len(array)

    def complete(self) -> None:
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count, *self._shape)}
        text = repr(described).encode().ljust(_HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def _remove(folder: Path) -> None:
    """What an entry consists of, and the folder when nothing else is in it."""
    with contextlib.suppress(OSError):
        if folder.is_dir() and not folder.is_symlink():
            for path in (*folder.glob("*.npy"), folder / ENTRY):
                path.unlink(missing_ok=True)
            folder.rmdir()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


# ---------------------------------------------------------------- keys


def key_of(manifest: Manifest, who: Any, wanted: Wanted, *, batch_size: int) -> str:
    """``who``: the encoder's `identity`, and its device."""
    parts = {
        "format": FORMAT,
        "code": _code(),
        "torch": str(torch.__version__),
        "encoder": who,
        "wanted": dataclasses.asdict(wanted),
        "batch_size": batch_size,
        "clips": _clips(manifest),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _clips(manifest: Manifest) -> str:
    """Paths in order, and each file's `stamp`."""
    digest = hashlib.sha256()
    for index in range(len(manifest)):
        path = os.path.abspath(manifest.path(index))
        digest.update(os.fsencode(path) + b"\0" + stamp(manifest.audio(index)).encode() + b"\n")
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """Of the sources that features go through, so that no other version's features are ever taken for this one's."""
    digest = hashlib.sha256()
    own = Path(__file__).parents[1]
    kernels = Path(cat_kernels.__file__).parent
    for place in (*(own / name for name in _CODE), kernels):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
