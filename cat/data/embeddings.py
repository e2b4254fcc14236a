"""External embeddings of a data set: one memory-mapped ``.npy`` (rows, D_e) and a small JSON beside it.

A row never parts from its clip: the manifest names each clip's row and the fingerprint of the list that the rows were
computed for, and both are checked when the file is opened. The JSON also says what made the rows, their SHA-256, all in
all and piece by piece, and of some clips size and content (`cat.data.verification`); `EmbeddingStore.verify` compares.
The released layout, one ``.npy`` a clip, is read too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cat.data.audio import AudioError
from cat.data.clips import Clips
from cat.data.manifest import Manifest
from cat.data.verification import PieceSums, changed_clip, clip_samples, damaged_piece
from cat.files import replacing, write_json

_NPY_HEADER = 128  # bytes; enough for any number of rows, so that the header can be written last
_SAMPLED = 256  # rows or files, spread evenly, that tell whether the content is still the same


class EmbeddingError(ValueError):
    """An embedding file that cannot be used, or does not belong to the manifest."""


class EmbeddingStore:
    """Rows of external embeddings: ``store.rows([0, 5])`` is (2, dim) float32. Open it with `open_embeddings`."""

    def __init__(self, path: Path, fingerprint: str | None = None) -> None:
        sidecar = sidecar_path(path)
        if not path.exists() or not sidecar.exists():
            missing = sidecar if path.exists() else path
            raise EmbeddingError(f"{missing}: no such file; run `cat-audio embed` for this manifest (again)")
        info = read_sidecar(sidecar)
        if fingerprint is not None and fingerprint != info["fingerprint"]:
            raise EmbeddingError(
                f"{path}: its rows were computed for another list of clips ({info['manifest']}) than this manifest's; "
                "use the manifest that `cat-audio embed` wrote with it, or run it again"
            )
        self.path = path
        self.encoder: str = info["encoder"]
        self._info = info
        self._sha256: str | None = info.get("sha256")
        self._rows = _open_rows(path)
        if list(self._rows.shape) != [info["count"], info["dim"]]:
            raise EmbeddingError(
                f"{path}: shape {self._rows.shape}, but {sidecar.name} says {(info['count'], info['dim'])}; "
                "the two are not from the same run of `cat-audio embed`"
            )

    def __len__(self) -> int:
        return self._rows.shape[0]

    @property
    def dim(self) -> int:
        """D_e."""
        return self._rows.shape[1]

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), dim) float32, a copy. A row that is not finite is an AudioError, named as in ``clap.npy[17]``:
        its clip is then skipped and recorded."""
        rows = _as_float32(self._rows[np.asarray(indices, dtype=np.int64)])
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            index = indices[int(finite.argmin())]
            raise AudioError(f"{self.path}[{index}]", "this row, the clip's external embedding, is NaN or infinite")
        return rows

    def verify(self, manifest: Manifest) -> None:
        """Whether the rows are those that were written, and the clips those that they were made of: up to 2 GB of rows,
        and of larger files pieces all over them; 256 clips. What an earlier version did not note is not compared.

        Raises: EmbeddingError that names the file.
        """
        damaged = damaged_piece(self._rows, self._info["pieces"]) if self._info.get("pieces") else None
        if damaged is not None:
            raise EmbeddingError(
                f"{self.path}: damaged, or changed since it was written: the SHA-256 of rows {damaged.start} to "
                f"{damaged.stop - 1} is another one. Run `cat-audio embed` again; if it was changed on purpose, delete "
                f"'pieces' and 'sha256' from {sidecar_path(self.path).name}"
            )
        changed = changed_clip(manifest, self._info.get("clips") or {})
        if changed is not None:
            raise EmbeddingError(
                f"{changed} is another file than the one whose embedding is in {self.path}: its size or content has "
                "changed. Put the audio of then back, or run `cat-audio embed` again"
            )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Equal for equal rows of the same encoder, JSON-able; a run compares it before it goes on.

        ``sha256`` is that of the rows when they were written (computed here for a sidecar that lacks it); ``sample`` is
        of some rows as they are now, and so tells whether another program has written the array since. ``identity`` is
        the encoder's, ``made_with`` and ``audio`` what else rows depend on: they tell why rows are others.
        """
        clips = self._info.get("clips")
        rows = self._rows
        sample = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).astype(np.int64))
        return {
            "encoder": self.encoder,
            "count": len(rows),
            "dim": self.dim,
            "sha256": self._sha256 or self._checksum_of_all(),
            "sample": _checksum([rows[sample]]),
            "identity": self._info.get("identity"),
            "made_with": self._info.get("made_with"),
            "audio": hashlib.sha256(json.dumps(clips, sort_keys=True).encode()).hexdigest() if clips else None,
        }

    def is_as_written(self) -> bool:
        """Whether the rows are to the last bit those that the sidecar was written for, as far as that says."""
        return self._sha256 is None or (self._rows.dtype == np.dtype("<f4") and self._checksum_of_all() == self._sha256)

    def _checksum_of_all(self) -> str:
        return _checksum(self._rows[at : at + 4096] for at in range(0, len(self), 4096))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # a memory map would be pickled by its content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = _open_rows(self.path)


class EmbeddingFiles:
    """The released layout, a ``.npy`` of shape (dim,) or (1, dim) a clip, behind `EmbeddingStore`'s interface."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.encoder = "unknown"
        self.dim = self._usual_width()

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), dim) float32. An unusable file is an AudioError: its clip is then skipped and recorded."""
        rows = np.empty((len(indices), self.dim), dtype=np.float32)
        for row, index in zip(rows, indices, strict=True):
            values = self._load(self.files[index])
            if values.size != self.dim:
                raise AudioError(self.files[index], f"an embedding of width {values.size}, the others have {self.dim}")
            row[:] = values
        return rows

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As `EmbeddingStore.identity`, by the content of some of the files."""
        sample = np.unique(np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(np.int64))
        return {
            "encoder": self.encoder,
            "count": len(self),
            "dim": self.dim,
            "sample": _checksum(self._or_nothing(self.files[index]) for index in sample.tolist()),
        }

    def _usual_width(self) -> int:
        """The commonest of the first few files that can be read: one odd file must not make all others the odd ones."""
        widths = (self._or_nothing(file).size for file in self.files[:100])
        few = list(itertools.islice(filter(None, widths), 5))
        if not few:
            raise EmbeddingError(
                f"{self.files[0]}: no embedding can be read from it (nor from the next ones); correct the clap_path "
                "entries"
            )
        return statistics.mode(few)

    def _or_nothing(self, path: Path) -> np.ndarray:
        try:
            return self._load(path)
        except AudioError:
            return np.empty(0, dtype=np.float32)

    @staticmethod
    def _load(path: Path) -> np.ndarray:
        values = _read_npy(path, lambda reason: AudioError(path, f"the external embedding cannot be read: {reason}"))
        vector = values.ndim > 0 and values.size == values.shape[-1] > 0 and values.dtype.kind in "fiu"
        row = _as_float32(values.reshape(-1)) if vector else None
        if row is None or not np.isfinite(row).all():
            raise AudioError(
                path,
                f"an embedding must be (dim,) or (1, dim) finite numbers, got shape {values.shape}, {values.dtype}",
            )
        return row


