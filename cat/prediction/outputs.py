"""Files of results that are written as the results come, so that nothing done is lost, and appear whole.

While the work goes on, the rows lie in ``OUT.part/rows.jsonl``, one a line behind a line that says what made them. The
same command goes on from there; what made OUT.part otherwise is an error. At the end OUT is written, and OUT.part goes.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cat.data.content import Stored
from cat.files import append, replacing, sha256_of
from cat.locks import sole_user
from cat.outputs import Output, OutputError, claim
from cat.prediction.classifier import Aggregate, CATClassifier
from cat.prediction.events import EventSettings
from cat.prediction.files import FileResult, predict_files
from cat.prediction.windows import Plan
from cat.progress import Progress, say

ROWS = "rows.jsonl"
CSV_COLUMNS = {
    "scores": ("path", "rank", "label", "name", "score"),
    "events": ("path", "onset", "offset", "label", "name", "score"),
}


Row = dict[str, Any]


def write_predictions(
    classifier: CATClassifier,
    files: Sequence[Path | Stored],
    outputs: Mapping[Path, str],
    *,
    plan: Plan,
    events: Mapping[str, EventSettings] | None = None,
    aggregate: Aggregate = "auto",
    top: int = 5,
    windows: bool = False,
    batch_size: int = 16,
    show: Callable[[Row], None] = lambda row: None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[FileResult]:
    """`predict_files` into ``outputs``, each "json" or "csv" by its name; goes on where it was stopped. ``show`` gets
    the row of each file that is done now. Returns the files that failed, which is told on the way too."""
    kind = "scores" if events is None else "events"
    made_by = {
        "model": sha256_of(classifier.info.path) if outputs else "",
        "plan": [plan.rows, plan.hop, plan.lookahead, plan.shifts],
        "events": None if events is None else {label: vars(one) for label, one in events.items()},
        "rows": [top, windows, aggregate],
    }
    failed = []
    on_disk = [file for file in files if isinstance(file, Path)]
    with contextlib.ExitStack() as stack:
        results = [
            stack.enter_context(ResultFile(out, form, kind, made_by, inputs=on_disk, overwrite=overwrite))
            for out, form in outputs.items()
        ]
        left = [file for file in files if not results or not all(str(file) in one for one in results)]
        before = len(files) - len(left)
        if before:
            say(f"{before} of {len(files)} files were done before; going on")
        bar = stack.enter_context(
            contextlib.closing(Progress(len(files), before, label=kind, unit="files", enabled=progress))
        )
        found = predict_files(classifier, left, plan=plan, events=events, aggregate=aggregate, batch_size=batch_size)
        try:
            for done, result in enumerate(found, start=before + 1):
                row = result.row(classifier, top, windows)
                for one in results:
                    one.add(row)
                show(row)
                if result.error is not None:
                    failed.append(result)
                    bar.say(f"{result.path}: {result.error}")
                bar.advance(done)
        except BaseException:
            for one in results:
                say(f"{len(one)} of {len(files)} files are kept in {one.part}; the same command goes on from there")
            raise
        for one in results:
            one.finish([str(file) for file in files])
    return failed


class ResultFile:
    """OUT, as JSON Lines (a file a line) or CSV (a class of a file, or an event, a line)::

    with ResultFile(out, "csv", "scores", made_by) as results:
        for file in files:
            if file not in results:
                results.add(row_of(file))
        results.finish(files)
    """

    def __init__(
        self,
        out: Path,
        form: str,
        kind: str,
        made_by: Mapping[str, Any],
        *,
        inputs: Sequence[Path] = (),
        overwrite: bool = False,
    ) -> None:
        """``form``: "json" or "csv"; ``kind``: "scores" or "events"; ``made_by``: what the rows depend on, as JSON has
        it. OUT is only replaced with ``overwrite``, and ``inputs`` never. Raises OutputError."""
        claim([Output(out, lambda path: False, "another name")], inputs=inputs, overwrite=overwrite)
        self.out, self._form, self._kind, self._overwrite = out, form, kind, overwrite
        self._header = {"form": kind, **made_by}
        self.part = out.with_name(out.name + ".part")
        self._stack = contextlib.ExitStack()
        self._done: dict[str, int] = {}  # path -> where its line begins
        self._rows: FileIO

    def __enter__(self) -> ResultFile:
        self._stack.enter_context(sole_user(self.part, remedy="wait for it to end, or give another name"))
        try:
            self._rows = self._stack.enter_context(open(self.part / ROWS, "ab", buffering=0))
            with open(self.part / ROWS, "rb") as file:
                self._read(file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        with contextlib.suppress(OSError):  # not empty: to be gone on with
            self.part.rmdir()

    def __contains__(self, path: str) -> bool:
        return path in self._done

    def __len__(self) -> int:
        return len(self._done)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps the row of a file; a failed one's is written, and tried again when the work goes on."""
        place = self._rows.seek(0, os.SEEK_END)
        append(self._rows, json.dumps(row).encode() + b"\n")
        self._done[row["path"]] = place

    def finish(self, paths: Sequence[str]) -> Path:
        """Writes OUT, with the rows of ``paths`` in this order, and removes what it was made of."""
        with (
            replacing(self.out) as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
            open(self.part / ROWS, "rb") as rows,
        ):
            write = writer(file, self._form, self._kind)
            for path in paths:
                if path in self._done:
                    rows.seek(self._done[path])
                    write(json.loads(rows.readline()))
        (self.part / ROWS).unlink()
        return self.out

    def _read(self, file: IO[bytes]) -> None:
        header = file.readline()
        try:
            same = bool(header) and json.loads(header) == self._header
        except ValueError:
            same = False
        if not same:
            if header.endswith(b"\n") and not self._overwrite:
                raise OutputError(
                    f"{self.part} holds results of another model, or of other settings, that was stopped; go on with "
                    "what made it, give another name, or --overwrite to begin afresh"
                )
            self._rows.truncate(0)
            append(self._rows, json.dumps(self._header).encode() + b"\n")
            return
        place = len(header)
        for line in file:
            if not line.endswith(b"\n"):  # killed while it was written
                self._rows.truncate(place)
                break
            row = json.loads(line)
            if "error" not in row:
                self._done[row["path"]] = place
            place += len(line)


def writer(file: IO[str], form: str, kind: str) -> Any:
    """A function that writes a file's row to an open file, as JSON Lines or CSV."""
    if form == "json":
        return lambda row: file.write(json.dumps(row) + "\n")
    table = csv.writer(file, lineterminator="\n")
    columns = CSV_COLUMNS[kind]
    table.writerow(columns)
    return lambda row: table.writerows([line[name] for name in columns] for line in _lines(row, kind))


def _lines(row: Mapping[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    for rank, entry in enumerate(row.get(kind, ()), start=1):
        yield {"path": row["path"], "rank": rank, **entry}
