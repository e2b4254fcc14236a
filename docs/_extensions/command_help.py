"""The directive ``{cat-audio} NAME``: what ``cat-audio NAME --help`` says, from the parser when pages are built."""

from __future__ import annotations

import argparse
import functools
import re
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from cat.commands import build_parser

WIDTH = 88  # columns that a page has room for


def help_of(name: str) -> tuple[str, str]:
    """(description; usage with arguments and options, epilog) of a sub-command."""
    commands = next(action for action in build_parser(name)._actions if isinstance(action, argparse._SubParsersAction))
    parser = commands.choices[name]
    parser.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, width=WIDTH)
    epilog, parser.description, parser.epilog = parser.epilog or "", None, None
    return parser.format_help(), epilog


class CommandHelp(Directive):
    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        options, epilog = help_of(self.arguments[0])
        return [_literal(options), *(_block(text) for text in re.split(r"\n\s*\n", epilog.strip("\n")) if text)]


def _block(text: str) -> nodes.Node:
    """Of an epilog: examples and columns as they stand, sentences as a paragraph."""
    if re.search(r"^  |\S {3,}\S", text, re.MULTILINE):
        return _literal(text)
    return nodes.paragraph("", " ".join(text.split()))


def _literal(text: str) -> nodes.Node:
    block = nodes.literal_block(text, text)
    block["language"] = "text"
    return block


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("cat-audio", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
