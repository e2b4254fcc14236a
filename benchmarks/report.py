"""Write the tables of the result files into the documentation; nothing there is typed by hand.

    python -m benchmarks.report            # benchmarks/README.md and docs/*.md
    python -m benchmarks.report --check    # exit code 1 where a table is out of date, nothing written
    python -m benchmarks.report --plots results.json    # instead: draw the plots of one result file beside it
    python -m benchmarks.report --figure docs/figures/speed.png    # instead: the front page's figure

A document asks for a table with a pair of markers, what stands between them is replaced:

    <!-- benchmark:begin step -->
    <!-- benchmark:end -->

Names: headline (also where there is no name), stem, step, parts, starts, entries, loader, stem-sweep, kernels, fbank,
features, operators, inference, finetune, checkpoints, scaling, multiply-adds. Of every machine the newest file in
benchmarks/results that has rows for it gives one table. "record NAME" is what `cat-audio experiment` found and kept in
docs/evidence/records/NAME.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, load, write_atomic
from benchmarks.tables import TABLES, Table, machine_name, origin
from cat.experiments.paper import judged
from cat.experiments.records import read_record
from cat.provenance import ROOT

MARKED = re.compile(r"(<!-- benchmark:begin ?(?P<name>[\w -]*) -->\n).*?(<!-- benchmark:end -->)", re.DOTALL)
RECORDS = ROOT / "docs" / "evidence" / "records"


def newest(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files: GPUs first, machine by machine, of each the newest first."""
    found = sorted((load(path) for path in directory.glob("*.json")), key=lambda data: data["date"], reverse=True)
    return sorted(found, key=lambda data: (data["machine"]["gpu"] is None, machine_name(data)))


def section(name: str, results: list[dict[str, Any]]) -> str:
    """The tables of one name, a machine after the other; of each the newest file that has rows for it."""
    if name.startswith("record "):
        return recorded(RECORDS / name.removeprefix("record "))
    if name not in TABLES:
        raise ValueError(f"<!-- benchmark:begin {name} -->: unknown table; expected one of {', '.join(TABLES)}")
    parts: dict[str, str] = {}
    for data in results:
        table = TABLES[name](data)
        if table.rows and machine_name(data) not in parts:
            parts[machine_name(data)] = f"{table.markdown()}\n\n{origin(data)}.{remark(table)}\n"
        if name == "multiply-adds" and parts:
            break  # the same on every machine
    return "\n".join(parts.values())


def recorded(folder: Path) -> str:
    """The table of an experiment's record, and where it comes from."""
    record = read_record(folder)
    return f"{judged(record).markdown()}\n{origin(record['made'])}.\n"


def remark(table: Table) -> str:
    """On a machine shared with others a rate can be exceeded."""
    shares = [float(cell.removesuffix(" %")) for row in table.rows for cell in row if cell.endswith(" %")]
    slower = " A share above 100 %: the machine was slower in the moment when its rate was measured."
    return slower if max(shares, default=0) > 100 else ""


def filled(text: str, results: list[dict[str, Any]]) -> str:
    """A document with its tables made anew."""
    return MARKED.sub(lambda found: found[1] + section(found["name"] or "headline", results) + found[3], text)


def write_between(document: Path, marker: str, content: str) -> None:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->``; ValueError without them."""
    text = document.read_text()
    marked = re.compile(rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"{document} has no <!-- {marker}:begin --> and <!-- {marker}:end -->")
    write_atomic(document, marked.sub(lambda found: found[1] + content + found[2], text))


def documents() -> list[Path]:
    found = [ROOT / "benchmarks" / "README.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [path for path in found if path.exists() and MARKED.search(path.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is out of date")
    parser.add_argument("--plots", type=Path, metavar="FILE", help="instead: the plots of a result file, beside it")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="instead: the headline of all result files, drawn")
    options = parser.parse_args()
    if options.figure:
        from benchmarks.plots import plot_headline

        plot_headline(newest(), options.figure)
        return 0
    if options.plots:
        from benchmarks.plots import plot

        for path in plot(load(options.plots), options.plots.parent):
            print(path)
        return 0
    results, stale = newest(), []
    for path in documents():
        text = path.read_text()
        made = filled(text, results)
        if made != text:
            stale.append(path)
            if not options.check:
                write_atomic(path, made)
    done = "out of date, run python -m benchmarks.report" if options.check else "written"
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {done}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
