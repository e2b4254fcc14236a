"""``cat-audio doctor``: say what this machine has and what can run on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, tell
from cat.doctor import report, report_json

EPILOG = """\
examples:
  cat-audio doctor                            what runs here, what is installed and what is not
  cat-audio doctor --report runs/tiny         all that a report of a fault needs, as Markdown to paste

--report has versions, GPU, build and settings of the environment, and of RUN its configuration, the last records,
warnings, and why clips could not be read. Names, paths and texts of yours are replaced: PATH1 is the same path
everywhere. Nothing is sent.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "Say which backend runs each operator here, and what is installed and what is not."
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--report", nargs="?", const="", metavar="RUN", help="what a report of a fault needs, of a run too; Markdown"
    )
    add_json(form)


def run(args: argparse.Namespace) -> int:
    if args.report is None:
        tell(args, report_json() if args.json else None, "" if args.json else report())
    else:
        from cat.bugreport import bug_report  # needs what training needs; without --report nothing must be needed

        print(bug_report(Path(args.report) if args.report else None))
    return 0
