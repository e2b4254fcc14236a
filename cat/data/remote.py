"""Files behind URLs, by way of a local cache that all processes of a machine share.

Any URL that fsspec knows (https, s3, gs, hf, ...; its libraries are the user's to install). A file comes whole, in
pieces that are asked for again where an answer fails or is cut off, and appears in the cache when it is complete.

=================  =================================================================================================
``CAT_CACHE``      the cache's folder; default ``$XDG_CACHE_HOME/cat-audio/shards``, or below ``~/.cache``
``CAT_CACHE_GB``   what it may hold (default 100): what was not used for the longest time goes first
=================  =================================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from cat.data.containers import Unusable
from cat.files import NO_SPACE, format_bytes, free_space, make_folder
from cat.progress import say

FOLDER, LIMIT = "CAT_CACHE", "CAT_CACHE_GB"
TRIES, FIRST_DELAY = 8, 0.5  # seconds, and twice as long after each try: a minute in all
PIECE = 16_000_000  # bytes asked for at a time
_PART = ".part"
_WAIT = 600.0  # seconds for others to end what they fetch, before the limit is exceeded

T = TypeVar("T")


class RemoteError(RuntimeError):
    """What lies behind a URL cannot be read now, whatever clip is asked for."""


def is_url(path: str | os.PathLike[str]) -> bool:
    return isinstance(path, str) and "://" in path


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of files that stay what they are. ``version``: of its content; another one has a cache of its own."""

    url: str
    version: str = ""

    def fetch(self, name: str, head: Callable[[bytes], int]) -> Path:
        """A file that may be another one each time: its beginning tells, ``head(its first eight bytes)`` bytes.

        Raises: `RemoteError`.
        """
        url = f"{self.url}/{name}"
        try:
            length = head(_tried(url, lambda fs, path: fs.cat_file(path, start=0, end=8))[:8])
            first = _tried(url, lambda fs, path: fs.cat_file(path, start=0, end=length))[:length]
            size = size_of_remote(url)
            file = RemoteFile(url, self._kept(name, hashlib.sha256(first).hexdigest()[:16]), size)
            os.close(file.open())
        except Unusable as error:
            raise RemoteError(f"{url}: {error}") from None
        return Cache.of_environment().path(file.kept)

    def file(self, name: str, size: int) -> RemoteFile:
        return RemoteFile(f"{self.url}/{name}", self._kept(name, str(size)), size)

    def _kept(self, name: str, mark: str) -> Path:
        key = hashlib.sha256(f"{self.url}\n{self.version}".encode()).hexdigest()[:16]
        return Path(key, f"{quote(name, safe='')}.{mark}")


@dataclass(frozen=True)
class RemoteFile:
    """Of so many bytes; ``kept``: where, in the cache."""

    url: str
    kept: Path
    size: int

    keep = False

    def __str__(self) -> str:
        return self.url

    @property
    def here(self) -> bool:
        return Cache.of_environment().path(self.kept).exists()

    def open(self) -> int:
        """A descriptor of the whole file, fetched where it is not here. Raises: `Unusable` where it does not exist or
        has another size; `RemoteError`."""
        return Cache.of_environment().open(self.kept, self.size, lambda part: _download(self.url, self.size, part))

    def forget(self) -> bool:
        """Lets the next one fetch it again; whether it was here."""
        try:
            Cache.of_environment().path(self.kept).unlink()
        except OSError:
            return False
        return True


def names_below(url: str) -> list[str]:
    """Of the files in a folder, where its server lists them. Raises: `RemoteError`."""
    try:
        found = _tried(url, lambda fs, path: fs.ls(f"{path}/", detail=False))
    except Unusable as error:
        raise RemoteError(str(error)) from None
    return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in found]


def size_of_remote(url: str) -> int:
    """Raises: `RemoteError`."""
    try:
        size = _tried(url, lambda fs, path: fs.size(path))
    except Unusable as error:
        raise RemoteError(str(error)) from None
    if size is None:
        raise RemoteError(f"{url}: its server does not say how long it is")
    return int(size)


# ---------------------------------------------------------------- fetching


def _download(url: str, size: int, descriptor: int) -> None:
    at = 0
    while at < size:
        end = min(at + PIECE, size)
        content = _tried(url, functools.partial(_piece, at=at, end=end, size=size))
        if len(content) == size:  # of a server that does not know ranges
            at = 0
        os.pwrite(descriptor, content, at)
        at += len(content)


class _CutOff(OSError):
    """An answer of too few bytes."""


def _piece(fs: Any, path: str, at: int, end: int, size: int) -> bytes:
    """Bytes at <= i < end of a file, or all of it."""
    content: bytes = fs.cat_file(path, start=at, end=end)
    if len(content) in (end - at, size):
        return content
    there = fs.size(path)
    if there is not None and there != size:
        raise Unusable(f"it has {there} bytes there, {size} in the index: it is cut off, or another file")
    raise _CutOff(f"an answer of {len(content)} bytes, {end - at} were asked for")


