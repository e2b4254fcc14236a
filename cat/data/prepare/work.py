"""All files of a source, checked by several processes, to a folder: the same whatever their number.

    OUT/manifest.jsonl      the clips that can be used
    OUT/audio/              their files, where they were written anew
    OUT/rejected.jsonl      path and reason of each of the others
    OUT/duplicates.jsonl    the paths of clips that sound alike, sample by sample, a line each time
    OUT/report.json         counts, statistics, classes, settings; written last
    OUT/report.md           the same for people

What is not finished lies in ``OUT/partial`` (`cat.data.partial`) and ``OUT/audio.partial``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.audio import AudioError
from cat.data.decoding import import_library
from cat.data.manifest import Manifest, write_manifest
from cat.data.partial import Partial, Piece, Work, changes, digest_of_stamps, stamp
from cat.data.prepare.check import RECORD, PrepareConfig, check_file
from cat.data.prepare.clips import AUDIO, described, kept_clips, same_content
from cat.data.prepare.convert import Names
from cat.data.prepare.report import FORMAT, describe, kinds_of, readable
from cat.data.prepare.source import Source
from cat.data.workers import cores, prefetched
from cat.files import clear_leftovers, flush_all, flush_to_disk, replacing, write_json
from cat.locks import LOCK, sole_user
from cat.outputs import OutputError, json_of
from cat.progress import Progress, say
from cat_kernels import __version__

SECONDS = 10.0  # that a block takes at the least; so much is lost with a process that is killed
_AT_ONCE = 8  # files that a process checks before it tells
MANIFEST, REPORT = "manifest.jsonl", "report.json"
_REJECTED, _DUPLICATES, _READABLE = "rejected.jsonl", "duplicates.jsonl", "report.md"
_AUDIO_PARTIAL, _PARTIAL = f"{AUDIO}.partial", "partial"
_OURS = {MANIFEST, REPORT, _REJECTED, _DUPLICATES, _READABLE, AUDIO, _AUDIO_PARTIAL, _PARTIAL, LOCK}
_PACKAGES = ("numpy", "torch", "soundfile", "soxr")


class TooManyRejected(RuntimeError):
    """More files cannot be used than allowed."""


class FilesChanged(RuntimeError):
    """Audio files became others after they were checked or written."""


@dataclass(frozen=True)
class Prepared:
    """The folder and its ``report`` (`report.json`); ``fresh`` is False where all was there already."""

    folder: Path
    report: dict[str, Any]
    fresh: bool

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST


def prepare_clips(
    source: Source,
    out: Path,
    config: PrepareConfig | None = None,
    *,
    max_rejected_share: float = 0.5,
    jobs: int | None = None,
    progress: bool = False,
) -> Prepared:
    """Checks every file of ``source`` and fills the folder ``out``, which must be new, empty, or what the same call had
    begun or finished; of the source nothing is changed.

    Stopped or killed, it goes on where it was when it is called again. ``jobs``: processes (None: one a core).

    Raises: `OutputError` for a folder that holds something else; `TooManyRejected`, having written the reasons, when
    more than ``max_rejected_share`` of the clips cannot be used; `InUseError` while another process fills the folder.
    """
    config = config or PrepareConfig()
    if not 0 <= max_rejected_share <= 1:
        raise ValueError(f"max_rejected_share is {max_rejected_share}; expected a share from 0 to 1")
    if jobs is not None and jobs < 1:
        raise ValueError(f"{jobs} jobs; expected at least 1")
    _check_place(source, out)
    job = _job(source, config)
    with sole_user(out, remedy="another prepare fills it: wait for it, or give another -o"):
        if (report := _finished(source, out, job)) is not None:
            shutil.rmtree(out / _PARTIAL, ignore_errors=True)  # of one that was killed in its last moment
            return Prepared(out, report, fresh=False)
        _check_contents(out)
        partial = Partial(out / _PARTIAL, job, source.manifest, _PREPARE)
        if config.convert is not None and (out / AUDIO).exists():  # stopped just before its end
            os.rename(out / AUDIO, out / _AUDIO_PARTIAL)
        for note in partial.notes:
            say(note)
        if partial.done and progress:
            say(f"{partial.done} of {len(source.manifest)} files are done already, in {out}; going on")
        names = Names(source.manifest, f".{config.convert}") if config.convert else None
        try:
            checks = _Checks(source.manifest, config, out / _AUDIO_PARTIAL, names)
            _check_rest(checks, partial, len(source.manifest), jobs or cores(), progress)
            report = _assemble(source, out, config, partial, job, names, max_rejected_share)
        except BaseException as error:
            if not partial.done:
                partial.remove()
                shutil.rmtree(out / _AUDIO_PARTIAL, ignore_errors=True)
            elif not isinstance(error, TooManyRejected):
                say(f"{partial.done} of {len(source.manifest)} files are done, in {out}; the same command goes on")
            raise
        partial.remove()
    return Prepared(out, report, fresh=True)


# ---------------------------------------------------------------- whose folder it is


def _check_place(source: Source, out: Path) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{out} is a file; expected a folder to fill. Give another -o.")
    if source.searched is not None:
        searched, place = os.path.realpath(source.searched), os.path.realpath(out)
        if os.path.commonpath([searched, place]) == searched:
            raise OutputError(
                f"{out} lies in {source.searched}, in which all audio is a clip: what is written there would be too. "
                "Give an -o outside of it."
            )


def _finished(source: Source, out: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the same job, where it has been done."""
    if not os.path.lexists(out / REPORT):
        return None
    try:
        report = json_of(out / REPORT, format=str, made_with=dict, clips=dict, stamps=str)
        mine = report["format"] == FORMAT
    except (OSError, ValueError):
        mine = False
    if not mine:
        raise OutputError(f"{out / REPORT} is not what prepare writes; it is left alone. Give another -o.")
    old, new = ({**made, "versions": {}} for made in (report["made_with"], job))  # what is done is done
    reasons = _reasons(old, new) if old != new else ""
    manifest = source.manifest
    if not reasons and report["stamps"] != digest_of_stamps(stamp(manifest.audio(i)) for i in range(len(manifest))):
        reasons = "audio files have changed since"
    wanted = (MANIFEST, AUDIO) if job["convert"] else (MANIFEST,)
    reasons = reasons or ", ".join(f"{name} is missing" for name in wanted if not (out / name).exists())
    if reasons:
        raise OutputError(
            f"{out} holds what another prepare has made: {reasons}. Give another -o, or remove the folder."
        )
    return report


