"""The page: one file, opened from a disk or a mail, on wide and narrow, light and dark screens."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cat.files import replacing
from cat.report.curves import charts
from cat.report.runs import Run, data_report, read_runs
from cat.report.samples import samples

HERE = Path(__file__).parent
GENERATOR = '<meta name="generator" content="cat-audio report">'  # in every page, to know it by
SAMPLES = 4
_MOST_WARNINGS = 100
# What differs from run to run anyway, or says where and not what.
_UNTOLD = {"run.name", "run.dir"}


def write_report(paths: Sequence[Path], output: Path, *, num_samples: int = SAMPLES) -> list[str]:
    """Write the page of these runs. Returns notes: what could not be shown, and why.

    Raises: `cat.config.ConfigError` for a directory that is no run's.
    """
    runs, notes = read_runs(paths), []
    shown: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        try:
            for sample in samples(run, num_samples) if num_samples else ():
                shown.append({"run": number, **sample})
        except Exception as error:  # moved or damaged data, or a recipe of another version: the curves are there
            notes.append(f"{run.name}: no samples are shown: {error}")
    page = _page(runs, shown, notes)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return notes


def is_report(path: Path) -> bool:
    """Whether a file was written here."""
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(1000)


def _page(runs: Sequence[Run], shown: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    data = {"runs": [run.name for run in runs], "charts": charts(runs), "samples": list(shown)}
    title = ", ".join(run.name for run in runs)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        _section("Runs", _overview(runs)),
        _section("Curves", '<div id="controls"></div><div id="charts"></div>'),
        _section("Warnings", _warnings(runs, notes)),
        _section("Configuration", _configuration(runs)),
        *(_section(f"Data of {run.name}", f"<pre>{escape(text)}</pre>") for run in runs if (text := data_report(run))),
    ]
    if shown:
        sections.append(_section("Samples", '<div id="samples"></div>'))
    # Nothing in a page may load anything; "<" in data would end a script.
    payload = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_file("page.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="quiet">{now}</p></header>
<noscript><p class="warning">The curves and samples are drawn by JavaScript, which is off here.</p></noscript>
<main>
{"".join(sections)}</main>
<script type="application/json" id="data">{payload}</script>
<script>
{_file("page.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>\n"


# ---------------------------------------------------------------- tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{names}</tr></thead>\n<tbody>{lines}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _overview(runs: Sequence[Run]) -> str:
    rows = [[_named(number, run), *(escape(text) for text in _facts(run))] for number, run in enumerate(runs)]
    head = ("run", "steps", "loss", "validation loss", "rate", "waits for data", "left", "skipped", "unreadable clips")
    return _table(head, rows, "facts")


def _named(number: int, run: Run) -> str:
    return f'<span class="chip c{number % 8}"></span>{escape(run.name)}'


def _facts(run: Run) -> list[str]:
    train, valid, speed = (run.columns[kind] for kind in ("train", "valid", "speed"))
    steps = run.config.get("optim", {}).get("steps", "?")
    tail = max(1, len(train.get("loss", ())) // 50)
    rate, wait, left = (_last(speed.get(key)) for key in ("clips_per_s", "data_wait", "left_s"))
    return [
        f"{run.last_step:,} of {steps:,}" if isinstance(steps, int) else f"{run.last_step:,}",
        _number(_mean(train.get("loss"), tail)),
        _number(_last(valid.get("loss"))),
        "–" if rate is None else f"{rate:.4g} clips/s",
        "–" if wait is None else f"{100 * wait:.0f} %",
        "–" if left is None else _duration(left),
        str(len(run.skipped)),
        str(run.unreadable),
    ]


def _last(column: np.ndarray | None) -> float | None:
    known = [] if column is None else column[np.isfinite(column)]
    return float(known[-1]) if len(known) else None


def _mean(column: np.ndarray | None, count: int) -> float | None:
    known = [] if column is None else column[-count:][np.isfinite(column[-count:])]
    return float(np.mean(known)) if len(known) else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _warnings(runs: Sequence[Run], notes: Sequence[str]) -> str:
    rows = []
    for number, run in enumerate(runs):
        told = run.warnings[:_MOST_WARNINGS]
        rows += [[_named(number, run), f"{step:,}", escape(text)] for step, text in told]
        if more := len(run.warnings) - len(told):
            rows.append([_named(number, run), "", f"and {more} more, in metrics.jsonl"])
    rows += [["this page", "", escape(note)] for note in notes]
    return _table(("run", "step", "warning"), rows) if rows else "<p>None.</p>"


def _configuration(runs: Sequence[Run]) -> str:
    settings = [run.settings for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    head = ("setting", *(run.name for run in runs))
    everything = _table(head, [[escape(key), *(_value(each.get(key)) for each in settings)] for key in keys])
    whole = f"<details><summary>all {len(keys)} settings</summary>{everything}</details>"
    if len(runs) == 1:
        return whole
    differ = [
        [escape(key), *(_value(each.get(key)) for each in settings)]
        for key in keys
        if key not in _UNTOLD and any(each.get(key) != settings[0].get(key) for each in settings)
    ]
    return (_table(head, differ) if differ else "<p>The same in all runs.</p>") + whole


def _value(value: Any) -> str:
    return escape("null" if value is None else str(value))
