"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cat.files import make_folder
from cat.progress import say

LOCK = ".lock"
_held: dict[str, tuple[int, int]] = {}  # folder -> process and thread


class InUseError(OSError):
    """Another process works in the folder."""


@contextlib.contextmanager
def sole_user(folder: str | os.PathLike[str], *, remedy: str) -> Iterator[None]:
    """While entered, no other process (nor another thread) can enter the same folder. Makes it where it does not exist,
    and removes it again when it is still empty at the end. May be entered again inside.

    The lock is the system's, on ``folder/.lock``: it ends with the process, however that ends. The file says who holds
    it and is gone afterwards; what is left of a killed process is in nobody's way.

    Raises: `InUseError` that names the other process, and the ``remedy``; OSError where `folder` cannot be made.
    """
    folder = Path(folder)
    key, me = os.path.realpath(folder), (os.getpid(), threading.get_ident())
    holder = _held.get(key)
    if holder == me:
        yield
        return
    if holder is not None and holder[0] == os.getpid():
        raise InUseError(f"{folder} is in use by another thread of this process; {remedy}")
    made = make_folder(folder)
    try:
        descriptor = _take(folder, remedy)
        _held[key] = me
        try:
            yield
        finally:
            if os.getpid() == me[0]:
                del _held[key]
                with contextlib.suppress(OSError):
                    (folder / LOCK).unlink()
                os.close(descriptor)
    finally:
        if made and os.getpid() == me[0]:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _take(folder: Path, remedy: str) -> int:
    # lockf, not flock: data workers are forked with this descriptor, and one that outlives its parent must not hold
    # the lock.
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever made the folder has just removed it again
            make_folder(folder)
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _owner(descriptor)
            os.close(descriptor)
            raise InUseError(f"{folder} is in use by {owner or 'another process'}; {remedy}") from None
        except OSError as error:
            say(f"note: {folder} cannot be locked ({error.strerror}); let no other process write there")
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder has just ended and removed it
    if owner := _owner(descriptor):
        say(f"note: {folder} was in use by {owner}, which was killed, or its machine's locks do not reach here")
    _sign(descriptor)
    return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str | None:
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None
