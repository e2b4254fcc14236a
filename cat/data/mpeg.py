"""MP3: the frames that a crop needs are found by their headers, cut out, and decoded as a stream of their own.

libsndfile takes the length of a stream of variable rate without a Xing header for filesize / bytes of its first frame,
and its seek decodes frames whose beginning lies in frames that it has not read, about which libmpg123 writes to stderr.
A stream that begins with what the first frame that is used needs, and that says how many frames it has, does neither.
"""

from __future__ import annotations

import functools
import io
import re
import struct
from array import array
from typing import NamedTuple

import numpy as np

from cat.data.containers import ENOUGH, Unusable
from cat.data.content import Content, bytes_at, size_of
from cat.data.decoding import decode, open_decoder

_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)  # MPEG-1; 0: free or forbidden
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)  # MPEG-2 and 2.5
_LONGEST = 1441  # bytes in a frame
_CHUNK = 1 << 20  # bytes read at a time when looking for frames
_JUNK = 1 << 16  # bytes looked through for the first frame
_LOST = 1 << 20  # bytes without a frame that end the stream
_WARM = 4  # whole frames before the first one that is used; overlap and filter bank hold what two left behind
_DECODER_DELAY = 529  # samples that libmpg123 leaves out together with the encoder's delay
_RING = 4  # frames after which libmpg123's filter bank, a ring, is where it was (measured: outputs are bit-identical)
_RESERVOIR = 511  # bytes, the farthest that a frame's data can begin before the frame
_HEADER = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef].", re.DOTALL)  # of any frame of layer III


class _Format:
    """What all frames of a stream have in common: MPEG-1 (3), -2 (2) or -2.5 (0), sampling rate, mono or not."""

    def __init__(self, version: int, rate_bits: int, mono: bool) -> None:
        self.mpeg1, self.mono, self._rate_bits = version == 3, mono, rate_bits
        self.second = 0xE3 | version << 3  # byte of the header, without a checksum
        rate = (44100, 48000, 32000, 0)[rate_bits]
        self.rate = rate if self.mpeg1 else rate // 2 if version == 2 else rate // 4
        self.samples = 1152 if self.mpeg1 else 576  # in a frame
        self.side = (17 if mono else 32) if self.mpeg1 else (9 if mono else 17)  # bytes of side information
        self.sizes = [self._size(third) for third in range(256)]  # of a frame, by the header's third byte; 0: no frame
        seconds = re.escape(bytes([self.second, self.second & 0xFE]))
        thirds = b"".join(re.escape(bytes([third])) for third in range(256) if self.sizes[third])
        fourths = b"[\xc0-\xff]" if mono else b"[\x00-\xbf]"
        self.pattern = re.compile(b"\xff[%b][%b]%b" % (seconds, thirds or b"\xff", fourths))

    def _size(self, third: int) -> int:
        kbits = (_KBITS_1 if self.mpeg1 else _KBITS_2)[third >> 4]
        if not kbits or not self.rate or third >> 2 & 3 != self._rate_bits:
            return 0
        return (144 if self.mpeg1 else 72) * kbits * 1000 // self.rate + (third >> 1 & 1)

    def silent(self, announced: int | None = None) -> bytes:
        """A frame of silence; with ``announced`` one that is not played, and says how many frames follow."""
        third = 0x90 | self._rate_bits << 2
        info = b"" if announced is None else struct.pack(">4sII", b"Info", 1, announced)
        head = bytes([0xFF, self.second, third, 0xC0 if self.mono else 0]) + bytes(self.side) + info
        return head.ljust(self.sizes[third], b"\0")

    def is_frame(self, data: bytes, place: int, last: bool) -> bool:
        """Whether a frame begins at ``place`` that another one or, in the ``last`` data, the end follows."""
        if not self.rate or not self.pattern.match(data, place):
            return False
        behind = place + self.sizes[data[place + 2]]
        return self.pattern.match(data, behind) is not None or (last and behind == len(data))

    def find(self, data: bytes, place: int, last: bool) -> int | None:
        """Where the first such frame begins, from ``place`` on."""
        while found := self.pattern.search(data, place):
            if self.is_frame(data, found.start(), last):
                return found.start()
            place = found.start() + 1
        return None


_format = functools.cache(_Format)  # of 24


