"""``cat-audio --completion SHELL``: a script by which a shell completes commands, options and names of files.

It is written once, from all parsers, and asks nobody when a key is pressed: importing PyTorch then would take a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = ("DIR", "FOLDER")
_FILES = (
    "PATH",
    "RECIPE",
    "MANIFEST",
    "CHECKPOINT",
    "ENCODER",
    "RUN",
    "DATA",
    "SOURCE",
    "QUERY",
    "OUT",
    "FILE",
    "FILES",
)


class Completion(argparse.Action):
    """parser: makes the parser with the arguments of all commands."""

    def __init__(
        self, option_strings: list[str], dest: str, parser: Callable[[], argparse.ArgumentParser], help: str
    ) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, choices=SHELLS, metavar="|".join(SHELLS), help=help)
        self._parser = parser

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, shell: Any, *_: Any) -> NoReturn:
        print(script(self._parser(), shell))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    try:
        import shtab
    except ImportError:
        raise ImportError("shell completion needs shtab: pip install 'cat-kernels[train]'") from None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.help = "COMMAND"  # shtab leaves out what the overview does not list by itself
            for sub in action.choices.values():
                _name_files(sub, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _name_files(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Say which arguments are names of files or folders."""
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            action.choices = tuple(action.choices)  # shtab takes a mapping for sub-commands
        name = (action.metavar if isinstance(action.metavar, str) else "").partition(".")[0]
        if action.choices is None and (action.type is Path or name in (*_FILES, *_FOLDERS)):
            action.complete = folder if name in _FOLDERS else file  # type: ignore[attr-defined]
