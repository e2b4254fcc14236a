"""What a long command has done so far of a manifest's clips, in a folder, so that it goes on where it was stopped.

The folder holds ``job.json``, which says what is made and with what, and a file a block of clips, each of which appears
whole::

    000000000032.block    SHA-256 of what follows, in hexadecimal, and a newline
                          a line of JSON: the job's SHA-256, where the places end, the stamps of the clips' files, and
                          what else the command notes
                          bytes of the command's own

A block is begun anew when a byte of it has changed, or a file that it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat.config import differences
from cat.data.audio import Source
from cat.data.manifest import Manifest
from cat.data.shards.members import Member
from cat.files import clear_leftovers, replacing, write_json
from cat.locks import LOCK
from cat.outputs import OutputError, json_of

_JOB, _BLOCKS = "job.json", "[0-9]" * 12 + ".block"


class DamagedBlock(ValueError):
    """A file that is not, or no longer, what was written."""


@dataclass(frozen=True)
class Piece:
    """Places ``begin`` to ``end`` of a manifest: what a command has made of them. ``stamps``: `digest_of_stamps` of the
    files of all places, before they were read."""

    begin: int
    end: int
    notes: dict[str, Any]
    content: bytes
    stamps: str


@dataclass(frozen=True)
class Work:
    """How a command speaks of what it does.

    ``job``: fields of a job, and their types. ``unseen``: those that are for people only. ``reasons(old, new)``: in
    which ways it was another job.
    """

    name: str  # "an embed"
    does: str  # "embeds"
    done: str  # "embedded"
    parts: str  # what of two jobs would not fit together: "rows"
    job: Mapping[str, type]
    reasons: Callable[[dict[str, Any], dict[str, Any]], str]
    remedy: str  # where the folder is another job's
    elsewhere: str = "another -o"
    unseen: tuple[str, ...] = ()


class Partial:
    """The folder. ``notes``: sentences for people.

    Raises: `OutputError` for a folder that is not the command's, or, without ``overwrite``, another job's.
    """

    def __init__(
        self, folder: Path, job: dict[str, Any], manifest: Manifest, work: Work, *, overwrite: bool = False
    ) -> None:
        self.folder, self.notes, self._manifest, self._work = folder, list[str](), manifest, work
        self.job = digest_of_job(job, work.unseen)
        self._blocks: dict[int, int] = {}  # where each begins and ends
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

    def keep(self, piece: Piece) -> None:
        head = {"job": self.job, "end": piece.end, "stamps": piece.stamps, **piece.notes}
        content = json.dumps(head).encode() + b"\n" + piece.content
        with replacing(self._path(piece.begin)) as temporary:
            temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        self._blocks[piece.begin] = piece.end

    def pieces(self) -> Iterator[Piece]:
        """All that is there, in order. Raises: `DamagedBlock`, OSError."""
        for begin in sorted(self._blocks):
            try:
                yield self._read(begin)
            except DamagedBlock as error:
                again = f"the same command {self._work.does} its clips again"
                raise DamagedBlock(f"{self._path(begin)}: {error}; {again}") from None

    def drop(self, begin: int) -> None:
        """A block whose clips are to be done again."""
        self._path(begin).unlink(missing_ok=True)
        self._blocks.pop(begin, None)

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
            found: dict[str, Any] | None = json_of(self.folder / _JOB, **self._work.job)
        except (OSError, ValueError, RecursionError):
            found = None
        if found is None:
            blocks = [path.name for path in self.folder.glob(_BLOCKS)]
            ours = (LOCK, *((_JOB, *blocks) if blocks else ()))
            if any(path.name not in ours for path in self.folder.iterdir()):
                raise OutputError(
                    f"{self.folder} is not what {self._work.name} left; it is left alone. Give {self._work.elsewhere}."
                )
            if blocks:
                self.notes.append(f"{self.folder / _JOB} is damaged, nobody knows what blocks are of: begun afresh")
            return False
        if digest_of_job(found, self._work.unseen) == self.job:
            return True
        if not overwrite:
            raise OutputError(
                f"{self.folder} holds what {self._work.name} had done when it was stopped, and it was another one: "
                f"{self._work.reasons(found, job)}. The {self._work.parts} of both would not fit together. "
                f"{self._work.remedy}"
            )
        return False

    def _take_up(self) -> None:
        changed, damaged, at = 0, list[str](), 0
        for path in sorted(self.folder.glob(_BLOCKS)):
            begin = int(path.stem)
            try:
                piece = self._read(begin)
                if begin < at:
                    raise DamagedBlock("it has places of the one before")
            except (OSError, DamagedBlock) as error:
                damaged.append(f"{path.name}: {error}")
                path.unlink()
                continue
            places = range(begin, piece.end)
            if piece.stamps != digest_of_stamps(stamp(self._manifest.audio(place)) for place in places):
                changed += 1
                path.unlink()
                continue
            self._blocks[begin] = at = piece.end
        again = f"blocks in {self.folder} are {self._work.done} again"
        if damaged:
            self.notes.append(f"{len(damaged)} damaged {again}; first: {damaged[0]}")
        if changed:
            self.notes.append(f"{changed} {again}: audio files have changed since")

    def _read(self, begin: int) -> Piece:
        told, _, content = self._path(begin).read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != told:
            raise DamagedBlock("its SHA-256 is not the one that it begins with")
        line, _, rest = content.partition(b"\n")
        head = json.loads(line)
        if head.pop("job") != self.job:
            raise DamagedBlock("it is of another job")
        return Piece(begin, head.pop("end"), head, rest, head.pop("stamps"))


def digest_of_job(job: dict[str, Any], unseen: tuple[str, ...] = ()) -> str:
    """SHA-256 of what decides."""
    decides = {key: value for key, value in job.items() if key not in unseen}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def changes(old: dict[str, Any], new: dict[str, Any], *, but: tuple[str, ...] = ()) -> list[str]:
    """In which ways two jobs differ: their ``clips``, each a ``count`` and a ``fingerprint``, and then their other
    fields but these."""
    found = []
    if old["clips"] != new["clips"]:
        was, now = (f"{job['clips'].get('count')}" for job in (old, new))
        found.append(f"the data set had {was} clips, now {now}" + (", other ones or in another order" * (was == now)))
    rest = ({key: value for key, value in job.items() if key not in ("clips", *but)} for job in (old, new))
    return found + [f"{key} was {was}, now {now}" for key, (was, now) in differences(*rest).items()]


def stamp(path: Source) -> str:
    """A file's size, and times of the last change of its content and, which no copy keeps, of its entry. Of a clip in a
    shard what the index says.

    Content is not read: it would take as long as decoding a clip again."""
    if isinstance(path, Member):
        return path.stamp
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        return type(error).__name__
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def digest_of_stamps(stamps: Iterable[str]) -> str:
    """SHA-256 of the stamps of some files, in order, with a newline between them."""
    digest = hashlib.sha256()
    for number, each in enumerate(stamps):
        digest.update(f"\n{each}".encode() if number else each.encode())
    return digest.hexdigest()
