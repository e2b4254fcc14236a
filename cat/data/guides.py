"""What guides say of a data set's clips, or hear of them: the embeddings of representation regularisation besides those
that the manifest itself names.

Shapes: B clips, D_e width of a guide's embeddings.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cat.data.embeddings import EmbeddingError, EmbeddingStore, open_embeddings
from cat.data.manifest import Manifest, load_manifest
from cat.data.matching import last_places


class Reader(Protocol):
    """Of a clip, by its place in the manifest: (n,) float32. It has to be picklable where processes are not forked.

    Raises: `AudioError` where there is nothing for it. The clip is then skipped and recorded.
    """

    def __call__(self, index: int, /) -> np.ndarray: ...


class Heard(NamedTuple):
    """Waveforms, one behind the other; of length 0: one to be read where it is encoded."""

    waves: Tensor  # (sum of lengths,) float32
    lengths: Tensor  # (B,) int64

    def clips(self) -> list[Tensor]:
        return list(self.waves.split(self.lengths.tolist()))


@dataclass(frozen=True)
class Guides:
    """Readers by the guides' names: of ``rows`` (D_e,), and of the ``waves`` (n,) that the training process encodes."""

    rows: Mapping[str, Reader] = field(default_factory=dict)
    waves: Mapping[str, Reader] = field(default_factory=dict)

    def read(self, index: int) -> dict[str, np.ndarray]:
        return {name: reader(index) for name, reader in {**self.rows, **self.waves}.items()}

    def stacked(self, read: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The fields ``guides`` and ``heard`` of a batch of clips that were read."""
        rows = {name: torch.from_numpy(np.stack([clip[name] for clip in read])) for name in self.rows if read}
        heard = {}
        for name in self.waves if read else ():
            waves = [clip[name] for clip in read]
            heard[name] = Heard(torch.from_numpy(np.concatenate(waves)), torch.tensor([len(wave) for wave in waves]))
        return {"guides": rows, "heard": heard}


class CachedRows:
    """The rows that ``cat-audio embed`` wrote with the manifest ``path``, for the clips of another one.

    Clips are known by where they lie, links among the folders resolved.

    Raises: `EmbeddingError` when that manifest names no embeddings, lacks clips, or names damaged embeddings or ones of
    other audio than there is (`EmbeddingStore.verify`); `ManifestError`.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        linked = load_manifest(path)
        store = open_embeddings(linked)
        if store is None:
            raise EmbeddingError(
                f"{path} names no embeddings; expected the manifest that `cat-audio embed` wrote beside OUT.npy"
            )
        self.store = store
        found = last_places(_places(manifest), _places(linked))
        self.rows = np.where(found < 0, -1, linked.rows[found])
        lacking = np.flatnonzero(self.rows < 0)
        if len(lacking):
            raise EmbeddingError(
                f"{path} has no embeddings of {len(lacking)} of the {len(manifest)} clips of {manifest.name}, the "
                f"first {manifest.path(int(lacking[0]))}: run `cat-audio embed` for all of them, or take only those "
                f"that have one: data.train={path}"
            )

        if isinstance(store, EmbeddingStore):
            store.verify(linked)

    @property
    def identity(self) -> dict[str, str | int]:
        """JSON-able: that of the rows, and which of them the clips have."""
        return {**self.store.identity, "rows": hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()}

    def __call__(self, index: int) -> np.ndarray:
        return self.store.rows([int(self.rows[index])])[0]


def _places(manifest: Manifest) -> Iterator[bytes]:
    """Where the clips lie."""
    folders: dict[str, bytes] = {}
    for path in manifest.columns.paths:
        begin = path.rfind("/") + 1
        folder = path[:begin]
        if folder not in folders:
            folders[folder] = os.fsencode(os.path.realpath(Path(manifest.root, folder))) + b"/"
        yield folders[folder] + path[begin:].encode("utf-8", "surrogateescape")
