"""The sounds in a table of embeddings that are most like one (`cat-audio similar`): nearest by cosine.

Long files are looked at piece by piece: a piece's embedding is the mean of its frames', as a clip's is.

Shapes: m pieces, D embedding width.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cat.checkpoints.store import PathLike
from cat.data.listing import listed
from cat.data.manifest import Manifest
from cat.encoders.audio import CATEncoder
from cat.encoders.encode import Settings, encode_files, weights_digest
from cat.encoders.reading import Skipped
from cat.encoders.tables import Table, TableError, read_table
from cat.outputs import same_file
from cat.scaling import whitening


@dataclass(frozen=True)
class Pieces:
    """``begin`` and ``end`` (m,) in seconds, ``rows`` (m, D)."""

    paths: list[str]
    begin: np.ndarray
    end: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Hit:
    """``similarity``: the cosine, from -1 to 1."""

    path: str
    begin: float
    end: float
    similarity: float


@dataclass(frozen=True)
class Found:
    """``missing``: files of the folder that the index has no embedding of; ``skipped``: those that cannot be read."""

    hits: list[Hit]
    missing: list[str]
    skipped: list[Skipped]


def find_similar(
    encoder: CATEncoder,
    manifest: Manifest,
    query: PathLike,
    *,
    k: int = 5,
    seconds: float = 10.0,
    index: Path | None = None,
    whiten: bool = False,
    num_workers: int = 0,
    progress: bool = False,
) -> Found:
    """The ``k`` pieces of at most about ``seconds`` in the manifest's files that are most like the file ``query``, the
    nearest first; ``query`` itself is no answer.

    ``index``: a table of `encode_files` that is read where it is there, and written where it is not. Made without
    frames, its files are one piece each.

    ``whiten``: for encoders whose clips all lie in nearly one direction, and some hundreds of clips (see `nearest`).

    Raises: `TableError` for an index by another encoder, and for a query that cannot be read.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    if not seconds >= encoder.seconds_per_frame:
        raise ValueError(f"seconds is {seconds}; expected at least a frame, {encoder.seconds_per_frame:g}")
    skipped: list[Skipped] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        settings = Settings(frames=True)
        if index is not None and index.exists():
            table = _read_index(index, encoder)
            header = table.header
            settings = Settings(header["frames"], header["layer"], header["window"], header["overlap"])
            encoder = CATEncoder(replace(encoder.config, pooling=header["pooling"]), encoder=encoder.encoder)
        else:
            index = index or place / "index.npz"
            done = encode_files(encoder, manifest, index, settings, num_workers=num_workers, progress=progress)
            skipped = done.skipped
            if not done.files:
                raise TableError(f"none of the {len(manifest)} files could be read; the first: {_told(skipped[0])}")
            table = read_table(index)
        asked = encode_files(encoder, listed([query]), place / "query.npz", settings)
        if asked.skipped:
            raise TableError(f"the query cannot be used: {_told(asked.skipped[0])}")
        wanted = read_table(place / "query.npz")
    row = wanted.clip[0] if wanted.frames is None else wanted.frames.mean(axis=0)
    known = {os.path.abspath(path): path for path in table.paths}
    paths = [str(manifest.path(number)) for number in range(len(manifest))]
    left_out = {one.path for one in skipped}
    missing = [path for path in paths if os.path.abspath(path) not in known and path not in left_out]
    if len(missing) == len(paths):
        raise TableError(f"{index} has none of the {len(paths)} files, as {paths[0]}; give another --index")
    there = (known[name] for name in map(os.path.abspath, paths) if name in known)
    among = {path for path in there if not same_file(path, query)}
    return Found(nearest(pieces_of(table, seconds), row, k, among, whiten=whiten), missing, skipped)


def pieces_of(table: Table, seconds: float) -> Pieces:
    """Each file in pieces of equal length, to a frame, near ``seconds``."""
    if table.offsets is None or table.frames is None:
        return Pieces(table.paths, np.zeros(len(table.paths)), table.seconds, table.clip)
    step = table.header["frame_seconds"]
    paths, begin, end, rows = [], [], [], []
    for path, length, first, last in zip(table.paths, table.seconds, *_bounds(table.offsets), strict=True):
        count = max(1, round((last - first) * step / seconds))
        edges = [int(first + (last - first) * number // count) for number in range(count + 1)]
        for place, (a, b) in enumerate(itertools.pairwise(edges), start=1):
            paths.append(path)
            begin.append((a - first) * step)
            end.append(length if place == count else (b - first) * step)
            rows.append(table.frames[a:b].mean(axis=0, dtype=np.float64))
    return Pieces(paths, np.array(begin), np.array(end), np.array(rows, dtype=np.float32))


def nearest(pieces: Pieces, row: np.ndarray, k: int, among: set[str], *, whiten: bool = False) -> list[Hit]:
    """The ``k`` pieces of the files ``among`` that are nearest to ``row`` (D,). ``whiten``: in the space of their up to
    64 leading principal components, each scaled to deviation 1."""
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError as error:
        raise ImportError(
            f"finding neighbours needs scikit-learn ({error}): pip install 'cat-kernels[train]'"
        ) from None
    chosen = [number for number, path in enumerate(pieces.paths) if path in among]
    if not chosen:
        return []
    rows, wanted = pieces.rows[chosen], row[None]
    if whiten and len(chosen) > 1:
        whitened = whitening(rows)
        rows, wanted = whitened(rows), whitened(wanted)
    search = NearestNeighbors(n_neighbors=min(k, len(chosen)), metric="cosine").fit(rows)
    distances, places = search.kneighbors(wanted)
    found = []
    for distance, place in zip(distances[0].tolist(), places[0].tolist(), strict=True):
        number = chosen[place]
        begin, end = float(pieces.begin[number]), float(pieces.end[number])
        found.append(Hit(pieces.paths[number], begin, end, 1 - distance))
    return found


def _read_index(path: Path, encoder: CATEncoder) -> Table:
    table = read_table(path)
    if table.header["weights"] != weights_digest(encoder):
        raise TableError(
            f"{path}: its embeddings are another encoder's; give the one that made it, or another --index, to "
            "make a new one"
        )
    return table


def _bounds(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return offsets[:-1], offsets[1:]


def _told(skipped: Skipped) -> str:
    return f"{os.fspath(skipped.path)}: {skipped.reason}"
