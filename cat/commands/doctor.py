"""``cat-audio doctor``: say what this machine has and what can run on it."""

from __future__ import annotations

import argparse

from cat.doctor import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say which backend runs each operator here, and what is installed and what is not."


def run(args: argparse.Namespace) -> int:
    print(report())
    return 0
