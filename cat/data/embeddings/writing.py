"""Embeddings are written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cat.data.audio import AudioError
from cat.data.clips import Clips
from cat.data.embeddings.arrays import NPY_HEADER, npy_header
from cat.data.embeddings.reading import EmbeddingFiles, open_embeddings
from cat.data.embeddings.sidecar import EmbeddingError, sidecar_path
from cat.data.manifest import Manifest
from cat.data.verification import PieceSums, clip_samples
from cat.files import replacing, write_json


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
        self._file.write(b" " * NPY_HEADER)
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
        self._file.write(npy_header((len(self._indices), self._dim)))
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
