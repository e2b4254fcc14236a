"""A folder that `cat-audio synth` has filled: which files in it are its own, and how others take their place.

Its ``synth.json`` names every file, with a checksum. What is not named, or is another file now, is somebody else's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cat.files import clear_leftovers, new_folder, replacing, write_json
from cat.outputs import json_of
from cat.signals import StopSignals

SETTINGS_FILE = "synth.json"
SPLITS = ("train", "valid", "test")
# No settings file may make this command delete anything else.
_NAMES = re.compile(r"(train|valid|test)(\.jsonl|/(\w+)/\3-\d{5,}\.(wav|flac|ogg))")

Marks = dict[str, list[int] | None]  # of a file's name: the marks (`_mark`) it may have; None: it was not recorded


def read_folder(out: Path) -> dict[str, Any] | None:
    """The settings file of the data set in `out`; None where nothing is. FileExistsError for anything else."""
    if not os.path.lexists(out):
        return None
    if out.is_dir():
        clear_leftovers(out)
        if not any(out.iterdir()):
            return None
    try:
        counts = {"clips_per_class": int, "eval_clips_per_class": int}
        return {"files": None, **json_of(out / SETTINGS_FILE, version=int, seed=int, classes=list, **counts)}
    except (OSError, ValueError):
        raise FileExistsError(f"{out} exists and was not made by cat-audio synth; name another folder") from None


def check_same(out: Path, made: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises FileExistsError unless the data set in `out` has these settings, and all of its files."""
    if made.get("replacing"):
        raise FileExistsError(f"{out}: replacing its data set was interrupted; finish it with --force")
    if {key: value for key, value in made.items() if key != "files"} != settings:
        raise FileExistsError(
            f"{out} holds a data set of other settings; name another folder, or replace it with --force"
        )
    missing = next((name for name in made["files"] or () if not (out / name).is_file()), None)
    if missing is not None:
        raise FileExistsError(f"{out} is not complete, {missing} is missing; make it again with --force")


def fill(
    out: Path,
    made: dict[str, Any] | None,
    settings: dict[str, Any],
    names: Iterable[str],
    make: Callable[[Path], None],
) -> None:
    """Has `make` write the files `names` into a hidden folder, and puts them into `out` when all are there.

    `made` is what `read_folder` says: the files of that data set are replaced or deleted, and nothing else. Raises
    FileExistsError, before anything is made, for one of them that has changed and for a foreign file in the way.
    """
    names = list(names)
    if not os.path.lexists(out):
        with new_folder(out) as folder:
            make(folder)
            write_json(folder / SETTINGS_FILE, {**settings, "files": {name: _mark(folder / name) for name in names}})
        return
    old = {} if made is None else _files_of(made)
    _check_nothing_lost(out, old, names)
    with replacing(out / SETTINGS_FILE) as final:
        folder = final.parent / "new"  # hidden as `final` is, and gone with it
        make(folder)
        new = {name: _mark(folder / name) for name in names}
        _check_nothing_lost(out, old, names)
        with StopSignals() as stop:
            # Until all are in their place the settings file says so, with the marks of both: whenever this is killed,
            # it can be done again.
            write_json(out / SETTINGS_FILE, {**settings, "replacing": True, "files": _either(old, new)})
            _move(folder, out, old, names)
            final.write_text(json.dumps({**settings, "files": new}, indent=2) + "\n", encoding="utf-8")
    if stop.received is not None:
        signal.raise_signal(stop.received)


def _files_of(made: dict[str, Any]) -> Marks:
    files = made["files"]
    if files is None:  # made by a version that did not list them: the settings say their names
        files = dict.fromkeys(f"{split}.jsonl" for split in SPLITS)
        for split in SPLITS:
            for number in range(made["clips_per_class" if split == "train" else "eval_clips_per_class"]):
                stems = [f"{split}/{label}/{label}-{number:05d}" for label in made["classes"]]
                files |= dict.fromkeys(stem + suffix for stem in stems for suffix in (".wav", ".flac", ".ogg"))
    files = {name: marks for name, marks in files.items() if _NAMES.fullmatch(name)}
    return {name: [marks] if isinstance(marks, int) else marks for name, marks in files.items()}


def _either(old: Marks, new: dict[str, int]) -> Marks:
    either: Marks = {name: [mark] for name, mark in new.items()}
    for name, marks in old.items():
        either[name] = None if marks is None else marks + (either.get(name) or [])
    return either


def _check_nothing_lost(out: Path, old: Marks, names: Iterable[str]) -> None:
    for name in (*old, *names):
        path = out / name
        if not os.path.lexists(path):
            continue
        marks = old.get(name, [])
        if not path.is_file() or path.is_symlink() or (marks is not None and _mark(path) not in marks):
            raise FileExistsError(
                f"{path} is not, or no longer, what cat-audio synth wrote; move it away, or name another folder"
            )


def _move(folder: Path, out: Path, old: Marks, names: Iterable[str]) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, out / name)
    for name in old.keys() - set(names):
        (out / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            (out / name).parent.rmdir()


def _mark(path: Path) -> int:
    """The CRC-32 of a file; of an OGG file the size, for its serial number, which is random, goes through all of it."""
    return path.stat().st_size if path.suffix == ".ogg" else zlib.crc32(path.read_bytes())
