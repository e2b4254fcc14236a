"""Plain arrays in one file that all processes of a machine share: memory-mapped, they lie in the page cache once.

The format is safetensors' (a JSON header, then the arrays), which any reader of it can open; ours gives the arrays
without a copy, and writes them without one. The header has a SHA-256 of all that the file says.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cat.files import replacing

FORMAT = "cat-audio columns 1"
_DTYPES = {"U8": "u1", "I8": "i1", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit
_PIECE = 1 << 24  # bytes; what is hashed or written at a time


class ColumnsError(ValueError):
    """A file of columns that is not what was written; the message names it."""


class Columns(Mapping[str, np.ndarray]):
    """The arrays of a file, read-only, by their names, and ``info``, what else its writer put into it (JSON).

    Opened by `open_columns`. Pickled as its path, for processes that are not forked; these fail if it has changed.
    """

    def __init__(self, path: Path, arrays: dict[str, np.ndarray], info: dict[str, Any], sha256: str) -> None:
        self.path, self._arrays, self.info, self.sha256 = path, arrays, info, sha256

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (os.path.abspath(self.path), self.sha256)


def write_columns(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None
) -> None:
    """Write (n, ...) arrays of integers or floats, whole or not at all. ``info``: anything that JSON can say."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    wrong = next((f"{name} is {array.dtype}" for name, array in arrays.items() if array.dtype not in _NAMES), None)
    if wrong is not None:
        raise TypeError(f"{path}: the column {wrong}; expected one of {', '.join(map(str, _NAMES))}")
    ordered = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each begins at a multiple of its size
    described, end = {}, 0
    for name in ordered:
        array = arrays[name]
        described[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    said = json.dumps(dict(info or {}))
    pieces = [arrays[name].reshape(-1).view(np.uint8).data for name in ordered]
    sha256 = _sha256(said, described, pieces)
    header = json.dumps({"__metadata__": {"format": FORMAT, "info": said, "sha256": sha256}, **described}).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            file.write(piece)


def open_columns(path: str | os.PathLike[str], *, verify: bool = True) -> Columns:
    """The arrays of a file that `write_columns` wrote. ``verify``: read it all, and compare its SHA-256.

    Raises: `ColumnsError` for a file that is damaged or something else; OSError for one that cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    begin = 8 + int.from_bytes(content[:8], "little")
    if not 8 < begin <= min(size, _MOST_HEADER):
        raise ColumnsError(f"{path}: damaged, or no file of columns")
    try:
        described = json.loads(bytes(content[8:begin]))
        about = described.pop("__metadata__")
        if about["format"] != FORMAT:
            raise ColumnsError(f"{path}: its format is {about['format']!r}; this release reads {FORMAT!r}")
        body = content[begin:]
        arrays: dict[str, np.ndarray] = {}
        for name, told in described.items():
            first, end = told["data_offsets"]
            if not 0 <= first <= end <= len(body):
                raise ColumnsError(f"{path}: {size} bytes, and its header tells of more: it is cut off; write it again")
            dtype = np.dtype(_DTYPES[told["dtype"]])
            arrays[name] = np.asarray(body[first:end]).view(dtype).reshape(told["shape"])
        info, sha256 = json.loads(about["info"]), about["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, ColumnsError) else ColumnsError(f"{path}: damaged ({error})") from None
    pieces = [body[slice(*told["data_offsets"])] for told in described.values()]
    if verify and _sha256(about["info"], described, pieces) != sha256:
        raise ColumnsError(f"{path}: damaged, or changed since it was written: its SHA-256 is another; write it again")
    return Columns(path, arrays, info, sha256)


def _sha256(said: str, described: Mapping[str, Any], pieces: list[memoryview]) -> str:
    digest = hashlib.sha256(json.dumps([said, described]).encode())
    for piece in pieces:
        for at in range(0, len(piece), _PIECE):
            digest.update(piece[at : at + _PIECE])
    return digest.hexdigest()


def _again(path: str, sha256: str) -> Columns:
    columns = open_columns(path, verify=False)
    if columns.sha256 != sha256:
        raise ColumnsError(f"{path}: was replaced by another file while it was in use; start again")
    return columns
