"""Rows of embeddings, in one array or a file a clip, for the clips of a manifest."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.audio import AudioError
from cat.data.embeddings.arrays import as_float32, checksum, open_rows, read_npy
from cat.data.embeddings.sidecar import EmbeddingError, read_sidecar, sidecar_path
from cat.data.manifest import Manifest
from cat.data.verification import changed_clip, damaged_piece

_SAMPLED = 256  # rows or files, spread evenly, that tell whether the content is still the same


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
        self._rows = open_rows(path)
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
        rows = as_float32(self._rows[np.asarray(indices, dtype=np.int64)])
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
            "sample": checksum([rows[sample]]),
            "identity": self._info.get("identity"),
            "made_with": self._info.get("made_with"),
            "audio": hashlib.sha256(json.dumps(clips, sort_keys=True).encode()).hexdigest() if clips else None,
        }

    def is_as_written(self) -> bool:
        """Whether the rows are to the last bit those that the sidecar was written for, as far as that says."""
        return self._sha256 is None or (self._rows.dtype == np.dtype("<f4") and self._checksum_of_all() == self._sha256)

    def _checksum_of_all(self) -> str:
        return checksum(self._rows[at : at + 4096] for at in range(0, len(self), 4096))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # a memory map would be pickled by its content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = open_rows(self.path)


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
            "sample": checksum(self._or_nothing(self.files[index]) for index in sample.tolist()),
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
        values = read_npy(path, lambda reason: AudioError(path, f"the external embedding cannot be read: {reason}"))
        vector = values.ndim > 0 and values.size == values.shape[-1] > 0 and values.dtype.kind in "fiu"
        row = as_float32(values.reshape(-1)) if vector else None
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