def _tried(url: str, ask: Callable[[Any, str], T]) -> T:
    """What ``ask(filesystem, path)`` gives, in one of several tries. Raises: `RemoteError`; `Unusable` at once, also
    for what does not exist."""
    begun = time.monotonic()
    for number in range(1, TRIES + 1):
        try:
            # Not kept here: fsspec keeps one a process, and knows when it was forked.
            return ask(*_filesystem(url))
        except FileNotFoundError:
            raise Unusable(f"{url} does not exist") from None
        except (Unusable, RemoteError):
            raise
        except Exception as error:  # each of fsspec's file systems has errors of its own
            if number == TRIES:
                seconds = time.monotonic() - begun
                raise RemoteError(
                    f"{url}: cannot be read, {TRIES} tries in {seconds:.0f} s; the last one: {_text(error)}. Once it "
                    "can be, go on where this was stopped"
                ) from error
            if number == 3:
                say(f"note: {url}: {_text(error)}; trying again")
            time.sleep(FIRST_DELAY * 2 ** (number - 1) * random.uniform(0.75, 1.25))  # not all workers at once
    raise AssertionError("unreachable")


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise RemoteError(f"{url}: reading URLs needs fsspec ({error}); pip install 'cat-kernels[remote]'") from None
    try:
        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # a library that is missing; a protocol that nobody knows
        raise RemoteError(f"{url}: {error}") from None
    return filesystem, path


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Cache:
    """Files of known size. Who opens one that is missing makes it, while others wait; what is being made counts with
    its whole size from the start. A writer that was killed leaves a part behind, which the next one takes over."""

    folder: Path
    limit: int

    @classmethod
    def of_environment(cls) -> Cache:
        text = os.environ.get(LIMIT, "100")
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if not 0 < limit < 1e9:
            raise RemoteError(f"{LIMIT} is {text!r}; expected how many GB the cache may hold, such as 100")
        return cls(_default_folder(), int(limit * 1e9))

    def path(self, name: Path) -> Path:
        return self.folder / name

    def open(self, name: Path, size: int, fill: Callable[[int], None]) -> int:
        """A descriptor of the file; ``fill(descriptor)`` writes one that is missing."""
        path = self.path(name)
        try:
            while (descriptor := _existing(path)) is None:
                descriptor = self._make(path, size, fill)
                if descriptor is not None:
                    break
        except OSError as error:
            text = f"{error.filename or self.folder}: {error.strerror or error}"
            more = f" ({LIMIT} says how much it may hold)" if error.errno in NO_SPACE else ""
            raise RemoteError(f"{text}; the cache{more} needs a folder with room, {FOLDER} names another") from error
        return descriptor

    def _make(self, path: Path, size: int, fill: Callable[[int], None]) -> int | None:
        """None where another process has made it meanwhile."""
        make_folder(path.parent)
        part, descriptor = _own_part(path)
        try:
            if path.exists():
                part.unlink()
                os.close(descriptor)
                return None
            self._reserve(descriptor, size)
            fill(descriptor)
            os.replace(part, path)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a process that was forked meanwhile
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, descriptor: int, size: int) -> None:
        """Makes room for a part, and makes it as large as it will be."""
        if size > self.limit:
            raise RemoteError(
                f"a shard of {format_bytes(size)} is more than the cache may hold; set {LIMIT} to more than "
                f"{self.limit / 1e9:g}"
            )
        begun = time.monotonic()
        while True:
            with self._alone():
                missing, others = self._make_room(size)
                if missing <= 0 or not others or time.monotonic() - begun > _WAIT:
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(0.2)

    def _make_room(self, size: int) -> tuple[int, bool]:
        """Removes what was not used for the longest time: bytes that are missing still, and whether others are making
        files, which can be removed later."""
        kept = sorted(self._files())
        others = sum(path.name.endswith(_PART) and about.st_size > 0 for _, path, about in kept)
        free = free_space(self.folder)
        missing = sum(about.st_size for _, _, about in kept) + size - self.limit
        missing = max(missing, missing if free is None else size - free)
        for _, path, about in kept:
            if missing <= 0:
                break
            if path.name.endswith(_PART):
                continue
            path.unlink(missing_ok=True)
            missing -= about.st_size
        return missing, others > 0

    def _files(self) -> Iterator[tuple[float, Path, os.stat_result]]:
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                yield about.st_mtime, path, about

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While entered, no other process makes room."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _existing(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # it may be gone by now, or another user's
        os.utime(path)
    return descriptor


def _own_part(path: Path) -> tuple[Path, int]:
    """The part of a file, and a descriptor of it that no other process has: its lock ends with the process."""
    part = path.with_name(path.name + _PART)
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(part), os.fstat(descriptor)):
                return part, descriptor
        os.close(descriptor)  # whoever had it has given it its name


def _default_folder() -> Path:
    named = os.environ.get(FOLDER, "")
    if named:
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "cat-audio" / "shards"
    except RuntimeError:
        raise RemoteError(f"there is no home folder for a cache of what is fetched; set {FOLDER} to a folder") from None