def open_embeddings(manifest: Manifest) -> EmbeddingStore | EmbeddingFiles | None:
    """The manifest's external embeddings, checked against its clips; None if it has none.

    Raises EmbeddingError when the file is missing, was computed for another list, or a clip has no row in it.
    """
    store: EmbeddingStore | EmbeddingFiles
    if manifest.embeddings is not None:
        store = EmbeddingStore(manifest.embeddings, manifest.embeddings_fingerprint)
    elif manifest.embedding_files is not None:
        store = EmbeddingFiles(manifest.embedding_files)
    else:
        return None
    outside = np.flatnonzero((manifest.rows < 0) | (manifest.rows >= len(store)))
    if len(outside):
        clip = manifest.clips[int(outside[0])]
        what = "no embedding row" if clip.embedding is None else f"embedding row {clip.embedding}"
        raise EmbeddingError(
            f"{manifest.name}: {clip.path} has {what}, the embeddings have rows 0 to {len(store) - 1}; "
            "remove the clip or run `cat-audio embed` again"
        )
    return store


class EmbeddingWriter:
    """Streams embeddings into one ``.npy``, which appears under its name only when everything is in it::

        with EmbeddingWriter("clap.npy", manifest, dim=512, encoder="clap") as writer:
            for indices, rows in ...:            # clips may be left out: they will not be in the linked manifest
                writer.append(indices, rows)
        write_manifest(writer.manifest, "clap.jsonl")

    ``writer.manifest`` holds the embedded clips, each with its row. An exception inside leaves no file behind.
    ``identity`` (of the encoder's weights and settings) and ``made_with`` stand in the sidecar.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        *,
        dim: int,
        encoder: str,
        identity: str | None = None,
        made_with: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".npy":
            raise EmbeddingError(f"{self.path}: embeddings are written as .npy; name the file so")
        self._source, self._dim, self._encoder = manifest, dim, encoder
        self._indices: dict[int, None] = {}  # of the clips, in the order of their rows
        self._identity, self._made_with = identity, made_with
        self._sha256, self._pieces = hashlib.sha256(), PieceSums(dim)
        self._linked: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The embedded clips with their rows; after the block only."""
        if self._linked is None:
            raise EmbeddingError(f"{self.path}: not complete; writer.manifest is there after the `with` block")
        return self._linked

    def append(self, indices: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        """rows (k, dim), finite; row i is that of clip ``indices[i]`` of the manifest."""
        rows = np.ascontiguousarray(rows, dtype="<f4")
        if rows.shape != (len(indices), self._dim):
            raise EmbeddingError(f"rows of shape {rows.shape}; expected ({len(indices)}, {self._dim})")
        if not np.isfinite(rows).all():
            raise EmbeddingError("an embedding has NaN or infinite values; leave that clip out")
        for index in map(int, indices):
            if index in self._indices:
                raise EmbeddingError(f"clip {index} ({self._source.clips[index].path}) was given an embedding twice")
            self._indices[index] = None
        content = rows.tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._pieces.update(content)

    def __enter__(self) -> EmbeddingWriter:
        self._stack = contextlib.ExitStack()
        temporary = self._stack.enter_context(replacing(self.path))
        self._file = self._stack.enter_context(open(temporary, "wb"))
        self._file.write(b" " * _NPY_HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, value, trace)
            return
        sidecar = sidecar_path(self.path)
        with self._stack:  # leaving it gives the array its name
            self._complete()
            # Without its sidecar the array does not open, so a crash between the two renames cannot mix two runs.
            sidecar.unlink(missing_ok=True)
        clips = (
            dataclasses.replace(self._source.clips[index], embedding=row) for row, index in enumerate(self._indices)
        )
        linked = dataclasses.replace(
            self._source,
            clips=Clips(clips),
            embeddings=self.path,
            embedding_files=None,
            embeddings_fingerprint=None,
        )
        linked = dataclasses.replace(linked, embeddings_fingerprint=linked.fingerprint)
        info = {
            "encoder": self._encoder,
            "identity": self._identity,
            "made_with": self._made_with,
            "count": len(linked),
            "dim": self._dim,
            "sha256": self._sha256.hexdigest(),
            "manifest": str(self._source.source),
            "fingerprint": linked.fingerprint,
            "pieces": self._pieces.all(),
            "clips": clip_samples(linked),
        }
        write_json(sidecar, info)
        self._linked = linked

    def _complete(self) -> None:
        if not self._indices:
            raise EmbeddingError(f"{self.path}: not one clip was embedded; nothing written")
        self._file.seek(0)
        self._file.write(_npy_header((len(self._indices), self._dim)))
        # While the old array still has its sidecar: an error of writing leaves both.
        self._file.flush()
        os.fsync(self._file.fileno())


def gather_embeddings(manifest: Manifest, path: str | os.PathLike[str], *, encoder: str) -> Manifest:
    """The released one-``.npy``-a-clip layout into one file at ``path``; returns the manifest that refers to it.

    Clips whose embedding cannot be read are left out; a note of the manifest says how many, and why the first.
    """
    store = open_embeddings(manifest)
    if not isinstance(store, EmbeddingFiles):
        raise EmbeddingError(f"{manifest.name}: its embeddings are not one .npy a clip; there is nothing to gather")
    target = os.path.abspath(path)
    if os.path.exists(target) and any(os.path.abspath(file) == target for file in store.files):
        raise EmbeddingError(f"{path}: is one of the files to gather; give another name")
    left_out: list[AudioError] = []
    with EmbeddingWriter(path, manifest, dim=store.dim, encoder=encoder) as writer:
        for index, row in enumerate(manifest.rows.tolist()):
            try:
                rows = store.rows([row])
            except AudioError as error:
                left_out.append(error)
            else:
                writer.append([index], rows)
    if not left_out:
        return writer.manifest
    note = f"{path}: {len(left_out)} of {len(manifest)} clips left out, without an embedding; first: {left_out[0]}"
    return dataclasses.replace(writer.manifest, notes=(*manifest.notes, note))


def sidecar_path(path: Path) -> Path:
    """``clap.npy`` -> ``clap.npy.json``."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any]:
    """What is known of the rows. Raises EmbeddingError for a file that is damaged, or not such a one."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EmbeddingError(f"{path}: damaged ({error}); run `cat-audio embed` again") from None
    for key, kind in (("encoder", str), ("manifest", str), ("fingerprint", str), ("count", int), ("dim", int)):
        value = info.get(key) if isinstance(info, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise EmbeddingError(
                f"{path}: damaged (no {key!r} of type {kind.__name__} in it); run `cat-audio embed` again"
            )
    optional: dict[str, type] = {"sha256": str, "identity": str, "made_with": dict, "pieces": list, "clips": dict}
    for key, expected in optional.items():
        if not isinstance(info.get(key), expected | None):
            found = f"{key!r} is not of type {expected.__name__}"
            raise EmbeddingError(f"{path}: damaged ({found}); run `cat-audio embed` again")
    pieces, clips = info.get("pieces") or [], info.get("clips") or {}
    if not all(isinstance(text, str) for text in (*pieces, *clips.values())) or not all(map(str.isdecimal, clips)):
        raise EmbeddingError(f"{path}: damaged ('pieces' or 'clips' hold no text); run `cat-audio embed` again")
    return info


def _open_rows(path: Path) -> np.ndarray:
    def damaged(reason: str) -> EmbeddingError:
        return EmbeddingError(f"{path}: not a readable .npy array ({reason}); run `cat-audio embed` again")

    rows = _read_npy(path, damaged)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise EmbeddingError(f"{path}: expected a (rows, dim) array of floats, got {rows.dtype} {rows.shape}")
    return rows


def _read_npy(path: Path, damaged: Callable[[str], Exception]) -> np.ndarray:
    """A .npy file, memory-mapped: never a .npz or a pickle, and a header that lies about the size allocates nothing."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of a damaged header also TokenError, SyntaxError, ...: numpy has Python read it
        raise damaged(str(error)) from None


def _as_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinite, and is then refused
        return np.array(values, dtype=np.float32)


def _checksum(parts: Iterable[np.ndarray]) -> str:
    """SHA-256 of the numbers as little-endian float32, as `EmbeddingWriter` writes them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
    return digest.hexdigest()


def _npy_header(shape: tuple[int, int]) -> bytes:
    """A .npy version 1.0 header of exactly `_NPY_HEADER` bytes for a C-ordered little-endian float32 array."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.encode().ljust(_NPY_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little") + body
