"""Text that people and other programs wrote: lines, JSON, labels, paths. A fault names file, line and remedy."""

from __future__ import annotations

import difflib
import json
import math
import os
import reprlib
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

_MOST = 2**62  # of samples and rows: they are kept in 64 bits


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the line where there is one, and the remedy."""


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark, line ends as "\\n"."""
    return "".join(_read(path))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not blank."""
    for number, line in enumerate(_read(path), 1):
        if not line.isspace():
            yield number, line.rstrip("\n")


def _read(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise ManifestError(f"{path}:{number}: a NUL character; if it is UTF-16 text, save it as UTF-8")
                yield line
    except UnicodeDecodeError:
        raise ManifestError(f"{path}:{_undecodable_line(path)}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None


def _undecodable_line(path: Path) -> int:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return content[: error.start].count(b"\n") + 1
    return 1


def shorten(value: object, limit: int = 80) -> str:
    """`value` for a message: printable, and short whatever it is."""
    if isinstance(value, str):
        value = value.strip()
        return repr(value if len(value) <= limit else value[:limit] + "...")
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    return short.repr(value)


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Fault(ValueError):
    """What is JSON to Python's parser but loses or bends what was written."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        values = ", ".join(f"{shorten(key)}: {shorten(value)}" for key, value in pairs[:4])
        raise _Fault(f"the key {shorten(twice)} occurs twice in the object {{{values}}}; keep one of them")
    return entry


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Fault(f"the number {shorten(text)} is too large")
    return number


def _constant(name: str) -> None:
    raise _Fault(f"{name} is not JSON; write null, or leave the field out")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def parse_json(text: str, path: Path, number: int | None = None) -> Any:
    """The value of line `number` of the file, or of the whole file."""
    try:
        value, end = _DECODER.raw_decode(text)  # half the time of `decode`, which looks for blanks around it
        if end == len(text):
            return value
    except (ValueError, RecursionError):
        pass  # it comes again below, where it is told
    where = f"{path}" if number is None else f"{path}:{number}"
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if number is None:
            where += f":{error.lineno}"
        line, hint = text.split("\n")[error.lineno - 1], ""
        if number is None and error.msg == "Extra data":
            hint = "; is it JSON Lines, an object a line? Name it .jsonl"
        elif number == 1 and line.strip() in ("[", "{"):
            hint = "; JSON Lines have one whole object a line. Is it a released list? Name it .json"
        raise ManifestError(f"{where}: not JSON ({error.msg} at column {error.colno}): {shorten(line)}{hint}") from None
    except RecursionError:
        raise ManifestError(f"{where}: nested too deeply; a clip is one flat object") from None
    except ValueError as error:  # a _Fault, or Python's limit on the digits of a number
        raise ManifestError(f"{where}: {error}") from None


