"""What an embed has done so far, in ``OUT.npy.partial`` beside its output: see `cat.data.partial`.

A block notes which places have rows, and the failures; its bytes are the rows, (k, D) float32, little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cat.data import partial
from cat.data.manifest import Manifest
from cat.data.partial import DamagedBlock, Piece, Work, digest_of_stamps
from cat.encoders.reading import Skipped


@dataclass(frozen=True)
class Block:
    """Places ``begin`` to ``end`` of a manifest: rows (k, D) float32 of the clips at ``indices`` (k,), ``skipped`` the
    others. ``stamps``: of the files of all places, before they were read."""

    begin: int
    end: int
    indices: np.ndarray
    rows: np.ndarray
    skipped: list[Skipped] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """Of blocks that follow one another."""
        return cls(
            blocks[0].begin,
            blocks[-1].end,
            np.concatenate([block.indices for block in blocks]),
            np.concatenate([block.rows for block in blocks]),
            [skipped for block in blocks for skipped in block.skipped],
            [each for block in blocks for each in block.stamps],
        )


class Partial(partial.Partial):
    """The folder. Raises: `OutputError` for one that is no embed's, or, without ``overwrite``, another job's."""

    def __init__(self, folder: Path, job: dict[str, Any], manifest: Manifest, *, dim: int, overwrite: bool) -> None:
        super().__init__(folder, job, manifest, _EMBED, overwrite=overwrite)
        self._dim = dim

    @property
    def has_rows(self) -> bool:
        try:
            return any(len(block.indices) for block in self.blocks())
        except (OSError, DamagedBlock):
            return True

    def add(self, block: Block) -> None:
        notes = {
            "indices": block.indices.tolist(),
            "skipped": [[one.index, one.path, one.reason] for one in block.skipped],
        }
        rows = np.ascontiguousarray(block.rows, dtype="<f4").tobytes()
        self.keep(Piece(block.begin, block.end, notes, rows, digest_of_stamps(block.stamps)))

    def blocks(self) -> Iterator[Block]:
        """All that is there, in order. Raises: `DamagedBlock`, OSError."""
        for piece in self.pieces():
            skipped = [Skipped(*one) for one in piece.notes["skipped"]]
            indices = np.array(piece.notes["indices"], dtype=np.int64)
            rows_KD = np.frombuffer(piece.content, "<f4").reshape(-1, self._dim)
            yield Block(piece.begin, piece.end, indices, rows_KD, skipped)


def _reasons(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In which ways it was another job."""
    found = []
    if old["identity"] != new["identity"]:
        was, now = (f"{job['encoder']} ({job['identity'][:12]})" for job in (old, new))
        also = ", with other weights or settings" if old["encoder"] == new["encoder"] else ""
        found.append(f"the encoder was {was}, now {now}{also}")
    return "; ".join(found + partial.changes(old, new, but=("encoder", "identity")))


_EMBED = Work(
    name="an embed",
    does="embeds",
    done="embedded",
    parts="rows",
    job={"encoder": str, "identity": str, "clips": dict},
    reasons=_reasons,
    remedy="Give what was given then to go on with it, --overwrite (or delete it) to begin afresh, or another -o.",
    unseen=("encoder",),
)
