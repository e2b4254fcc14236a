"""What an encode has done so far, in a folder beside its output, so that it goes on where it was stopped.

``OUT.parts`` holds ``job.json``, which says of what, and a folder a part, each of which appears whole::

    part-00000032/clips.json    the places it covers, of each file its seconds and frames, the failures, the SHA-256 of
                                all of it, and of the stamps of the files that it was made from
    part-00000032/clip.f32      (k, E) float32
    part-00000032/frames.f32    (R, D) float32, where frames were asked for

A part is ended every few seconds, and when the command is told to stop. From one on that is damaged, or whose audio
files have changed, all is done again. Shapes as in `cat.encoders.tables`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.manifest import Manifest
from cat.data.partial import digest_of_stamps, stamp
from cat.encoders.reading import Skipped
from cat.encoders.tables import Block
from cat.files import new_folder, write_json
from cat.locks import LOCK
from cat.outputs import OutputError, json_of

SECONDS = 10.0  # that a part takes at the least; more may be lost with a process that is killed
_JOB, _PARTS = "job.json", "part-" + "[0-9]" * 12


@dataclass(frozen=True)
class _Clip:
    index: int
    seconds: float
    rows: int


class Parts:
    """The folder. ``done``: places that need no more work; ``note``: a sentence for people, if there is one."""

    def __init__(self, folder: Path, job: dict[str, Any], manifest: Manifest, *, overwrite: bool) -> None:
        self.folder, self._job, self.note = folder, job, ""
        if folder.exists():
            self._check(overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _JOB).exists():
            write_json(folder / _JOB, job)
        self._drop_unsound(manifest)

    def _drop_unsound(self, manifest: Manifest) -> None:
        at, folders = 0, sorted(self.folder.glob(_PARTS))
        for number, folder in enumerate(folders):
            try:
                about = _read(folder)
                end, reason = int(about["end"]), ""
                if any(_sha256(folder / name) != told for name, told in about["sha256"].items()):
                    reason = "is damaged"
                elif about["stamps"] != digest_of_stamps(stamp(manifest.audio(place)) for place in range(at, end)):
                    reason = "is of audio files that have changed since"
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                reason = "is damaged"
            if reason:
                self.note = f"{folder} {reason}: from there on all is done again"
                for unsound in folders[number:]:
                    shutil.rmtree(unsound)
                return
            at = end

    def _check(self, overwrite: bool) -> None:
        try:
            found = json_of(self.folder / _JOB, encoder=dict, files=str)
        except (OSError, ValueError):
            found = None
        if found == self._job:
            return
        if found is None and any(path.name != LOCK for path in self.folder.iterdir()):
            raise OutputError(f"{self.folder} is not what an encode left; it is left alone. Give another -o.")
        if found is not None and not overwrite:
            raise OutputError(
                f"{self.folder} holds what an encode of other files, or by another encoder or other settings, had done "
                "when it was stopped. Give the same again to go on with it, --overwrite to begin afresh, or another -o."
            )
        self.remove()

    @property
    def done(self) -> int:
        places = [int(about["end"]) for _, about in self._all()]
        return max(places, default=0)

    @property
    def skipped(self) -> list[Skipped]:
        return [Skipped(*failure) for _, about in self._all() for failure in about["skipped"]]

    def blocks(self, paths: Callable[[int], str], times: Callable[[int], np.ndarray], width: int) -> Iterator[Block]:
        """All that is there, in order. ``paths`` is of a place, ``times`` of so many frames, ``width`` of frames."""
        for folder, about in self._all():
            clips = [_Clip(*clip) for clip in about["clips"]]
            if not clips:
                continue
            clip = np.fromfile(folder / "clip.f32", dtype="<f4").reshape(len(clips), -1)
            rows = np.array([one.rows for one in clips], dtype=np.int64)
            frames = folder / "frames.f32"
            there = np.memmap(frames, dtype="<f4", mode="r").reshape(-1, width) if frames.exists() else None
            yield Block(
                [paths(one.index) for one in clips],
                np.array([one.seconds for one in clips]),
                clip,
                rows,
                there,
                None if there is None else np.concatenate([times(count) for count in rows.tolist()]),
            )

    def remove(self) -> None:
        """What parts are made of, and the folder when nothing else is in it."""
        for folder in self.folder.glob(_PARTS):
            shutil.rmtree(folder)
        (self.folder / _JOB).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _all(self) -> list[tuple[Path, dict[str, Any]]]:
        return [(folder, _read(folder)) for folder in sorted(self.folder.glob(_PARTS))]


class Part:
    """One that is being written; as a context it appears in its end, with all files that are complete, whatever ends
    it."""

    def __init__(self, parts: Parts, begin: int) -> None:
        self._parts, self._begin, self._end = parts, begin, begin
        self._stamps: list[str] = []
        self._clips: list[_Clip] = []
        self._skipped: list[Skipped] = []
        self._complete = 0  # bytes of frames that belong to complete files
        self._rows = 0

    def __enter__(self) -> Part:
        self._begun = time.monotonic()
        self._stack = contextlib.ExitStack()
        name = self._parts.folder / f"part-{self._end:012d}"
        folder = self._stack.enter_context(new_folder(name))
        self._clip = self._stack.enter_context(open(folder / "clip.f32", "wb"))
        self._frames = self._stack.enter_context(open(folder / "frames.f32", "wb"))
        self._folder = folder
        return self

    @property
    def old(self) -> bool:
        return time.monotonic() - self._begun >= SECONDS

    def stamps(self, stamps: list[str]) -> None:
        """Of the files that come next."""
        self._stamps += stamps

    def frames(self, frames: np.ndarray) -> None:
        """The next (r, D) of the file that is being encoded."""
        self._frames.write(np.ascontiguousarray(frames, dtype="<f4").tobytes())
        self._rows += len(frames)

    def clip(self, index: int, seconds: float, clip: np.ndarray) -> None:
        """A file is complete: its embedding (E,)."""
        self._clip.write(np.ascontiguousarray(clip, dtype="<f4").tobytes())
        self._complete = self._frames.tell()
        self._clips.append(_Clip(index, seconds, self._rows))
        self._rows, self._end = 0, index + 1

    def skip(self, skipped: Skipped) -> None:
        self._frames.seek(self._complete)
        self._frames.truncate()
        self._rows, self._end = 0, max(self._end, skipped.index + 1)
        self._skipped.append(skipped)

    def __exit__(self, *exception: object) -> None:
        if not self._clips and not self._skipped:
            with contextlib.suppress(_NothingError), self._stack:
                raise _NothingError  # which removes the folder
            return
        with self._stack:
            self._frames.truncate(self._complete)
            for file in (self._clip, self._frames):
                file.flush()
            if not self._complete:
                (self._folder / "frames.f32").unlink()
            kept = [path for path in (self._folder / "clip.f32", self._folder / "frames.f32") if path.exists()]
            about = {
                "sha256": {path.name: _sha256(path) for path in kept},
                "stamps": digest_of_stamps(self._stamps[: self._end - self._begin]),
                "end": self._end,
                "clips": [[one.index, one.seconds, one.rows] for one in self._clips],
                "skipped": [[one.index, one.path, one.reason] for one in self._skipped],
            }
            text = json.dumps({**about, "own": _digest(about)})
            (self._folder / "clips.json").write_text(text, encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    about = json_of(folder / "clips.json", end=int, clips=list, skipped=list, sha256=dict, stamps=str, own=str)
    if about.pop("own") != _digest(about):
        raise ValueError(f"{folder / 'clips.json'}: not, or no longer, what was written")
    return about


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _NothingError(Exception):
    pass
