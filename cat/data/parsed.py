"""Large manifests that were read before: what they say in a memory-mapped file, so that a run starts in no time.

The files lie in the user's cache folder and may be deleted at any time. A name is the SHA-256 of all that reading
depends on: the content of the list and of what belongs to it, its place, this package's code. So none is ever out of
date.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cat.data.clips import Clips, Files, Texts
from cat.data.columns import ColumnsError, open_columns
from cat.data.released import Listed, companions
from cat.files import cache_folder, make_folder

LARGE = 16_000_000  # bytes; 130,000 clips, which take a second to read
_UNUSED = 30 * 24 * 3600  # seconds; what nobody opened for so long goes when something else is kept
_PATIENCE = 120  # seconds for which another process may read the same list
_CODE = ("clips", "columns", "manifest", "parsed", "released", "text")  # what reading goes through
_FILES = ("embedding_files", "embedding_file_ends")


def read_once(path: Path, read: Callable[[Path], Listed]) -> Listed:
    """``read(path)``, or what it said earlier of the very same files."""
    folder = cache_folder("manifests")
    if folder is None or path.stat().st_size < LARGE:
        return read(path)
    kept = folder / f"{_key(path)}.columns"
    if (listed := _open(kept, path.parent)) is not None:
        return listed
    with _turn(kept):  # of several processes that start together one reads it
        if (listed := _open(kept, path.parent)) is not None:
            return listed
        listed = read(path)
        if kept.stem != _key(path):  # changed while it was read
            return listed
        with contextlib.suppress(OSError):  # no space, no permission: it is read again next time
            _save(listed, kept, path.parent)
            _remove_unused(folder)
    return _open(kept, path.parent) or listed  # memory that all processes share


@contextlib.contextmanager
def _turn(kept: Path) -> Iterator[None]:
    """Waits while another process has entered, but not for ever: what it does may be done twice."""
    lock, until = kept.with_suffix(".lock"), time.monotonic() + _PATIENCE
    try:
        make_folder(kept.parent)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        while time.monotonic() < until:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _key(path: Path) -> str:
    digest = hashlib.sha256(_code())
    for file in (path, *companions(path)):
        digest.update(os.fsencode(os.path.abspath(file)) + b"\0")
        with contextlib.suppress(FileNotFoundError), open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


@functools.cache
def _code() -> bytes:
    return b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _CODE)


def _save(listed: Listed, kept: Path, folder: Path) -> None:
    columns = (
        {} if listed.embedding_files is None else dict(zip(_FILES, listed.embedding_files.names.arrays, strict=True))
    )
    info = {
        "root": _below(listed.root, folder),
        "label_names": listed.label_names,
        "notes": listed.notes,
        "embeddings": None if listed.embeddings is None else _below(listed.embeddings, folder),
        "embeddings_fingerprint": listed.embeddings_fingerprint,
        "extra": listed.extra,
    }
    listed.clips.save(kept, columns, {"listed": info})


def _open(kept: Path, folder: Path) -> Listed | None:
    """None where there is nothing, or something damaged, or of a folder of audio that is gone."""
    try:
        columns = open_columns(kept)
        with contextlib.suppress(OSError):
            os.utime(kept)
        info, clips = columns.info["listed"], Clips.of(columns)
    except (OSError, ColumnsError, KeyError):
        return None
    root = folder / info["root"]
    if not root.is_dir():
        return None
    return Listed(
        clips,
        root,
        info["label_names"],
        Files(folder, Texts.of(columns, *_FILES)) if _FILES[0] in columns else None,
        tuple(info["notes"]),
        None if info["embeddings"] is None else folder / info["embeddings"],
        info["embeddings_fingerprint"],
        info["extra"],
    )


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _remove_unused(folder: Path) -> None:
    for path in (*folder.glob("*.columns"), *folder.glob("*.lock")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED:
                path.unlink()