class Mp3:
    """An MP3 file. ``length`` is in samples at ``rate``; `open_mp3` makes it."""

    lead, sixteen_bits = 0, False

    def __init__(self, file: Content, kind: _Format, offsets: array[int]) -> None:
        self._file, self._kind = file, kind
        self.rate = kind.rate
        info = _read_info(bytes_at(file, _LONGEST, offsets[0]), kind)
        self._offsets = offsets if info is None else offsets[1:]
        there, self._skip = len(self._offsets), 0
        self.length = there * kind.samples
        if info is not None and info.frames:
            if there < ENOUGH * info.frames:
                raise Unusable(f"cut off: {info.frames} MPEG frames announced, {there} are there")
            self._skip = info.delay + _DECODER_DELAY
            end = info.frames * kind.samples - max(0, info.padding - _DECODER_DELAY)
            self.length = max(0, min(end, self.length) - self._skip)

    def read(self, begin: int, end: int, dtype: str = "float32") -> np.ndarray:
        """Samples begin <= i < end, the mean of the channels."""
        size = self._kind.samples
        begin, end = begin + self._skip, end + self._skip
        lead, reservoir = max(0, begin // size - _WARM), 0
        while lead > 0 and reservoir < _RESERVOIR:
            lead -= 1
            reservoir += self._offsets[lead + 1] - self._offsets[lead] - 4 - self._kind.side
        frames = self._cut_out(lead, -(-end // size))
        # A frame that says how many there are; then silent ones, for libmpg123 leaves out samples at the beginning, and
        # as many as give each frame its own place in the filter bank's ring: rounding is then as in the whole file.
        silent = _RING - -(lead + self._skip // size) % _RING
        count = silent + len(frames)
        stream = self._kind.silent(announced=count) + silent * self._kind.silent() + b"".join(frames)
        decoder = open_decoder(io.BytesIO(stream))
        try:
            left_out = count * size - decoder.frames
            at = begin + (silent - lead) * size - left_out
            wave = decode(decoder, at + end - begin, dtype)[at:]
        finally:
            decoder.close()
        if len(wave) < end - begin:
            raise Unusable(f"damaged: only {len(wave)} of {end - begin} samples could be decoded")
        return wave

    def close(self) -> None:
        pass

    def _cut_out(self, first: int, last: int) -> list[bytes]:
        """Frames first <= i < last. Those whose data begin in frames before them are made silent."""
        kind, begin = self._kind, self._offsets[first]
        data = bytes_at(self._file, self._offsets[last - 1] + _LONGEST - begin, begin)
        starts = [offset - begin for offset in self._offsets[first:last]]
        frames = [data[at : at + kind.sizes[data[at + 2]]] for at in starts]
        reservoir = 0  # bytes of data in the frames so far; once it is full no frame's data can begin before it
        for number, frame in enumerate(frames):
            if reservoir >= _RESERVOIR:
                break
            side = 4 if frame[1] & 1 else 6  # behind the header, and a checksum
            before = frame[side] << 1 | frame[side + 1] >> 7 if kind.mpeg1 else frame[side]
            if before > reservoir:
                kept = bytes([frame[side], frame[side + 1] & 0x80 if kind.mpeg1 else 0])
                frames[number] = frame[:side] + kept + bytes(kind.side - 2) + frame[side + kind.side :]
            reservoir += max(0, len(frame) - side - kind.side)
        return frames


class _Info(NamedTuple):
    """Of a Xing or LAME header."""

    frames: int  # 0: not told
    delay: int  # samples that the encoder put before the first
    padding: int  # and behind the last


def _read_info(frame: bytes, kind: _Format) -> _Info | None:
    """None where the frame is an ordinary one."""
    frame = frame[: kind.sizes[frame[2]]]
    at = 4 + kind.side
    if frame[at : at + 4] not in (b"Xing", b"Info") or any(frame[6:at]):
        return None
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    frames = int.from_bytes(frame[at + 8 : at + 12], "big") if flags & 1 else 0
    frames = 0 if frames >= 1 << 31 else frames  # what cannot be is not told
    at += 8 + sum(size for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)) if flags & bit)
    lame = frame[at : at + 24]
    if len(lame) < 24 or lame[0] == 0:
        return _Info(frames, 0, 0)
    return _Info(frames, lame[21] << 4 | lame[22] >> 4, (lame[22] & 15) << 8 | lame[23])


def open_mp3(file: Content, start: int, *, search: bool) -> Mp3 | None:
    """The MP3 stream that begins at ``start``, behind any ID3 tags, or with ``search`` somewhat later.

    None where there is none, or one of free format, whose frames do not tell their size.
    """
    head = bytes_at(file, _JUNK if search else 2 * _LONGEST, start)
    found = _HEADER.match(head) or (_HEADER.search(head) if search else None)
    while found:
        end = size_of(file)
        header = found[0]
        kind = _format(header[1] >> 3 & 3, header[2] >> 2 & 3, header[3] >= 0xC0)
        if kind.is_frame(head, found.start(), last=start + len(head) == end):
            return Mp3(file, kind, _find_frames(file, start + found.start(), end, kind))
        found = _HEADER.search(head, found.start() + 1) if search else None
    return None


def _find_frames(file: Content, at: int, end: int, kind: _Format) -> array[int]:
    """Where the frames begin, from ``at`` to the last one that is whole."""
    offsets: array[int] = array("q")
    second, mono, sizes = kind.second, kind.mono, kind.sizes
    behind = at  # where the last frame ends
    while at + 4 <= end and at - behind < _LOST:
        chunk = bytes_at(file, _CHUNK, at)
        last = at + len(chunk) >= end
        place, stop = 0, len(chunk) - (4 if last else 2 * _LONGEST)
        while place <= stop:
            size = sizes[chunk[place + 2]]
            if size and chunk[place] == 0xFF and chunk[place + 1] | 1 == second and (chunk[place + 3] >= 0xC0) == mono:
                offsets.append(at + place)
                place += size
                behind = at + place
            else:
                found = kind.find(chunk, place + 1, last)
                place = stop + 1 if found is None else found
        if place == 0:  # the file has become shorter
            break
        at += place
    if offsets and behind > end:
        offsets.pop()
    return offsets
