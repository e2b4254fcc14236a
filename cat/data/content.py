"""The bytes of an audio file: on disk, or in memory as they were cut out of a shard."""

from __future__ import annotations

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
