"""The bytes of an audio file: on disk, or in memory as they were cut out of a shard."""

from __future__ import annotations

import abc
import io
import os

Content = io.FileIO | io.BytesIO


def size_of(file: Content) -> int:
    return os.fstat(file.fileno()).st_size if isinstance(file, io.FileIO) else file.getbuffer().nbytes


def bytes_at(file: Content, count: int, place: int) -> bytes:
    """Up to ``count`` bytes from ``place`` on, wherever the file is read at the moment."""
    if isinstance(file, io.FileIO):
        return os.pread(file.fileno(), count, place)
    return bytes(file.getbuffer()[place : place + count])


class Stored(abc.ABC):
    """An audio file that lies in something else. ``str()`` is what messages call it."""

    @abc.abstractmethod
    def content(self) -> io.BytesIO:
        """Raises: OSError; `cat.data.containers.Unusable` with a reason."""

    @property
    @abc.abstractmethod
    def suffix(self) -> str:
        """Of its name, with the dot."""

    def __fspath__(self) -> str:
        """For messages: no file can be opened by it."""
        return str(self)


class Held(Stored):
    """An audio file in memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self._name, self._content = name, content

    def __str__(self) -> str:
        return self._name

    @property
    def suffix(self) -> str:
        return os.path.splitext(self._name)[1]

    def content(self) -> io.BytesIO:
        return io.BytesIO(self._content)
