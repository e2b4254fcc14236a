"""What an embed has done so far, in a folder beside its output, so that it goes on where it was stopped.

``OUT.npy.partial`` holds ``job.json``, which says what it is made with, and a file a block of clips, each of which
appears whole::

    000000000032.block    SHA-256 of what follows, in hexadecimal, and a newline
                          a line of JSON: the job's SHA-256, the places, which have rows, failures, the files' stamps
                          (k, D) float32, little-endian

A block is begun anew when a byte of it has changed, or a file that it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cat.config import differences
from cat.data.manifest import Manifest
from cat.encoders.identity import digest_of_stamps, stamp
from cat.encoders.reading import Skipped
from cat.files import clear_leftovers, replacing, write_json
from cat.locks import LOCK
from cat.outputs import OutputError, json_of

_JOB, _BLOCKS = "job.json", "[0-9]" * 12 + ".block"
_NAMES = ("encoder",)  # of the job, for people only: the encoder's identity decides


class DamagedBlock(ValueError):
    """A file that is not, or no longer, what was written."""


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


class Partial:
    """The folder. ``notes``: sentences for people.

    Raises: `OutputError` for a folder that is no embed's, or, without ``overwrite``, another job's.
    """

    def __init__(self, folder: Path, job: dict[str, Any], manifest: Manifest, *, dim: int, overwrite: bool) -> None:
        self.folder, self.notes, self._manifest, self._dim = folder, list[str](), manifest, dim
        self._job = _digest_of_job(job)
        self._blocks: dict[int, int] = {}  # where each begins and ends
        self.has_rows = False
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        if self._check(job, overwrite):
            self._take_up()
        else:
            self._clear()
            write_json(folder / _JOB, job)

    @property
    def done(self) -> int:
        """Places that need no more work."""
        return sum(end - begin for begin, end in self._blocks.items())

    def todo(self) -> list[range]:
        """The other places, in order."""
        found, at = [], 0
        for begin, end in sorted(self._blocks.items()):
            found.append(range(at, begin))
            at = end
        return [places for places in (*found, range(at, len(self._manifest))) if places]

    def add(self, block: Block) -> None:
        head = {
            "job": self._job,
            "end": block.end,
            "indices": block.indices.tolist(),
            "skipped": [[one.index, one.path, one.reason] for one in block.skipped],
            "stamps": digest_of_stamps(block.stamps),
        }
        content = json.dumps(head).encode() + b"\n" + np.ascontiguousarray(block.rows, dtype="<f4").tobytes()
        with replacing(self._path(block.begin)) as temporary:
            temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        self._blocks[block.begin] = block.end
        self.has_rows |= len(block.indices) > 0

    def blocks(self) -> Iterator[Block]:
        """All that is there, in order. Raises: `DamagedBlock`, OSError."""
        for begin in sorted(self._blocks):
            try:
                yield self._read(begin)[0]
            except DamagedBlock as error:
                path = self._path(begin)
                raise DamagedBlock(f"{path}: {error}; the same command embeds its clips again") from None

    def remove(self) -> None:
        """What it is made of, and the folder when nothing else is in it."""
        self._clear()
        (self.folder / _JOB).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, begin: int) -> Path:
        return self.folder / f"{begin:012d}.block"

    def _clear(self) -> None:
        for path in self.folder.glob(_BLOCKS):
            path.unlink()

    def _check(self, job: dict[str, Any], overwrite: bool) -> bool:
        """Whether the folder holds something to go on with."""
        try:
            found: dict[str, Any] | None = json_of(self.folder / _JOB, encoder=str, identity=str, clips=dict)
        except (OSError, ValueError, RecursionError):
            found = None
        if found is None:
            blocks = [path.name for path in self.folder.glob(_BLOCKS)]
            ours = (LOCK, *((_JOB, *blocks) if blocks else ()))
            if any(path.name not in ours for path in self.folder.iterdir()):
                raise OutputError(f"{self.folder} is not what an embed left; it is left alone. Give another -o.")
            if blocks:
                self.notes.append(f"{self.folder / _JOB} is damaged, nobody knows what blocks are of: begun afresh")
            return False
        if _digest_of_job(found) == self._job:
            return True
        if not overwrite:
            raise OutputError(
                f"{self.folder} holds what an embed had done when it was stopped, and it was another one: "
                f"{_reasons(found, job)}. The rows of both would not fit together. Give what was given then to go on "
                "with it, --overwrite (or delete it) to begin afresh, or another -o."
            )
        return False

    def _take_up(self) -> None:
        changed, damaged, at = 0, list[str](), 0
        for path in sorted(self.folder.glob(_BLOCKS)):
            begin = int(path.stem)
            try:
                block, stamps = self._read(begin)
                if begin < at:
                    raise DamagedBlock("it has places of the one before")
            except (OSError, DamagedBlock) as error:
                damaged.append(f"{path.name}: {error}")
                path.unlink()
                continue
            places = range(begin, block.end)
            if stamps != digest_of_stamps(stamp(self._manifest.audio(place)) for place in places):
                changed += 1
                path.unlink()
                continue
            self._blocks[begin] = at = block.end
            self.has_rows |= len(block.indices) > 0
        if damaged:
            self.notes.append(f"{len(damaged)} damaged blocks in {self.folder} are embedded again; first: {damaged[0]}")
        if changed:
            self.notes.append(f"{changed} blocks in {self.folder} are embedded again: audio files have changed since")

    def _read(self, begin: int) -> tuple[Block, str]:
        """A block and the digest of its stamps."""
        told, _, content = self._path(begin).read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != told:
            raise DamagedBlock("its SHA-256 is not the one that it begins with")
        line, _, rows = content.partition(b"\n")
        head = json.loads(line)
        if head["job"] != self._job:
            raise DamagedBlock("it is of another job")
        skipped = [Skipped(*one) for one in head["skipped"]]
        indices = np.array(head["indices"], dtype=np.int64)
        rows_KD = np.frombuffer(rows, "<f4").reshape(-1, self._dim)
        return Block(begin, head["end"], indices, rows_KD, skipped), head["stamps"]


def _digest_of_job(job: dict[str, Any]) -> str:
    decides = {key: value for key, value in job.items() if key not in _NAMES}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _reasons(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In which ways it was another job."""
    found = []
    if old["identity"] != new["identity"]:
        was, now = (f"{job['encoder']} ({job['identity'][:12]})" for job in (old, new))
        also = ", with other weights or settings" if old["encoder"] == new["encoder"] else ""
        found.append(f"the encoder was {was}, now {now}{also}")
    if old["clips"] != new["clips"]:
        was, now = (f"{job['clips'].get('count')}" for job in (old, new))
        found.append(f"the data set had {was} clips, now {now}" + (", other ones or in another order" * (was == now)))
    rest = (
        {key: value for key, value in job.items() if key not in (*_NAMES, "identity", "clips")} for job in (old, new)
    )
    found += [f"{key} was {was}, now {now}" for key, (was, now) in differences(*rest).items()]
    return "; ".join(found)
