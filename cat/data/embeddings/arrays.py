"""Arrays of embeddings as ``.npy`` files, memory-mapped, never pickled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cat.data.embeddings.sidecar import EmbeddingError

NPY_HEADER = 128  # bytes; enough for any number of rows, so that the header can be written last


def open_rows(path: Path) -> np.ndarray:
    def damaged(reason: str) -> EmbeddingError:
        return EmbeddingError(f"{path}: not a readable .npy array ({reason}); run `cat-audio embed` again")

    rows = read_npy(path, damaged)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise EmbeddingError(f"{path}: expected a (rows, dim) array of floats, got {rows.dtype} {rows.shape}")
    return rows


def read_npy(path: Path, damaged: Callable[[str], Exception]) -> np.ndarray:
    """A .npy file, memory-mapped: never a .npz or a pickle, and a header that lies about the size allocates nothing."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of a damaged header also TokenError, SyntaxError, ...: numpy has Python read it
        raise damaged(str(error)) from None


def as_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinite, and is then refused
        return np.array(values, dtype=np.float32)


def checksum(parts: Iterable[np.ndarray]) -> str:
    """SHA-256 of the numbers as little-endian float32, as `EmbeddingWriter` writes them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
    return digest.hexdigest()


def npy_header(shape: tuple[int, int]) -> bytes:
    """A .npy version 1.0 header of exactly `NPY_HEADER` bytes for a C-ordered little-endian float32 array."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.encode().ljust(NPY_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little") + body
