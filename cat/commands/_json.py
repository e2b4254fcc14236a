"""``--json``, of every command: its result as one JSON value on stdout, where there is nothing else then.

What people read (progress, notes, warnings, errors) is on stderr; exit codes are the same. What is not finite, which
JSON does not know, is null. `predict` alone writes JSON Lines, a file a line, as the files are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for programs")


def tell(args: argparse.Namespace, value: Any, text: str) -> None:
    """Print ``value`` as JSON where that is asked for, else ``text``; and now, not when a later step has failed."""
    print(as_json(value) if args.json else text, flush=True)


def as_json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def left_out(failures: Any) -> list[dict[str, str]]:
    """Of clips or files with ``path`` and ``reason``, or pairs of these."""
    pairs = [(one.path, one.reason) if hasattr(one, "path") else one for one in failures]
    return [{"path": str(path), "reason": reason} for path, reason in pairs]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
