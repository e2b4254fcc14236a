"""The clips of a data set, in a few arrays.

As Python objects 400,000 clips are 200 MB, and every data worker gets a copy of its own: a fork shares memory until it
is written to, and merely looking at an object writes its reference count. Here they are 100 bytes each, and shared;
those of a file (`Clips.save`, `Clips.open`) by all processes of a machine.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from cat.data.columns import Columns, ColumnsError, open_columns, write_columns
from cat.data.text import label_text

CLIP_FIELDS = ("path", "samples", "sample_rate", "labels", "embedding")


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file. ``samples`` and ``sample_rate`` are None where the list does not say; the file's own header
    always decides, because released lists are known to count samples at another rate than the files have.
    """

    path: str  # relative to the manifest's root, or absolute
    samples: int | None = None
    sample_rate: int | None = None
    labels: tuple[str, ...] = ()
    embedding: int | None = None  # row of the data set's embedding file
    extra: dict[str, Any] = field(default_factory=dict, compare=False)  # the manifest's own fields, as JSON has them
    negative: bool = False  # its list says that it has none of the labels ("labels": []), not nothing


# Of a clip, in their order.
Fields = tuple[str, int | None, int | None, tuple[str, ...], int | None, dict[str, Any], bool]


class Texts(Sequence[str]):
    """Strings, as the bytes of all and where each one ends. Paths of any bytes, by Python's surrogate escapes."""

    __slots__ = ("_bytes", "_columns", "_ends")
    _bytes: Any  # a bytearray, or a file's memory, where nothing is appended
    _ends: Any
    _columns: tuple[Columns, str, str] | None  # of a file

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends, self._columns = bytearray(), array("q", [0]), None
        for text in texts:
            self.append(text)

    @classmethod
    def of(cls, file: Columns, content: str, ends: str) -> Texts:
        """The texts whose `arrays` are these two columns, without a copy."""
        texts = cls.__new__(cls)
        texts._bytes, texts._ends, texts._columns = file[content].data, file[ends].data, (file, content, ends)
        return texts

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self._columns is None else (Texts.of, self._columns)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(m,) uint8: the bytes of all; (n + 1,) int64: where each text begins, and the end. No copies."""
        return np.asarray(memoryview(self._bytes)), np.asarray(memoryview(self._ends))

    def take(self, indices: np.ndarray) -> Texts:
        """These ones, in this order."""
        taken = Texts()
        for index in indices.tolist():
            taken._bytes += self._bytes[self._ends[index] : self._ends[index + 1]]
            taken._ends.append(len(taken._bytes))
        return taken

    def mention(self, part: str) -> bool:
        """False only if none of them has this part."""
        return re.search(re.escape(part.encode("utf-8", "surrogateescape")), self._bytes) is not None

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        content, begin = self._bytes, 0
        for end in itertools.islice(self._ends, 1, None):
            yield str(content[begin:end], "utf-8", "surrogateescape")
            begin = end

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        return str(self._bytes[self._ends[index] : self._ends[index + 1]], "utf-8", "surrogateescape")


class Files(Sequence[Path]):
    """Paths in a folder, or absolute ones."""

    __slots__ = ("_folder", "names")

    def __init__(self, folder: Path, names: Texts) -> None:
        self._folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Path | Files:
        if isinstance(index, slice):
            return Files(self._folder, self.names[index])
        return self._folder / self.names[index]


class Clips(Sequence[Clip]):
    """A sequence of `Clip`, each made when it is asked for. Compares equal to any sequence of the same clips."""

    __slots__ = (
        *("_extra", "_file", "_label_ends", "_label_ids", "_labels", "_negative", "_rates", "_rows", "_samples"),
        "paths",
    )
    # Arrays, or a file's memory. -1 for None.
    _samples: array[int] | memoryview
    _rates: array[int] | memoryview
    _rows: array[int] | memoryview
    _label_ids: array[int] | memoryview
    _label_ends: array[int] | memoryview
    _negative: array[int] | memoryview
    _file: Columns | None

    def __init__(self, clips: Iterable[Clip]) -> None:
        self._fill((c.path, c.samples, c.sample_rate, c.labels, c.embedding, c.extra, c.negative) for c in clips)

    @classmethod
    def of_fields(cls, clips: Iterable[Fields]) -> Clips:
        """Without making a `Clip` of each, which takes a fifth of the time of reading a manifest."""
        made = cls.__new__(cls)
        made._fill(clips)
        return made

    def _fill(self, clips: Iterable[Fields]) -> None:
        paths, extras = Texts(), Texts()
        samples, rates, rows = array("q"), array("q"), array("q")
        label_ids, label_ends, negatives = array("i"), array("q", [0]), array("b")
        ids = _LabelIds()
        encode, extra_ends = json.JSONEncoder(allow_nan=False).encode, extras._ends
        for clip in clips:
            path, count, rate, labels, row, extra, negative = clip
            paths.append(path)
            try:
                if isinstance(labels, str):
                    raise TypeError("labels are a tuple of strings")
                samples.append(-1 if count is None else count)
                rates.append(-1 if rate is None else rate)
                rows.append(-1 if row is None else row)
                label_ids.extend(dict.fromkeys([ids[text] for text in labels]))
            except (TypeError, OverflowError) as error:
                raise TypeError(f"{Clip(*clip)!r}: {error}; expected the types that Clip names") from None
            label_ends.append(len(label_ids))
            negatives.append(negative and not labels)
            if extra:
                extras.append(encode(extra))
            else:
                extra_ends.append(extra_ends[-1])
        self.paths, self._extra, self._labels, self._file = paths, extras, tuple(ids.clean), None
        self._samples, self._rates, self._rows = samples, rates, rows
        self._label_ids, self._label_ends, self._negative = label_ids, label_ends, negatives

    # ------------------------------------------------------------ on disk

    def save(
        self,
        path: str | os.PathLike[str],
        columns: Mapping[str, np.ndarray] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Write them into one file, whole or not at all, for `open`. ``columns``: arrays of the caller's own, and
        ``info``, anything that JSON can say; `Clips.file` gives them again."""
        (paths, path_ends), (extra, extra_ends) = self.paths.arrays, self._extra.arrays
        own = {
            "paths": paths,
            "path_ends": path_ends,
            "extra": extra,
            "extra_ends": extra_ends,
            "samples": np.asarray(self._samples),
            "rates": np.asarray(self._rates),
            "rows": np.asarray(self._rows),
            "label_ids": np.asarray(self._label_ids),
            "label_ends": np.asarray(self._label_ends),
            "negative": np.asarray(self._negative),
        }
        stored = {_OWN + name: array for name, array in own.items()}
        write_columns(path, {**(columns or {}), **stored}, {**(info or {}), "labels": self._labels})

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Clips:
        """The clips that `save` wrote, memory-mapped: opened in no time, and in memory once a machine, whatever the
        number of processes. ``verify``, and errors: see `cat.data.columns.open_columns`."""
        return cls.of(open_columns(path, verify=verify))

    @classmethod
    def of(cls, file: Columns) -> Clips:
        """The clips of an opened file."""
        clips = cls(())
        try:
            own = {name: file[_OWN + name] for name in _DTYPES}
            clips._labels = tuple(file.info["labels"])
        except KeyError as error:
            raise ColumnsError(f"{file.path}: it has no clips in it ({error} is missing)") from None
        wrong = [f"{name} is {own[name].dtype}" for name, dtype in _DTYPES.items() if own[name].dtype != dtype]
        if wrong:
            raise ColumnsError(f"{file.path}: {wrong[0]}, expected {_DTYPES[wrong[0].split()[0]]}; write it again")
        clips._file = file
        clips.paths = Texts.of(file, f"{_OWN}paths", f"{_OWN}path_ends")
        clips._extra = Texts.of(file, f"{_OWN}extra", f"{_OWN}extra_ends")
        clips._samples, clips._rates, clips._rows = (own[name].data for name in ("samples", "rates", "rows"))
        clips._label_ids, clips._label_ends = own["label_ids"].data, own["label_ends"].data
        clips._negative = own["negative"].data
        return clips

    @property
    def file(self) -> Columns | None:
        """What the clips are memory-mapped from; None for those that are not."""
        return self._file

    def __getstate__(self) -> dict[str, Any] | Columns:
        if self._file is not None:
            return self._file
        return {name: getattr(self, name) for name in Clips.__slots__}

    def __setstate__(self, state: dict[str, Any] | Columns) -> None:
        if isinstance(state, Columns):
            opened = Clips.of(state)
            state = {name: getattr(opened, name) for name in Clips.__slots__}
        for name, value in state.items():
            setattr(self, name, value)

    # ------------------------------------------------------------ columns

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that occurs."""
        return self._labels

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64: the clips' embedding rows, -1 for none."""
        return np.array(self._rows, dtype=np.int64)

    @property
    def label_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(m,) numbers of `labels` by clip; (n + 1,) where each clip's begin; (n,) bool: which are negative."""
        ids, ends = np.array(self._label_ids, dtype=np.int64), np.array(self._label_ends, dtype=np.int64)
        return ids, ends, np.array(self._negative, dtype=bool)

    def mention(self, field: str) -> bool:
        """Whether some clip may have a field of the manifest's own; False is certain."""
        return self._extra.mention(f'"{field}":')

    def take(self, indices: np.ndarray) -> Clips:
        """These clips, in this order, without rows of an embedding file."""
        taken = Clips(())
        taken.paths, taken._extra = self.paths.take(indices), self._extra.take(indices)
        taken._samples = array("q", np.array(self._samples)[indices].tobytes())
        taken._rates = array("q", np.array(self._rates)[indices].tobytes())
        taken._rows = array("q", np.full(len(indices), -1).tobytes())
        taken._negative = array("b", np.array(self._negative)[indices].tobytes())
        ids, ends, _ = self.label_table
        counts = np.diff(ends)[indices]
        taken_ends = np.append(0, np.cumsum(counts))
        taken._label_ends = array("q", taken_ends.tobytes())
        # The numbers of one clip follow each other: its first one's place, and then one further each.
        first = np.repeat(ends[:-1][indices] - taken_ends[:-1], counts)
        kept = ids[first + np.arange(len(first))]
        present = np.unique(kept)
        taken._label_ids = array("i", np.searchsorted(present, kept).astype(np.int32).tobytes())
        taken._labels = tuple(self._labels[i] for i in present.tolist())
        return taken

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> Clips: ...
    def __getitem__(self, index: int | slice) -> Clip | Clips:
        if isinstance(index, slice):
            return Clips(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        samples, rate, row = self._samples[index], self._rates[index], self._rows[index]
        labels = self._label_ids[self._label_ends[index] : self._label_ends[index + 1]]
        extra = self._extra[index]
        return Clip(
            self.paths[index],
            None if samples < 0 else samples,
            None if rate < 0 else rate,
            tuple([self._labels[i] for i in labels]),
            None if row < 0 else row,
            json.loads(extra) if extra else {},
            bool(self._negative[index]),
        )

    def __iter__(self) -> Iterator[Clip]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} clips>"


_OWN = "clips."  # columns of a file begin so, those of the caller do not
_DTYPES = {
    "paths": np.dtype("u1"),
    "path_ends": np.dtype("<i8"),
    "extra": np.dtype("u1"),
    "extra_ends": np.dtype("<i8"),
    "samples": np.dtype("<i8"),
    "rates": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "label_ids": np.dtype("<i4"),
    "label_ends": np.dtype("<i8"),
    "negative": np.dtype("i1"),
}


class _LabelIds(dict[str, int]):
    """Text -> the number of the label that it is."""

    def __init__(self) -> None:
        super().__init__()
        self.clean: dict[str, int] = {}

    def __missing__(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a label is text, got {text!r}")
        self[text] = number = self.clean.setdefault(label_text(text, "a clip"), len(self.clean))
        return number
