"""Updates that were skipped because their loss or gradient was not finite (`cat.training.descent`), and their batches.

The batch of each is written down as ``skipped/step-00000008.json`` in the run directory, without audio, weights or
pickles: what of the run makes it again (`cat.training.replay`)::

    {"step": 8, "command": "cat-audio pretrain", "values": {"loss": null, ..., "grad_norm": null},
     "clips": [{"index": 3, "path": "/audio/3.wav"}, ...], "config": {...}, "data": {...}, "made_with": {...}}

``step`` counts updates, the skipped one too. With run.precision=fp16 a gradient that is too large for its scale is no
fault of the batch: the update is skipped and the scale halved, and nothing of it is written down but the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat.config import ConfigError
from cat.files import write_json

FOLDER = "skipped"
MOST = 100  # batches that a run writes down
_FIELDS = {"step": int, "command": str, "values": dict, "clips": list, "config": dict, "data": dict, "made_with": dict}


def finite(row: Mapping[str, Any]) -> bool:
    """Whether all numbers of an update are; one read back has null for one that is not."""
    return all(value is not None and math.isfinite(value) for value in row.values())


def was_skipped(row: Mapping[str, Any]) -> bool:
    """Whether this update left the weights alone."""
    norm = row["grad_norm"]
    return norm is None or not math.isfinite(norm)


def overflowed(row: Mapping[str, Any]) -> bool:
    """Whether it was skipped because of its scale, which has become smaller with it."""
    loss = row["loss"]
    return was_skipped(row) and row.get("scale", 0.0) > 1 and loss is not None and math.isfinite(loss)


@dataclass(frozen=True)
class SkippedBatch:
    """What a file says of the batch of a skipped update."""

    path: Path
    step: int
    command: str
    values: dict[str, Any]
    clips: list[dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, Any]
    made_with: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.path.parent.parent


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}.json"


def write_batch(run_dir: Path, about: Mapping[str, Any]) -> Path:
    path = path_of(run_dir, about["step"])
    values = {key: value if math.isfinite(value) else None for key, value in about["values"].items()}
    write_json(path, {**about, "values": values})
    return path


def read_batch(path: Path) -> SkippedBatch:
    """Raises: `ConfigError` for another file."""
    if path.is_dir():
        found = sorted((path / FOLDER).glob("step-*.json")) or sorted(path.glob("step-*.json"))
        hint = f": {found[0]}" if found else ""
        raise ConfigError(f"{path} is a directory; expected the file of a skipped batch{hint}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        about = None
    if not isinstance(about, dict) or not all(isinstance(about.get(key), kind) for key, kind in _FIELDS.items()):
        raise ConfigError(
            f"{path} is not the file of a skipped batch; expected RUN/{FOLDER}/step-NUMBER.json, as a run writes it "
            "when a loss or a gradient is not finite"
        )
    return SkippedBatch(path.absolute(), **{key: about[key] for key in _FIELDS})


def clear_after(run_dir: Path, step: int) -> None:
    """Delete what was written down after ``step``: a run that goes on from there makes those updates again."""
    for path in (run_dir / FOLDER).glob("step-*.json"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            path.unlink()


def telling(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run that say all about its skipped updates: these, and the row after each."""
    return [row for at, row in enumerate(rows) if was_skipped(row) or (at and was_skipped(rows[at - 1]))]


class Skips:
    """The skipped updates of a run, in the order of its rows; ``past``: those before the step it goes on from."""

    def __init__(self, past: Iterable[Mapping[str, Any]] = ()) -> None:
        self.count = 0  # without those of a scale
        self.streak: list[Mapping[str, Any]] = []  # the latest ones, no good one between them
        for row in past:
            self._take(row)

    def add(self, rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
        """The rows of ``rows`` that were skipped, without those of a scale; up to the one with which ``most`` in a row
        are reached."""
        found = []
        for row in rows:
            if self._take(row):
                found.append(row)
            if len(self.streak) >= most:
                break
        return found

    def _take(self, row: Mapping[str, Any]) -> bool:
        bad = was_skipped(row) and not overflowed(row)
        if bad:
            self.count += 1
            self.streak.append(row)
        elif not was_skipped(row):
            self.streak = []
        return bad
