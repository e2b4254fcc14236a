"""Embeddings of files in one file: .npz, .parquet or .h5, written block by block, whole or not at all.

.npz and .h5 hold, under these names::

    paths (n,)     seconds (n,)     clip (n, E)             of each file
    offsets (n+1,)                                          its frames are offsets[i] to offsets[i+1]; with frames only
    frames (R, D)  times (R,)                               of all files; times are the frames' centres in seconds
    header                                                  JSON: what made them

.parquet has a row a file (path, seconds, embedding), or with frames a row a frame (path, seconds, time, embedding), and
the header in its metadata. Reading takes all three.

Shapes: n files, E and D embedding widths, R frames.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FORMAT, VERSION = "cat-audio encode", 1
SUFFIXES = (".npz", ".parquet", ".h5")
_BLOCK = 1 << 16  # rows copied at once


class TableError(ValueError):
    """A file of embeddings that cannot be written or read."""


@dataclass(frozen=True)
class Block:
    """Some files, in order. ``frames`` (sum of ``rows``, D) and ``times``, or None."""

    paths: list[str]
    seconds: np.ndarray
    clip: np.ndarray
    rows: np.ndarray
    frames: np.ndarray | None
    times: np.ndarray | None


@dataclass(frozen=True)
class Table:
    """A whole file. Without frames ``offsets``, ``frames`` and ``times`` are None."""

    header: dict[str, Any]
    paths: list[str]
    seconds: np.ndarray
    clip: np.ndarray
    offsets: np.ndarray | None
    frames: np.ndarray | None
    times: np.ndarray | None


def check_suffix(path: Path) -> None:
    """Raises `TableError` for a name that says no format; ImportError where its package is missing."""
    if path.suffix not in SUFFIXES:
        raise TableError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        _library("pyarrow.parquet")
    elif path.suffix == ".h5":
        _library("h5py")


def write_table(path: Path, suffix: str, header: dict[str, Any], blocks: Callable[[], Iterable[Block]]) -> None:
    """Writes ``path`` in the format that ``suffix`` says; ``blocks()`` may be gone through several times."""
    header = {"format": FORMAT, "version": VERSION, **header}
    {".npz": _write_npz, ".parquet": _write_parquet, ".h5": _write_h5}[suffix](path, header, blocks)


def read_table(path: Path) -> Table:
    """Raises: `TableError` for a file that `write_table` did not write, ImportError."""
    check_suffix(path)
    try:
        table = {".npz": _read_npz, ".parquet": _read_parquet, ".h5": _read_h5}[path.suffix](path)
        if table.header.get("format") != FORMAT or table.header.get("version") != VERSION:
            raise ValueError(f"format {table.header.get('format')!r} version {table.header.get('version')!r}")
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; make it with cat-audio encode") from None
    except ImportError:
        raise
    except Exception as error:  # of damaged files these libraries raise anything
        raise TableError(f"{path}: not what cat-audio encode writes ({error})") from None
    return table


def is_table(path: Path) -> bool:
    """Whether it is a file of ours, by its header."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return _header(str(file["header"])).get("format") == FORMAT
    if path.suffix == ".h5":
        with _library("h5py").File(path) as file:
            return _header(file.attrs["header"]).get("format") == FORMAT
    metadata = _library("pyarrow.parquet").read_schema(path).metadata
    return _header(metadata[b"header"].decode()).get("format") == FORMAT


def _header(text: str) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise TypeError("the header is no object")
    return header


def _library(name: str) -> ModuleType:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        suffix = ".h5" if name == "h5py" else ".parquet"
        raise ImportError(
            f"{suffix} needs the package {name.partition('.')[0]} ({error}): pip install 'cat-kernels[files]', or name "
            "the file .npz"
        ) from None


def _utf8(path: str) -> str:
    """A path of any bytes as text that every format takes; what is not UTF-8 becomes \\xff."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Column:
    """An array of the whole, and its part of a block."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    of: Callable[[Block], np.ndarray]


def _columns(blocks: Callable[[], Iterable[Block]]) -> list[_Column]:
    """All but the paths: sizes are looked up first, so that no format needs to know more than the present block."""
    files = frames = 0
    first: Block | None = None
    for block in blocks():
        first = first or block
        files += len(block.paths)
        frames += int(block.rows.sum())
    if first is None:
        raise TableError("there are no embeddings to write")
    columns = [
        _Column("seconds", np.dtype("<f8"), (files,), lambda block: block.seconds),
        _Column("clip", np.dtype("<f4"), (files, first.clip.shape[1]), lambda block: block.clip),
    ]
    if first.frames is not None:
        columns += [
            _Column("rows", np.dtype("<i8"), (files,), lambda block: block.rows),
            _Column("frames", np.dtype("<f4"), (frames, first.frames.shape[1]), lambda block: block.frames),  # type: ignore[return-value, arg-type]
            _Column("times", np.dtype("<f8"), (frames,), lambda block: block.times),  # type: ignore[return-value, arg-type]
        ]
    return columns


