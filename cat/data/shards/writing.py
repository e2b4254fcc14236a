"""A data set written as shards: tar files with ``KEY.flac`` (or whatever it is) and ``KEY.json`` of every clip.

Audio files are copied as they are, so that training on shards is training on the files, bit for bit. KEY is the clip's
number, the JSON what its manifest says. Which clips a shard has is settled by the files' sizes before anything is
written; a shard appears whole, and one that is there is not written again by the same command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.audio import AudioError, length_of
from cat.data.clips import Clips
from cat.data.content import Held
from cat.data.manifest import Manifest, fields_of, json_line, load_manifest
from cat.data.shards.index import COLUMNS, INDEX, open_index, write_index
from cat.data.shards.members import Member
from cat.data.text import ManifestError
from cat.data.workers import prefetched
from cat.files import check_writable, format_bytes, free_space, replacing, write_json
from cat.locks import sole_user
from cat.outputs import OutputError, json_of
from cat.progress import say, track

SHARD_BYTES = 256_000_000
_PARTIAL, _JOB = "partial", "job.json"
_BESIDE = 2048  # bytes of headers and JSON that a clip takes beside its samples, more or less


@dataclass(frozen=True)
class Written:
    """``failures``: paths of clips that could not be read and were left out, and why."""

    manifest: Manifest
    shards: int
    failures: list[tuple[str, str]]


def write_shards(
    manifest: Manifest,
    out: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    jobs: int = 1,
    progress: bool = False,
) -> Written:
    """Writes the clips into ``out``, about ``shard_bytes`` a shard, by several processes; the same files whatever
    ``jobs`` is. Stopped or killed, the same call goes on.

    Raises: `OutputError` where ``out`` holds something else; `ManifestError` when not one clip can be read;
    `cat.locks.InUseError`; OSError.
    """
    if shard_bytes < 1:
        raise ValueError(f"shards of {shard_bytes} bytes; expected at least 1")
    if manifest.embedding_files is not None:
        raise ManifestError(
            f"{manifest.name}: one .npy a clip cannot go with shards; gather them into one file first "
            "(cat.data.embeddings.gather_embeddings)"
        )
    out = Path(out)
    plan = _Plan.of(manifest, shard_bytes)
    with sole_user(out, remedy="another command writes shards there: wait for it, or give another folder"):
        if not _is_done(out, plan.job):
            _begin(out, plan)
            left = [number for number in range(len(plan)) if _told(out, number) is None]
            if len(left) < len(plan):
                say(f"{len(plan) - len(left)} of {len(plan)} shards are in {out} already; going on")
            _check_room(out, plan, left)
            made = prefetched(_Writer(manifest, plan, out), left, num_workers=min(jobs, len(left)) if jobs > 1 else 0)
            for _ in track(made, len(left), label="shards", unit="shards", enabled=progress):
                pass
            _finish(out, plan, manifest)
        _clear(out, plan)
    failures = [(path, reason) for path, reason in open_index(out).info["failures"]]
    return Written(load_manifest(out), len(plan), failures)


# ---------------------------------------------------------------- which clips a shard has


@dataclass(frozen=True)
class _Plan:
    begins: np.ndarray  # (shards + 1,): the number of each one's first clip, and the end
    bytes: np.ndarray  # (shards,) about
    job: str  # SHA-256 of what decides the content

    @classmethod
    def of(cls, manifest: Manifest, shard_bytes: int) -> _Plan:
        about = [_size_and_time(manifest.audio(index)) for index in range(len(manifest))]
        sizes = np.array([size for size, _ in about], dtype=np.int64) + _BESIDE
        shard = (np.cumsum(sizes) - sizes) // shard_bytes
        _, begins = np.unique(shard, return_index=True)
        decides = {
            "clips": manifest.identity,
            "shard_bytes": shard_bytes,
            "files": hashlib.sha256(np.array(about, dtype="<i8").tobytes()).hexdigest(),
        }
        job = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return cls(np.append(begins, len(manifest)), np.add.reduceat(sizes, begins), job)

    def __len__(self) -> int:
        return len(self.bytes)


def _size_and_time(audio: Path | Member) -> tuple[int, int]:
    if isinstance(audio, Member):
        return audio.size, audio.crc
    try:
        about = os.stat(audio)
    except (OSError, ValueError):
        return 0, 0
    return about.st_size, about.st_mtime_ns


# ---------------------------------------------------------------- one shard


class _Writer:
    """Item ``number`` writes that shard."""

    def __init__(self, manifest: Manifest, plan: _Plan, out: Path) -> None:
        self._manifest, self._plan, self._out = manifest, plan, out

    def __getitem__(self, number: int) -> int:
        columns: dict[str, list[int]] = {name: [] for name in ("clip", *COLUMNS[1:], "samples", "rate")}
        failures: list[tuple[str, str]] = []
        path = self._out / shard_name(number)
        with replacing(path) as temporary, tarfile.open(temporary, "x", format=tarfile.GNU_FORMAT) as tar:
            for index in range(*self._plan.begins[number : number + 2].tolist()):
                try:
                    content, samples, rate = _read(self._manifest.audio(index))
                except AudioError as error:
                    failures.append((error.path, error.reason))
                    continue
                clip = dataclasses.replace(
                    self._manifest.clips[index], samples=samples, sample_rate=rate, embedding=None
                )
                suffix = os.path.splitext(clip.path)[1].lower() or ".audio"
                offset = _add(tar, f"{index:09d}{suffix}", content)
                _add(tar, f"{index:09d}.json", json_line({"path": clip.path, **fields_of(clip)}))
                row = (index, offset, len(content), zlib.crc32(content), samples, rate)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
        write_json(
            _telling(self._out, number), {"bytes": path.stat().st_size, "columns": columns, "failures": failures}
        )
        return number


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _read(audio: Path | Member) -> tuple[bytes, int, int]:
    """A file, and its samples and rate. Raises: `AudioError`."""
    try:
        content = audio.content().getvalue() if isinstance(audio, Member) else audio.read_bytes()
    except Exception:
        length_of(audio)  # which says it in words
        raise
    samples, rate = length_of(Held(str(audio), content))
    if samples < 1:
        raise AudioError(audio, "empty: it has no samples")
    return content, samples, rate


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Where the content begins."""
    about = tarfile.TarInfo(name)  # of nobody, of 1970: the same bytes whenever and by whomever they are written
    about.size = len(content)
    about.mode = 0o644
    tar.addfile(about, io.BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - blocks


# ---------------------------------------------------------------- the folder


def _telling(out: Path, number: int) -> Path:
    return out / _PARTIAL / f"{number:06d}.json"


def _told(out: Path, number: int) -> dict[str, Any] | None:
    """What is said of a shard that is there whole."""
    try:
        told = json_of(_telling(out, number), bytes=int, columns=dict, failures=list)
        return told if (out / shard_name(number)).stat().st_size == told["bytes"] else None
    except (OSError, ValueError):
        return None


def _is_done(out: Path, job: str) -> bool:
    """Whether this job was done already. Raises: `OutputError` for another one's shards."""
    if not (out / INDEX).exists():
        return False
    try:
        done = open_index(out).info.get("job") == job
    except ManifestError as error:
        raise OutputError(f"{error}; or give another folder") from None
    if not done:
        raise OutputError(
            f"{out} holds shards of other clips, of files that have changed since, or of another size; they are left "
            "alone. Give another folder, or delete it"
        )
    return True


def _begin(out: Path, plan: _Plan) -> None:
    check_writable(out)
    job = out / _PARTIAL / _JOB
    if job.exists():
        if json_of(job, job=str)["job"] == plan.job:
            return
        raise OutputError(
            f"{out} holds what another command had written when it was stopped: of other clips, of files that have "
            "changed since, or shards of another size. Give what was given then to go on with it, another folder, or "
            "delete it"
        )
    there = [shard_name(number) for number in range(len(plan)) if (out / shard_name(number)).exists()]
    if there:
        raise OutputError(f"{out / there[0]} exists, and nothing says what it is of; give another folder, or delete it")
    write_json(job, {"job": plan.job})


def _check_room(out: Path, plan: _Plan, left: list[int]) -> None:
    needed, free = int(plan.bytes[left].sum()), free_space(out)
    if free is not None and needed > free:
        raise OutputError(
            f"{out}: the shards take about {format_bytes(needed)}, and {format_bytes(free)} are free there; make room, "
            "or give another folder"
        )


def _finish(out: Path, plan: _Plan, manifest: Manifest) -> None:
    tellings = [_told(out, number) for number in range(len(plan))]
    told = [one for one in tellings if one is not None]
    if len(told) < len(plan):
        raise OutputError(f"{out}: a shard has changed while the others were written; the same command writes it again")

    def column(name: str) -> np.ndarray:
        return np.array([*itertools.chain.from_iterable(one["columns"][name] for one in told)], dtype=np.int64)

    clips, counts = column("clip"), [len(one["columns"]["clip"]) for one in told]
    failures = [failure for one in told for failure in one["failures"]]
    if not len(clips):
        raise ManifestError(
            f"{manifest.name}: not one of its {len(manifest)} clips can be read; the first: {': '.join(failures[0])}"
        )
    columns = {name: column(name) for name in COLUMNS[1:]} | {"shard": np.repeat(np.arange(len(told)), counts)}
    dtypes = {"shard": "<i4", "offset": "<i8", "size": "<i8", "crc": "<u4"}
    info: dict[str, Any] = {
        "job": plan.job,
        "failures": failures,
        "label_names": manifest.label_names,
        "extra": manifest.extra,
    }
    if manifest.embeddings is not None:
        info["embeddings"] = os.path.relpath(os.path.realpath(manifest.embeddings), os.path.realpath(out))
        info["embeddings_fingerprint"] = manifest.embeddings_fingerprint
    write_index(
        out,
        Clips(_measured(manifest, clips, column("samples"), column("rate"))),
        {name: array.astype(dtypes[name]) for name, array in columns.items()},
        [(shard_name(number), one["bytes"]) for number, one in enumerate(told)],
        info,
    )


def _clear(out: Path, plan: _Plan) -> None:
    """What the index has made superfluous."""
    for path in (*(_telling(out, number) for number in range(len(plan))), out / _PARTIAL / _JOB):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (out / _PARTIAL).rmdir()


def _measured(manifest: Manifest, clips: np.ndarray, samples: np.ndarray, rates: np.ndarray) -> Iterator[Any]:
    for index, count, rate in zip(clips.tolist(), samples.tolist(), rates.tolist(), strict=True):
        yield dataclasses.replace(manifest.clips[index], samples=count, sample_rate=rate)