def check_fields(entry: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """A misspelt field would silently drop labels or embeddings."""
    if set(known).issuperset(entry):
        return
    for field in entry:
        near = None if field in known else nearest(field, known)
        if near is not None:
            raise ManifestError(f"{where}: unknown field {field!r}; did you mean {near!r}?")


@lru_cache(maxsize=1024)  # the same few fields on every line
def nearest(field: str, known: tuple[str, ...]) -> str | None:
    """The known field that `field` is, or that it looks like a misspelling of."""
    return next(iter(difflib.get_close_matches(field, known, n=1, cutoff=0.8)), None)


def whole_number(value: object, field: str, least: int, where: str) -> int | None:
    """None stays None."""
    if value is None or (type(value) is int and least <= value <= _MOST):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ManifestError(f'{where}: "{field}" must be a whole number of at least {least}, got {shorten(value)}')
    return value


# --- labels ----------------------------------------------------------------------------------------------------------


def label_text(text: str, where: str) -> str:
    """Text becomes a label here and nowhere else.

    Blanks around it go, and it is brought to Unicode's composed form (NFC), because macOS and Linux spell the same
    folder name in two ways. Bytes that are not UTF-8 (in a folder's name) are written out, as in ``caf\\xe9``.
    """
    label = _label_text(text)
    if not label:
        raise ManifestError(f"{where}: an empty label; remove it, or give it a name")
    return label


@lru_cache(maxsize=65536)  # the same few labels on every line
def _label_text(text: str) -> str:
    text = unicodedata.normalize("NFC", text.strip())
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return text.encode("utf-8", "backslashreplace").decode()


def label_list(value: object, where: str) -> tuple[str, ...]:
    """A list of strings, or one string that is one label; each label once."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not {str}.issuperset(map(type, texts)):
        raise ManifestError(
            f'{where}: "labels" must be a list of strings, got {shorten(value)}; put numbers in quotes, as in ["3"]'
        )
    return _once(texts, where)


def comma_separated_labels(value: object, where: str) -> tuple[str, ...]:
    """The released lists' "label,label"; blank for none; each label once."""
    if value is None:
        return ()
    if not isinstance(value, str):
        raise ManifestError(f'{where}: "labels" must be one string of labels with commas between, got {shorten(value)}')
    return _once(value.split(","), where) if value.strip() else ()


def _once(texts: list[str], where: str) -> tuple[str, ...]:
    labels = tuple(map(_label_text, texts))
    if "" in labels:
        label_text("", where)
    return labels if len(set(labels)) == len(labels) else tuple(dict.fromkeys(labels))


# --- events ---------------------------------------------------------------------------------------------------------


def event_list(value: object, where: str) -> list[dict[str, Any]]:
    """Strong labels: objects with "onset" and "offset" in seconds and a "label", sorted by onset."""
    expected = 'a list of objects such as {"onset": 0.5, "offset": 2.25, "label": "dog"}, times in seconds'
    if not isinstance(value, list) or not all(isinstance(event, dict) for event in value):
        raise ManifestError(f'{where}: "events" must be {expected}; got {shorten(value)}')
    events = []
    for event in value:
        check_fields(event, _EVENT_FIELDS, where)
        times, label = [event.get(name) for name in _EVENT_FIELDS[:2]], event.get("label")
        if not isinstance(label, str) or not all(type(time) in (int, float) for time in times):
            raise ManifestError(f'{where}: "events" must be {expected}; got {shorten(event)}')
        onset, offset = times
        if not 0 <= onset < offset:
            raise ManifestError(
                f"{where}: an event from {onset} to {offset} s ({shorten(label)}); expected 0 <= onset < offset"
            )
        events.append({**event, "label": label_text(label, where)})
    return sorted(events, key=lambda event: (event["onset"], event["offset"]))


_EVENT_FIELDS = ("onset", "offset", "label")


# --- paths -----------------------------------------------------------------------------------------------------------


def check_path(value: object, field: str, folder: Path, where: str) -> str:
    """A path as a file system takes it. Bytes that are not UTF-8 are Python's lone surrogates, in JSON ``\\udce9``."""
    if (
        isinstance(value, str)
        and value.isprintable()
        and not (value.startswith((" ", "~")) or "\\" in value or ":" in value or not value)
    ):
        return value  # as nearly all are
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f'{where}: "{field}" must be a file name, got {shorten(value)}')
    if "\0" in value:
        raise ManifestError(f'{where}: "{field}" has a NUL character, which no file name can have: {shorten(value)}')
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ManifestError(
            f'{where}: "{field}" has half a surrogate pair, which no file name can have: {shorten(value)}'
        ) from None
    if os.path.lexists(folder / value):  # odd, but there
        return value
    if "://" in value:
        raise ManifestError(f'{where}: "{field}" is a URL, {shorten(value)}; give the path of a local file')
    if value.startswith("~"):
        raise ManifestError(f'{where}: "{field}" begins with "~", {shorten(value)}; write the home folder out')
    if os.sep == "/" and ("\\" in value or value[1:3] == ":/"):
        raise ManifestError(
            f'{where}: "{field}" is a path of Windows, {shorten(value)}; write it with "/" and relative to {folder}'
        )
    return value
