"""``cat-audio report``: runs side by side on one HTML page that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, tell
from cat.outputs import Output, claim
from cat.progress import say
from cat.report import is_report, write_report
from cat.report.page import SAMPLES

EXAMPLES = """\
examples:
  cat-audio report runs/tiny -o report.html                        one run
  cat-audio report runs/tiny runs/other -o report.html             runs side by side, and how their recipes differ

Curves, speed, warnings, configuration, what `cat-audio prepare` found in the data, and clips with their spectrogram,
masks and audio. A run that is still going on can be looked at too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="the directory of a run")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"clips of every run ({SAMPLES})")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is no report")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.samples < 0:
        raise ValueError(f"--samples is {args.samples}; expected 0 or more")
    claim([Output(args.output, is_report, "-o OTHER.html")], overwrite=args.overwrite)
    notes = write_report(args.runs, args.output, num_samples=args.samples)
    for note in notes:
        say(f"note: {note}")
    tell(args, {"written": args.output, "runs": args.runs, "notes": notes}, f"report: {args.output}")
    return 0
