"""What a study found, as a folder to keep: ``record.json`` (all scores of all runs, and where they were made),
``recipe.yaml`` and ``log.jsonl`` (the losses of every run, thinned). And whether a new one agrees.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat.config import write_yaml
from cat.experiments.readings import SHOWN, by_chance, ends, percent
from cat.experiments.verdict import Verdict
from cat.files import replacing, write_json
from cat.outputs import Output, claim, json_of
from cat.training.recipe import PretrainConfig
from cat.training.records import read_rows

RECORD, RECIPE, LOG = "record.json", "recipe.yaml", "log.jsonl"
FORMAT = 1
LOGGED = 100  # rows of each run


def claim_record(folder: Path, name: str, *, overwrite: bool = False) -> None:
    """Whether a record of this experiment may be written there. Raises OutputError."""

    def own(path: Path) -> bool:
        return json_of(folder / RECORD, format=int, experiment=str)["experiment"] == name

    claim([Output(folder / file, own, "another --record") for file in (RECORD, RECIPE, LOG)], overwrite=overwrite)


def write_record(folder: Path, record: Mapping[str, Any], recipe: PretrainConfig, runs: Path) -> None:
    """`runs`: where the study's run directories are."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(recipe, folder / RECIPE)
    with replacing(folder / LOG) as temporary:
        temporary.write_text("".join(_log(record, runs)), encoding="utf-8")
    write_json(folder / RECORD, {"format": FORMAT, **record})


def read_record(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a folder that holds none."""
    path = folder / RECORD
    try:
        record = json_of(path, format=int, experiment=str, arms=dict, tasks=dict)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no record of an experiment ({error}); expected what --record wrote") from None
    if record["format"] != FORMAT:
        raise ValueError(f"{path} is a record of format {record['format']}, this version reads {FORMAT}")
    return record


def _log(record: Mapping[str, Any], runs: Path) -> Iterator[str]:
    for arm, found in record["arms"].items():
        for run in found["runs"]:
            rows = read_rows(runs / run["directory"] / "metrics.jsonl", "train")
            for row in rows[:: max(1, len(rows) // LOGGED)]:
                kept = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items() if k != "kind"}
                yield json.dumps({"arm": arm, "seed": run["seed"], **kept}) + "\n"


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Line:
    """One score of one arm, in a record and anew. ``allowed``: what chance allows for the difference of their means."""

    arm: str
    task: str
    probe: str
    recorded: Sequence[float]
    new: Sequence[float]
    allowed: float

    @property
    def agrees(self) -> bool:
        return abs(statistics.mean(self.recorded) - statistics.mean(self.new)) <= self.allowed


def compare(recorded: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    """Whether the means of what both have differ by no more than chance allows (`readings.by_chance`).

    Raises ValueError for records that have nothing in common.
    """
    if recorded["experiment"] != new["experiment"]:
        raise ValueError(f"the record is of {recorded['experiment']!r}, this is {new['experiment']!r}")
    lines = list(_lines(recorded, new))
    if not lines:
        raise ValueError(
            f"nothing to compare: the record has arms {list(recorded['arms'])} on tasks {list(recorded['tasks'])}, "
            f"this has {list(new['arms'])} on {list(new['tasks'])}"
        )
    off = [line for line in lines if not line.agrees]
    rows = [
        [
            x.arm,
            x.task,
            x.probe,
            percent(x.recorded),
            percent(x.new),
            f"{100 * x.allowed:.1f}",
            "" if x.agrees else "differs",
        ]
        for x in lines
    ]
    text = f"{len(lines) - len(off)} of {len(lines)} scores agree with the record"
    if off:
        text += "; off: " + ", ".join(f"{x.arm} on {x.task} ({x.probe})" for x in off)
    notes = [f"recorded: {recorded['made']['date'][:10]}, commit {recorded['made']['commit']}"]
    # One in twenty lies outside by chance.
    expected = max(1, round(len(lines) / 20))
    return Verdict(len(off) <= expected, text, ("", "task", "probe", "recorded", "now", "allowed", ""), rows, notes)


def _lines(recorded: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Line]:
    for arm in recorded["arms"]:
        for task in recorded["tasks"]:
            if arm not in new["arms"] or task not in new["tasks"]:
                continue
            for probe in SHOWN:
                a, b = ends(recorded, arm, task, probe), ends(new, arm, task, probe)
                yield Line(arm, task, probe, a, b, max(by_chance(record, task, a, b) for record in (recorded, new)))
