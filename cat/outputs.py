"""Whether a command may write a file: nothing of the user's is replaced without being asked, and no input ever."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class OutputError(ValueError):
    """A file that must not be replaced, or cannot be written; the message names it and the remedy."""


@dataclass(frozen=True)
class Output:
    """A file that a command is about to write.

    ``own`` says whether what stands there now is what the same command wrote earlier, unchanged: only that is replaced
    without being asked. It is only called for a regular file, and anything that it raises means no. ``option`` is what
    moves the file elsewhere.
    """

    path: Path
    own: Callable[[Path], bool]
    option: str = "another name"


def claim(outputs: Sequence[Output], *, inputs: Iterable[Path | None] = (), overwrite: bool = False) -> None:
    """Checks, before any work, that all ``outputs`` may and can be written.

    ``inputs`` are never replaced, whatever names or links lead to them; other files with ``overwrite`` only, unless
    they are the command's own. Raises OutputError.
    """
    read = [path for path in inputs if path is not None]
    for output in outputs:
        for path in read:
            if same_file(output.path, path):
                raise OutputError(
                    f"{output.path} would be written over {path}, which this command reads; that is never done. Give "
                    f"{output.option}."
                )
        _check_place(output)
    for output in outputs:
        if os.path.lexists(output.path) and not overwrite and not is_own(output.path, output.own):
            raise OutputError(
                f"{output.path} exists, and is not, or no longer, what this command wrote; it is left alone. Give "
                f"{output.option}, or --overwrite to replace it."
            )
    places = [os.path.realpath(output.path).casefold() for output in outputs]
    for output, place in zip(outputs, places, strict=True):
        if places.count(place) > 1:
            raise OutputError(f"{output.path} would be written twice, with different content; give {output.option}.")


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether both names lead to one file that exists: by links of both kinds, relative paths, other letter case."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def is_own(path: Path, own: Callable[[Path], bool]) -> bool:
    """Whether `path` is a file that `own` takes for the command's; one that it stumbles over is not."""
    try:
        return path.is_file() and own(path)
    except Exception:  # whatever is wrong with it, nobody can say that the command wrote it
        return False


def json_of(path: Path, **kinds: type) -> dict[str, Any]:
    """The object in a JSON file that has at least these keys, with values of these types. Raises ValueError."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path}: not an object with {', '.join(kinds)}")
    return value


def _check_place(output: Output) -> None:
    path = output.path
    if os.path.lexists(path) and path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise OutputError(f"{path} is {what}; expected the name of a file to write. Give {output.option}.")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "no files can be written there" if folder.is_dir() else "it is a file"
        raise OutputError(f"{path} cannot be written: {folder} is not a folder to write to ({what}).")