def _check_contents(out: Path) -> None:
    clear_leftovers(out)
    names = {path.name for path in out.iterdir()}
    begun = (out / _PARTIAL).is_dir()
    foreign = sorted(names - (_OURS if begun else {LOCK}))
    if foreign:
        raise OutputError(
            f"{out} has files in it that prepare did not write, such as {foreign[0]}; it fills a folder of its own. "
            "Give another -o."
        )


# ---------------------------------------------------------------- what is done


def _job(source: Source, config: PrepareConfig) -> dict[str, Any]:
    versions = {"cat-kernels": __version__, "libsndfile": import_library("soundfile").__libsndfile_version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    settings = asdict(config)
    features = {name: value for name, value in settings.pop("features").items() if name not in ("mean", "std")}
    clips = {"count": len(source.manifest), "fingerprint": source.manifest.fingerprint}
    return {"clips": clips, "features": features, **settings, "versions": versions}


def _reasons(old: dict[str, Any], new: dict[str, Any]) -> str:
    return "; ".join(changes(old, new))


_PREPARE = Work(
    name="a prepare",
    does="checks",
    done="checked",
    parts="results",
    job={"clips": dict, "features": dict, "versions": dict},
    reasons=_reasons,
    remedy="Give what was given then to go on with it, another -o, or remove the folder.",
)


class _Checks:
    """A data set whose items are some files that follow one another, checked."""

    def __init__(self, manifest: Manifest, config: PrepareConfig, audio: Path, names: Names | None) -> None:
        self._manifest, self._config, self._audio, self._names = manifest, config, audio, names

    def __getitem__(self, begin: int) -> _Checked:
        checked = _Checked(begin)
        for place in range(begin, min(begin + _AT_ONCE, len(self._manifest))):
            audio, target = self._manifest.audio(place), None
            checked.stamps.append(stamp(audio))
            if self._names is not None:
                target = self._audio / self._names[place]
            try:
                checked.records.append(check_file(audio, self._config, target))
                checked.written += [] if target is None else [target]
            except AudioError as error:
                checked.records.append(np.zeros((), RECORD))
                checked.rejected[place] = error.reason
        return checked


class _Checked:
    """Some places that follow one another: what their files are like, and why some cannot be used."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.records: list[np.ndarray] = []
        self.rejected: dict[int, str] = {}  # by place
        self.stamps: list[str] = []
        self.written: list[Path] = []

    @property
    def end(self) -> int:
        return self.begin + len(self.records)


def _check_rest(checks: _Checks, partial: Partial, count: int, jobs: int, progress: bool) -> None:
    begins = [begin for places in partial.todo() for begin in range(places.start, places.stop, _AT_ONCE)]
    workers = min(jobs, len(begins)) if jobs > 1 else 0
    bar = Progress(count, partial.done, label="prepare", unit="files", enabled=progress)
    waiting: list[_Checked] = []
    done, rejected = partial.done, 0

    def keep() -> None:
        if waiting:
            _keep(partial, waiting)
            waiting.clear()

    try:
        last = time.monotonic()
        for checked in prefetched(checks, begins, num_workers=workers):
            if waiting and checked.begin != waiting[-1].end:
                keep()
            waiting.append(checked)
            done += len(checked.records)
            rejected += len(checked.rejected)
            bar.advance(done, f"{rejected} rejected" if rejected else "")
            if time.monotonic() - last >= SECONDS:
                keep()
                last = time.monotonic()
    finally:
        bar.close()
        keep()


def _keep(partial: Partial, parts: Sequence[_Checked]) -> None:
    """One block of parts that follow one another; what they have written is on disk before it."""
    written = [path for part in parts for path in part.written]
    flush_all(sorted({*written, *(path.parent for path in written)}))
    records = np.stack([record for part in parts for record in part.records])
    rejected = {place: reason for part in parts for place, reason in part.rejected.items()}
    stamps = [each for part in parts for each in part.stamps]
    partial.keep(
        Piece(parts[0].begin, parts[-1].end, {"rejected": rejected}, records.tobytes(), digest_of_stamps(stamps))
    )


# ---------------------------------------------------------------- what is written


def _assemble(
    source: Source,
    out: Path,
    config: PrepareConfig,
    partial: Partial,
    job: dict[str, Any],
    names: Names | None,
    max_rejected_share: float,
) -> dict[str, Any]:
    """Everything, the report last; returns it."""
    manifest, pieces = source.manifest, list(partial.pieces())
    stamps = _checked_stamps(manifest, pieces)
    records = np.concatenate([np.frombuffer(piece.content, RECORD) for piece in pieces])
    reasons = {int(place): reason for piece in pieces for place, reason in piece.notes["rejected"].items()}
    rejected = [{"path": str(manifest.path(place)), "reason": reason} for place, reason in sorted(reasons.items())]
    rejected += [{"path": name, "reason": source.reason} for name in source.missing]
    _write_lines(out / _REJECTED, rejected)
    _check_share(out, rejected, len(manifest) + len(source.missing), len(reasons) == len(manifest), max_rejected_share)
    usable = np.ones(len(manifest), dtype=bool)
    usable[list(reasons)] = False
    groups = same_content(records, np.flatnonzero(usable))
    if config.drop_duplicates:
        usable[[place for group in groups for place in group[1:]]] = False
    if names is not None:
        _check_written(partial, pieces, records["bytes"], usable, names, out / _AUDIO_PARTIAL)
    kept = kept_clips(manifest, out / MANIFEST, records, usable, names, config.features.sample_rate)
    duplicates = described(manifest, groups)
    _write_lines(out / _DUPLICATES, duplicates)
    if names is not None:
        os.rename(out / _AUDIO_PARTIAL, out / AUDIO)
        _remove_dropped(out / AUDIO, names, usable, reasons)
        flush_to_disk(out)
    write_manifest(kept.manifest, out / MANIFEST)
    report = {
        "format": FORMAT,
        "version": 1,
        "source": source.name,
        **describe(source, records, usable, kept, rejected, duplicates, config),
        "made_with": job,
        "stamps": stamps,
    }
    with replacing(out / _READABLE) as temporary:
        temporary.write_text(readable(report), encoding="utf-8", errors="backslashreplace")
    write_json(out / REPORT, report)
    return report


def _checked_stamps(manifest: Manifest, pieces: Iterable[Piece]) -> str:
    """Of all files. Raises: `FilesChanged`."""

    def all_of_them() -> Iterator[str]:
        for piece in pieces:
            found = [stamp(manifest.audio(place)) for place in range(piece.begin, piece.end)]
            if piece.stamps != digest_of_stamps(found):
                raise FilesChanged("audio files have changed since they were checked; the same command does it again")
            yield from found

    return digest_of_stamps(all_of_them())


def _check_written(
    partial: Partial, pieces: Iterable[Piece], sizes: np.ndarray, usable: np.ndarray, names: Names, audio: Path
) -> None:
    """Raises: `FilesChanged` when a file that was written is not there as it was; its block is done again then."""
    wrong = []
    for piece in pieces:
        places = piece.begin + np.flatnonzero(usable[piece.begin : piece.end])
        found = [audio / names[place] for place in places.tolist() if _size(audio / names[place]) != sizes[place]]
        if found:
            partial.drop(piece.begin)
            wrong += found
    if wrong:
        raise FilesChanged(
            f"{len(wrong)} files are not, or no longer, what was written, such as {wrong[0]}; the same command writes "
            "them again"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _check_share(out: Path, rejected: list[dict[str, str]], listed: int, all_of_them: bool, most: float) -> None:
    if not all_of_them and len(rejected) <= most * listed:
        return
    what = "none can be used" if all_of_them else f"more than the allowed share of {most:g} (--max-rejected-share)"
    kinds = ", ".join(f"{count} {kind}" for kind, count in kinds_of(rejected).items())
    raise TooManyRejected(
        f"{len(rejected)} of {listed} files are rejected, {what}: {kinds}. Reasons: {out / _REJECTED}. The first: "
        f"{rejected[0]['path']}: {rejected[0]['reason']}"
    )


def _remove_dropped(audio: Path, names: Names, usable: np.ndarray, reasons: Collection[int]) -> None:
    """The files of clips that are left out although they could be used; not one that another clip has too."""
    dropped = {names[place] for place in np.flatnonzero(~usable).tolist() if place not in reasons}
    if dropped:
        dropped.difference_update(names[place] for place in np.flatnonzero(usable).tolist())
    for name in dropped:
        (audio / name).unlink(missing_ok=True)


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
