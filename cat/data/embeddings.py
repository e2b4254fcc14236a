"""External embeddings of a data set: one memory-mapped ``.npy`` (rows, D_e) and a small JSON beside it.

A row never parts from its clip: the manifest names each clip's row and the fingerprint of the list that the rows were
computed for, and both are checked when the file is opened. The released layout, one ``.npy`` a clip, is read too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cat.data.audio import AudioError
from cat.data.manifest import Clip, Manifest
from cat.files import write_json

_NPY_HEADER = 128  # bytes; enough for any number of rows, so that the header can be written last


class EmbeddingError(ValueError):
    """An embedding file that cannot be used, or does not belong to the manifest."""


class EmbeddingStore:
    """Rows of external embeddings: ``store.rows([0, 5])`` is (2, dim) float32. Open it with `open_embeddings`."""

    def __init__(self, path: Path, fingerprint: str | None = None) -> None:
        sidecar = sidecar_path(path)
        if not path.exists() or not sidecar.exists():
            missing = sidecar if path.exists() else path
            raise EmbeddingError(f"{missing}: no such file; run `cat-audio embed` for this manifest (again)")
        info = json.loads(sidecar.read_text(encoding="utf-8"))
        if fingerprint is not None and fingerprint != info["fingerprint"]:
            raise EmbeddingError(
                f"{path}: its rows were computed for another list of clips ({info['manifest']}) than this manifest's; "
                "use the manifest that `cat-audio embed` wrote with it, or run it again"
            )
        self.path = path
        self.encoder: str = info["encoder"]
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
        """(len(indices), dim) float32, a copy."""
        return np.asarray(self._rows[np.asarray(indices, dtype=np.int64)], dtype=np.float32)

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """Equal for equal rows of the same encoder, JSON-able; a run compares it before it goes on."""
        digest = hashlib.sha256()
        for at in range(0, len(self), 4096):
            digest.update(np.ascontiguousarray(self._rows[at : at + 4096], dtype="<f4").tobytes())
        return {"encoder": self.encoder, "count": len(self), "dim": self.dim, "sha256": digest.hexdigest()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # a memory map would be pickled by its content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = _open_rows(self.path)


class EmbeddingFiles:
    """The released layout, a ``.npy`` of shape (dim,) or (1, dim) a clip, behind `EmbeddingStore`'s interface."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.encoder = "unknown"
        self.dim = self._load(self._first_readable()).size

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
    def identity(self) -> dict[str, str | int]:
        """As `EmbeddingStore.identity`, by the names of the files."""
        digest = hashlib.sha256("\n".join(map(str, self.files)).encode("utf-8", "surrogateescape"))
        return {"encoder": self.encoder, "count": len(self), "dim": self.dim, "sha256": digest.hexdigest()}

    def _first_readable(self) -> Path:
        for file in self.files[:100]:
            if file.is_file():
                return file
        raise EmbeddingError(f"{self.files[0]}: no such file (nor the next ones); correct the clap_path entries")

    @staticmethod
    def _load(path: Path) -> np.ndarray:
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise AudioError(path, f"the external embedding cannot be read: {error}") from None
        if values.size == 0 or values.size != values.shape[-1] or not np.isfinite(values).all():
            raise AudioError(path, f"an embedding must be (dim,) or (1, dim) finite numbers, got shape {values.shape}")
        return values.reshape(-1)


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
    for clip in manifest.clips:
        if clip.embedding is None or clip.embedding >= len(store):
            what = "no embedding row" if clip.embedding is None else f"embedding row {clip.embedding}"
            raise EmbeddingError(
                f"{manifest.source}: {clip.path} has {what}, the embeddings have rows 0 to {len(store) - 1}; "
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
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest, *, dim: int, encoder: str) -> None:
        self.path = Path(path)
        if self.path.suffix != ".npy":
            raise EmbeddingError(f"{self.path}: embeddings are written as .npy; name the file so")
        self._source, self._dim, self._encoder = manifest, dim, encoder
        self._clips: list[Clip] = []
        self._seen: set[int] = set()
        self._linked: Manifest | None = None
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

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
            if index in self._seen:
                raise EmbeddingError(f"clip {index} ({self._source.clips[index].path}) was given an embedding twice")
            self._seen.add(index)
            self._clips.append(dataclasses.replace(self._source.clips[index], embedding=len(self._clips)))
        self._file.write(rows.tobytes())

    def __enter__(self) -> EmbeddingWriter:
        self._file = open(self._temporary, "wb")  # closed in __exit__
        self._file.write(b" " * _NPY_HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        if not self._clips:
            raise EmbeddingError(f"{self.path}: not one clip was embedded; nothing written")
        self._file.seek(0)
        self._file.write(_npy_header((len(self._clips), self._dim)))
        self._file.flush()
        os.fsync(self._file.fileno())
        linked = dataclasses.replace(
            self._source,
            clips=tuple(self._clips),
            embeddings=self.path,
            embedding_files=None,
            embeddings_fingerprint=None,
        )
        linked = dataclasses.replace(linked, embeddings_fingerprint=linked.fingerprint)
        info = {
            "encoder": self._encoder,
            "count": len(self._clips),
            "dim": self._dim,
            "manifest": str(self._source.source),
            "fingerprint": linked.fingerprint,
        }
        # Without its sidecar the array does not open, so a crash between the two renames cannot mix two runs.
        sidecar = sidecar_path(self.path)
        sidecar.unlink(missing_ok=True)
        os.replace(self._temporary, self.path)
        write_json(sidecar, info)
        self._linked = linked


def gather_embeddings(manifest: Manifest, path: str | os.PathLike[str], *, encoder: str) -> Manifest:
    """The released one-``.npy``-a-clip layout into one file at ``path``; returns the manifest that refers to it.

    Clips whose embedding cannot be read are left out.
    """
    store = open_embeddings(manifest)
    if not isinstance(store, EmbeddingFiles):
        raise EmbeddingError(f"{manifest.source}: its embeddings are not one .npy a clip; there is nothing to gather")
    with EmbeddingWriter(path, manifest, dim=store.dim, encoder=encoder) as writer:
        for index, clip in enumerate(manifest.clips):
            try:
                rows = store.rows([index if clip.embedding is None else clip.embedding])
            except AudioError:
                continue
            writer.append([index], rows)
    return writer.manifest


def sidecar_path(path: Path) -> Path:
    """``clap.npy`` -> ``clap.npy.json``."""
    return path.with_name(path.name + ".json")


def _open_rows(path: Path) -> np.ndarray:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise EmbeddingError(f"{path}: not a readable .npy array ({error}); run `cat-audio embed` again") from None
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise EmbeddingError(f"{path}: expected a (rows, dim) array of floats, got {rows.dtype} {rows.shape}")
    return rows


def _npy_header(shape: tuple[int, int]) -> bytes:
    """A .npy version 1.0 header of exactly `_NPY_HEADER` bytes for a C-ordered little-endian float32 array."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.encode().ljust(_NPY_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little") + body
