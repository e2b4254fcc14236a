"""Files and folders that appear whole or not at all.

What is being written lies in a hidden folder beside its target, ``.NAME.xxxxxxxx.tmp``, with a lock that its writer
holds. A writer that was killed leaves the folder behind and the lock free; the next write beside it clears it away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
_LOCK = ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # on the disk, of what the user may have of it
_OF_WRITING = (*NO_SPACE, errno.EFBIG, errno.EIO)  # what `write` raises, without a file's name
_SILENCE = 24 * 3600  # seconds; see `_is_abandoned`


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path of the same name in a hidden folder beside `path`; on success the file replaces `path`,
    on an exception it is removed and `path` stays as it was.

    Makes the directory where it does not exist. What replaces is on disk before (a power cut leaves the old or the new
    file), and has the permissions of any new file. A symbolic link stays, and the file it points to is replaced.

    Raises: OSError that names `path`.
    """
    target = _target(path)
    with _workplace(target) as place:
        temporary = place / target.name
        mode = _mode_of_a_new_file(temporary)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors makes files for their owner alone
            temporary.chmod(mode)
        flush_to_disk(temporary)
        os.replace(temporary, target)
        flush_to_disk(target.parent)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder that is not there yet (or empty): yields an empty one, which gets the name `path` on
    success and is removed with all it holds on an exception."""
    target = Path(path)
    with _workplace(target) as place:
        folder = place / target.name
        folder.mkdir()
        yield folder
        entries = [path for root, _, names in os.walk(folder) for path in (*(Path(root, n) for n in names), Path(root))]
        flush_all(entries)
        os.rename(folder, target)
        flush_to_disk(target.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def append(file: FileIO, content: bytes) -> None:
    """Write all of it at the end of a file that was opened "ab" without a buffer, or, on a full disk, nothing. (What a
    buffer holds would raise once more when the file is closed.)

    Raises: OSError that names the file.
    """
    left, size = memoryview(content), os.fstat(file.fileno()).st_size
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        file.truncate(size)
        raise named(error, Path(os.fsdecode(file.name))) from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def flush_all(paths: list[Path]) -> None:
    """`flush_to_disk` of many."""
    if len(paths) < 100:
        for path in paths:
            flush_to_disk(path)
        return
    # A disk takes at once what many wait for: 2,000 files in 0.3 s where one after the other took 5 s.
    with ThreadPoolExecutor(32) as waiting:
        for _ in waiting.map(flush_to_disk, paths):
            pass


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes the folder where it does not exist. Raises: OSError that names it, when no file can be written into it."""
    try:
        with _workplace(Path(folder, "a-file")) as place:
            (place / "a-file").write_bytes(b"x")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def cache_folder(name: str) -> Path | None:
    """``$XDG_CACHE_HOME/cat-audio/NAME``, or below ``~/.cache``; None for a user without a home. It may not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # to be ignored, says the specification
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "cat-audio" / name


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, as ``sha256sum`` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(path: str | os.PathLike[str]) -> int | None:
    """Bytes free where `path` is or would be made; None where the file system does not say."""
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else None


def format_bytes(count: float) -> str:
    """``12.3 MB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count / 1000:.3g} TB"


def parse_bytes(text: str, option: str) -> int:
    """``256MB``, ``1.5g``, ``100000``. Raises: ValueError that names the option."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([kmg]?)b?", text.strip().lower())
    if not found or float(found[1]) == 0:
        raise ValueError(f"{option} is {text!r}; expected a size such as 256MB or 1GB")
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]])


# ---------------------------------------------------------------- the hidden folder


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """The locked hidden folder beside `target`; gone afterwards."""
    try:
        make_folder(target.parent)
        clear_leftovers(target.parent)
        name = os.fsdecode(os.fsencode(target.name)[:200])  # file systems allow 255 bytes
        place = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise named(error, target) from None
    lock = -1
    try:
        lock = _lock(place)
        yield place
    except OSError as error:
        if _is_about(error, place):
            raise named(error, target) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)
        shutil.rmtree(place, ignore_errors=True)


def make_folder(folder: Path) -> bool:
    """Makes a folder and those above it; whether it was missing. Raises: OSError, which names the file in its way."""
    try:
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        if folder.is_dir():
            return False
        wrong = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(wrong)) from None
    return True


def clear_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder`; what a living one is writing stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (
                _TEMPORARY.fullmatch(entry.name)
                and entry.is_dir(follow_symlinks=False)
                and _is_abandoned(Path(entry.path))
            ):
                shutil.rmtree(entry.path, ignore_errors=True)


def _lock(place: Path) -> int:
    # Locked before it has its name: a lock file that is free has lost its writer. flock, not lockf: what is written in
    # `place` may be opened and closed at will, and several threads may write.
    fresh = place / f"{_LOCK}.new"
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o600)
    os.write(descriptor, os.fsencode(socket.gethostname()))
    with contextlib.suppress(OSError):  # a file system without locks: its leftovers stay
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(fresh, place / _LOCK)
    return descriptor


def _is_abandoned(place: Path) -> bool:
    """Whether its lock is free; of another machine's writer also whether it has been silent for a day, for some network
    file systems keep locks to each machine."""
    try:
        descriptor = os.open(place / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(descriptor, 300) == os.fsencode(socket.gethostname()):
            return True
        return _now(place.parent) - max(path.stat().st_mtime for path in (place, *place.rglob("*"))) > _SILENCE
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _now(folder: Path) -> float:
    """By the clock of its file system, which is the one that files' times are of: this machine's may be wrong."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; expected the name of a file", str(path))
    if target.exists() and not target.is_file():  # a rename would put a file in the place of /dev/null
        raise OSError(errno.EINVAL, "is a device or a pipe; expected the name of a file", str(path))
    return target


def _mode_of_a_new_file(path: Path) -> int:
    """The permissions that the umask (or the folder's default access list) gives a new file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    path.unlink()
    return mode


def _is_about(error: OSError, place: Path) -> bool:
    """Whether an error came of writing there, and not of something else that was done meanwhile."""
    if isinstance(error.filename, str | bytes):
        return Path(os.fsdecode(error.filename)).is_relative_to(place)
    return error.filename is None and error.errno in _OF_WRITING


def named(error: OSError, target: Path) -> OSError:
    """The same error, about the target and not about a temporary file or nothing, with what to do."""
    text = error.strerror or str(error)
    if error.errno in NO_SPACE:
        free = free_space(target.parent)
        text += "" if free is None else f" ({format_bytes(free)} are free there)"
        text += "; make room, or write elsewhere"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text += f"; expected a folder that may be written to: {target.parent}"
    return OSError(error.errno, text, str(target))
