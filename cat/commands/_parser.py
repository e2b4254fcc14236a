"""The parser of the command line: mistakes are told in one line, with what helps."""

from __future__ import annotations

import argparse
import contextlib
import math
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse prints the usage before every mistake, which for some commands is a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def finite(text: str) -> float:
    """The type of an option that is a number: Python's ``float`` takes "nan" and "inf" too."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number; expected one such as 0.5")


def natural(text: str) -> int:
    """The type of an option that counts, and may be 0."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")


class Version(argparse.Action):
    """Imports the package only when it is asked for its version."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from cat import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()
