"""Archives: downloaded whole or not at all, and unpacked into a folder of their own and nowhere else."""

from __future__ import annotations

import hashlib
import lzma
import os
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cat.files import new_folder, replacing
from cat.progress import Progress

_BLOCK = 1 << 20
_MB = 1_000_000
_AGAIN = "download it again"
_TIMEOUT = 60  # seconds without a byte
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    NotImplementedError,
)


class ArchiveError(ValueError):
    """An archive that cannot be had or unpacked; the message names it and the remedy."""


def download(url: str, path: Path, sha256: str | None, *, progress: bool) -> None:
    """Fetch ``url`` into the file ``path``, which appears when all of it is there and has the checksum."""
    remedy = f"download it elsewhere and give its path in place of --download: {url}"
    try:
        with replacing(path) as temporary:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(temporary, "wb") as file:
                digest = _copy(response, file, path.name, progress)
            if sha256 is not None and digest != sha256:
                raise ArchiveError(f"{url}: its SHA-256 is {digest}; expected {sha256}. Try again, or {remedy}")
    except urllib.error.URLError as error:
        raise ArchiveError(f"{url}: cannot be downloaded ({error.reason}); {remedy}") from None
    except (TimeoutError, ConnectionError) as error:
        raise ArchiveError(f"{url}: the download broke off ({error}); try again, or {remedy}") from None


def _copy(response: Any, file: Any, name: str, progress: bool) -> str:
    """The SHA-256 of what was copied. ConnectionError for less than was announced."""
    announced = int(response.headers.get("Content-Length") or 0)
    shown = Progress(announced // _MB, label=f"download {name}", unit="MB", enabled=progress and announced > 0)
    digest, done = hashlib.sha256(), 0
    try:
        while block := response.read(_BLOCK):
            file.write(block)
            digest.update(block)
            done += len(block)
            shown.advance(done // _MB)
    finally:
        shown.close()
    if announced and done != announced:
        raise ConnectionError(f"{done} of {announced} bytes came")
    return digest.hexdigest()


def check_sha256(path: Path, sha256: str) -> None:
    """Raises ArchiveError for a file that is not the one with this checksum."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ArchiveError(f"{path}: its SHA-256 is {found}; expected {sha256}. Remove it, and download it again")


def unpack(archive: Path, folder: Path, check: Callable[[Path], object], *, progress: bool) -> None:
    """Unpack a .zip or .tar(.gz, .bz2, .xz) into ``folder``, which appears when all of it is there and ``check`` of it
    raises nothing.

    Raises ArchiveError for a damaged archive, and for members that would lie outside the folder.
    """
    with new_folder(folder) as temporary:
        try:
            opened = _zip if zipfile.is_zipfile(archive) else _tar
            with opened(archive) as (members, extract):
                _extract_all(archive, temporary, members, extract, progress)
        except tarfile.FilterError as error:
            raise ArchiveError(f"{archive}: {error}; it is not the archive of this data set") from None
        except _BROKEN as error:
            raise ArchiveError(f"{archive}: cannot be unpacked ({_first_line(error)}); {_AGAIN}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise ArchiveError(f"{archive}: is damaged ({error}); {_AGAIN}") from None  # gzip and bz2 say it so
        check(temporary)


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0].rstrip(":")
    return text or type(error).__name__


def _extract_all(archive: Path, folder: Path, members: Any, extract: Any, progress: bool) -> None:
    size = archive.stat().st_size
    shown, told = Progress(size // _MB, label=f"unpack {archive.name}", unit="MB", enabled=progress), 0
    try:
        for member, read in members:
            extract(member, folder)
            if min(read, size) // _MB > told:
                told = min(read, size) // _MB
                shown.advance(told)
    finally:
        shown.close()


@contextmanager
def _zip(archive: Path) -> Iterator[tuple[Any, Any]]:
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        for info in infos:
            path = PurePosixPath(info.filename)
            link = stat.S_ISLNK(info.external_attr >> 16)
            if path.is_absolute() or ".." in path.parts or "\\" in info.filename or link:
                raise ArchiveError(f"{archive}: {info.filename!r} leads out of it; it is not the archive of a data set")
        yield ((info, info.header_offset + info.compress_size) for info in infos), file.extract


@contextmanager
def _tar(archive: Path) -> Iterator[tuple[Any, Any]]:
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError(f"{archive}: this Python cannot unpack it safely; unpack it yourself, and give the folder")
    with open(archive, "rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as file:

        def extract(member: tarfile.TarInfo, folder: str | os.PathLike[str]) -> None:
            file.extract(member, folder, filter="data")

        yield ((member, raw.tell()) for member in file), extract
        # Where a header is damaged tarfile takes it for the end, and a checksum is behind what it reads.
        rest: Any = file.fileobj
        while block := rest.read(_BLOCK):
            if block.strip(b"\0"):
                raise tarfile.ReadError("something is behind its end")
