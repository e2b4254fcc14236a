"""A command's results on stdout. Where they cannot be written, the work is done all the same; the exit code tells."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Stdout(io.TextIOBase):
    """``sys.stdout`` as it was; its first error is kept in ``error``, and what comes after is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def _try(self, action: Any) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error
                # What the stream still holds would raise again when the interpreter ends.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def results() -> Iterator[Stdout | None]:
    """Within, `print` goes to a `Stdout`, flushed at the end; None where stdout is closed, and nothing is printed."""
    _open_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may be no text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        yield None
        return
    stdout = Stdout(sys.stdout)
    with contextlib.redirect_stdout(stdout):
        try:
            yield stdout
        finally:
            stdout.flush()


def _open_standard_descriptors() -> None:
    """Where one is closed (``2>&-``), the next file to be opened would get its number, and what a C library prints
    would go into that file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number
