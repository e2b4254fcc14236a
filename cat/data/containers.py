"""How many bytes of samples a file's header announces: libsndfile silently takes what is there in its place."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from cat.data.content import Content, bytes_at, size_of

# A file that has less than this share of what its header announces is cut off. The rest is for writers that count the
# header among the samples, or one frame too many.
ENOUGH = 0.99
_MOST_CHUNKS = 1000  # looked through for the samples
# Programs that write into a pipe put 0, -1 or the greatest size, less a header or a block, where the size belongs.
_STREAMED = {4: 0x7FFF_0000, 8: 1 << 62}


class Unusable(Exception):
    """Why a file gives no usable audio."""


@dataclass(frozen=True)
class _Layout:
    """A container of chunks, each one an id, a size, and as many bytes."""

    samples: tuple[bytes, ...]  # ids of the chunk that holds the samples
    size: str  # struct format of a size
    first: int  # where the first chunk begins
    id_bytes: int = 4
    counted: int = 0  # bytes of the chunk's own header in its size
    aligned: int = 2
    total: int | None = 4  # where the size of the whole file stands
    uncounted: int = 8  # bytes of the file that it leaves out


_LAYOUTS = {
    b"RIFF": _Layout((b"data",), "<I", 12),
    b"RIFX": _Layout((b"data",), ">I", 12),
    b"RF64": _Layout((b"data",), "<I", 12),
    b"BW64": _Layout((b"data",), "<I", 12),
    b"FORM": _Layout((b"SSND", b"BODY"), ">I", 12),
    b"riff": _Layout((b"data",), "<q", 40, id_bytes=16, counted=24, aligned=8, total=16, uncounted=0),
    b"caff": _Layout((b"data",), ">q", 8, aligned=1, total=None),
}


class _Size(NamedTuple):
    """The announced size of the samples."""

    place: int  # of the field
    format: str  # of the field, for struct
    counted: int  # bytes of headers in it
    announced: int  # bytes of samples, as the field says
    begin: int  # of the samples
    whole: bool  # the size of the whole file is as the header says


class _Mended(io.FileIO):
    """A file that reads as if ``patch`` stood at ``place``."""

    def __init__(self, descriptor: int, place: int, patch: bytes) -> None:
        super().__init__(descriptor, closefd=False)
        self._place, self._patch = place, patch

    def readinto(self, buffer: Any) -> int:  # memoryview, or cffi's buffer
        begin = self.tell()
        count = super().readinto(buffer)
        for place, byte in enumerate(self._patch, self._place - begin):
            if 0 <= place < count:
                buffer[place : place + 1] = bytes([byte])
        return count


def with_true_size(file: Content, start: int) -> Content:
    """The file as it is; or, where its header says no size of the samples, or a little too much, with the true one.

    ``start`` is where the container begins. Raises Unusable for a file that is cut off.
    """
    end = size_of(file)
    size = _find_size(file, start, end)
    if size is None:
        return file
    there = max(0, end - size.begin)
    width = struct.calcsize(size.format)
    streamed = size.announced < 0 or size.announced >= _STREAMED[width] or (size.announced == 0 and not size.whole)
    if size.announced <= there and not streamed:
        return file
    if not streamed and there < ENOUGH * size.announced:
        raise Unusable(f"cut off: {size.announced} bytes of samples announced, {there} are there")
    true = struct.pack(size.format, min(there + size.counted, 0xFFFF_FFFF if width == 4 else 1 << 62))
    if isinstance(file, io.FileIO):
        return _Mended(file.fileno(), size.place, true)
    content = bytearray(file.getbuffer())
    content[size.place : size.place + width] = true
    return io.BytesIO(content)


def _find_size(file: Content, start: int, end: int) -> _Size | None:
    """The size of the samples in the container at ``start``; None where there is none that is known here."""
    head = bytes_at(file, 512, start)

    def read(form: str, place: int) -> int:
        if place + 8 <= len(head):
            return int(struct.unpack_from(form, head, place)[0])
        return int(struct.unpack_from(form, bytes_at(file, 8, start + place).ljust(8, b"\0"))[0])

    if head[:4] in (b".snd", b"dns."):  # AU has one header
        form = ">I" if head[:4] == b".snd" else "<I"
        return _Size(start + 8, form, 0, read(form, 8), start + read(form, 4), whole=False)
    layout = _LAYOUTS.get(head[:4])
    if layout is None:
        return None
    total = None if layout.total is None else read(layout.size, layout.total) + layout.uncounted
    at, in_ds64 = layout.first, None
    for _ in range(_MOST_CHUNKS):
        if start + at >= end:
            return None
        name = head[at : at + 4] if at + 4 <= len(head) else bytes_at(file, 4, start + at)
        place, form = at + layout.id_bytes, layout.size
        size, begin = read(form, place), place + struct.calcsize(form)
        if name in layout.samples:
            if in_ds64 is not None and size == 0xFFFF_FFFF:
                place, form, size = in_ds64, "<q", read("<q", in_ds64)
            whole = total is not None and abs(start + total - end) <= 1
            return _Size(start + place, form, layout.counted, size - layout.counted, start + begin, whole)
        if name == b"ds64":
            total, in_ds64 = read("<q", begin) + layout.uncounted, begin + 8
        if size < layout.counted:
            return None
        at += -(-(size if layout.counted else size + begin - at) // layout.aligned) * layout.aligned
    return None


def id3_end(file: Content) -> int:
    """Where the ID3v2 tags end that stand before the audio; 0 without any."""
    end = 0
    for _ in range(_MOST_CHUNKS):
        head = bytes_at(file, 10, end)
        if len(head) < 10 or head[:3] != b"ID3":
            break
        size = 0
        for byte in head[6:]:
            size = size << 7 | byte & 0x7F
        end += size + (20 if head[5] & 0x10 else 10)  # with or without a footer
    return end