def _pieces(column: _Column, blocks: Callable[[], Iterable[Block]]) -> Iterator[np.ndarray]:
    for block in blocks():
        rows = column.of(block)
        for at in range(0, len(rows), _BLOCK):
            yield np.ascontiguousarray(rows[at : at + _BLOCK], dtype=column.dtype)


def _paths(blocks: Callable[[], Iterable[Block]]) -> list[str]:
    return [_utf8(path) for block in blocks() for path in block.paths]


def _offsets(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)


# ---------------------------------------------------------------- .npz


def _write_npz(path: Path, header: dict[str, Any], blocks: Callable[[], Iterable[Block]]) -> None:
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:

        def whole(name: str, array: np.ndarray) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)

        whole("header", np.array(json.dumps(header)))
        whole("paths", np.array(_paths(blocks)))
        for column in _columns(blocks):
            if column.name == "rows":
                whole("offsets", _offsets(np.concatenate([block.rows for block in blocks()])))
                continue
            about = {"descr": column.dtype.str, "fortran_order": False, "shape": column.shape}
            with archive.open(f"{column.name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, about)
                for piece in _pieces(column, blocks):
                    file.write(piece.tobytes())


def _read_npz(path: Path) -> Table:
    with np.load(path, allow_pickle=False) as file:
        there = {name: file[name] for name in file.files}
    return Table(
        _header(str(there["header"])),
        [str(name) for name in there["paths"]],
        there["seconds"],
        there["clip"],
        *(there.get(name) for name in ("offsets", "frames", "times")),
    )


# ---------------------------------------------------------------- .h5


def _write_h5(path: Path, header: dict[str, Any], blocks: Callable[[], Iterable[Block]]) -> None:
    h5py = _library("h5py")
    with h5py.File(path, "w") as file:
        file.attrs["header"] = json.dumps(header)
        file.create_dataset("paths", data=_paths(blocks), dtype=h5py.string_dtype())
        for column in _columns(blocks):
            if column.name == "rows":
                file["offsets"] = _offsets(np.concatenate([block.rows for block in blocks()]))
                continue
            dataset = file.create_dataset(column.name, column.shape, column.dtype)
            at = 0
            for piece in _pieces(column, blocks):
                dataset[at : at + len(piece)] = piece
                at += len(piece)


def _read_h5(path: Path) -> Table:
    with _library("h5py").File(path) as file:
        return Table(
            _header(file.attrs["header"]),
            [name.decode() for name in file["paths"][:]],
            file["seconds"][:],
            file["clip"][:],
            *(file[name][:] if name in file else None for name in ("offsets", "frames", "times")),
        )


# ---------------------------------------------------------------- .parquet


def _write_parquet(path: Path, header: dict[str, Any], blocks: Callable[[], Iterable[Block]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {column.name: column for column in _columns(blocks)}
    with_frames = "frames" in columns
    width = columns["frames" if with_frames else "clip"].shape[1]
    numbers = ["seconds", "time"] if with_frames else ["seconds"]
    fields = [("path", pa.string()), *((name, pa.float64()) for name in numbers)]
    schema = pa.schema([*fields, ("embedding", pa.list_(pa.float32(), width))], {"header": json.dumps(header)})

    def rows(embeddings: np.ndarray, *others: np.ndarray) -> Any:
        values = pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1))
        arrays = [*map(pa.array, others), pa.FixedSizeListArray.from_arrays(values, width)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks():
            paths = np.array([_utf8(name) for name in block.paths], dtype=object)
            if block.frames is None or block.times is None:
                writer.write_batch(rows(block.clip, paths, block.seconds))
                continue
            paths, seconds = np.repeat(paths, block.rows), np.repeat(block.seconds, block.rows)
            for at in range(0, len(paths), _BLOCK):
                part = slice(at, at + _BLOCK)
                writer.write_batch(rows(block.frames[part], paths[part], seconds[part], block.times[part]))


def _read_parquet(path: Path) -> Table:
    table = _library("pyarrow.parquet").read_table(path)
    header = _header(table.schema.metadata[b"header"].decode())
    embeddings = table["embedding"].combine_chunks()
    rows = embeddings.flatten().to_numpy().reshape(len(embeddings), -1)
    paths = table["path"].to_pylist()
    seconds = table["seconds"].to_numpy()
    if "time" not in table.column_names:
        return Table(header, paths, seconds, rows, None, None, None)
    starts = [i for i, name in enumerate(paths) if i == 0 or name != paths[i - 1]]
    offsets = np.array([*starts, len(paths)], dtype=np.int64)
    times = table["time"].to_numpy()
    bounds = list(itertools.pairwise(offsets.tolist()))
    clip = np.stack([rows[start:end].mean(axis=0, dtype=np.float64) for start, end in bounds]).astype(np.float32)
    return Table(header, [paths[start] for start in starts], seconds[starts], clip, offsets, rows, times)
