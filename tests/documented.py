"""What the documentation tells its readers to type: found in pages, recipes, the commands' help and the Makefile."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cat.commands import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
SHELL = ("sh", "bash", "shell")
PROGRAMS = (
    "cat-audio",
    "python",
    "make",
    "pip",
    "cmake",
    "git",
)  # a block without a language is shell if one begins it
_FENCE = re.compile(r"^\s*(?P<fence>```+|~~~+)(?P<language>[^\n`]*)$")
_SETTING = re.compile(r"[A-Z][A-Z0-9_]*=\S*")
_VARIABLE = r"\$\((\w+)\)/?"  # of make
_INLINE = re.compile(r"(?<!`)`(?P<code>[^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Step:
    """One shell command, or one block of Python, of a page."""

    page: str
    line: int
    language: str  # "sh" or "python"
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text.strip()}"

    @property
    def words(self) -> list[str]:
        """The command's words without settings of the environment before it and without its comment; operators of the
        shell (``|``, ``&&``, ``>``) are words of their own."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        return words[len(self._settings(words)) :]

    @property
    def settings(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self._settings(shlex.split(self.text, comments=True)))

    @staticmethod
    def _settings(words: list[str]) -> list[str]:
        count = next((i for i, word in enumerate(words) if not _SETTING.fullmatch(word)), len(words))
        return words[:count]

    @property
    def is_simple(self) -> bool:
        """Whether it is one program with its arguments: no pipe, no redirection, no list."""
        return not any(set(word) <= set("();<>|&") for word in self.words)


# ---------------------------------------------------------------- finding them


def pages() -> list[str]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    files += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "evidence").glob("*.md"))
    files += sorted((ROOT / "cat_kernels").glob("*/README.md"))
    return [str(path.relative_to(ROOT)) for path in files]


def steps_of(page: str) -> list[Step]:
    """The commands and Python blocks of a page, in its order. ValueError for a command that nobody would find."""
    if page.startswith("help of "):
        return list(_indented(page, _help(page.removeprefix("help of ")), "  "))
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "Makefile":
        return list(made_by("quickstart"))
    if page.endswith(".yaml"):
        return list(_indented(page, text, "#   "))
    return list(_fenced(page, text))


def blocks_of(page: str) -> list[tuple[int, str, str]]:
    """(line, language, text) of every fenced block of a page."""
    return list(_blocks((ROOT / page).read_text(encoding="utf-8")))


def _fenced(page: str, text: str) -> Iterator[Step]:
    for line, language, body in _blocks(text):
        first = next((word for word in body.split() if not _SETTING.fullmatch(word)), "")
        if language == "python":
            yield Step(page, line, "python", body)
        elif language in SHELL or (not language and first in PROGRAMS):
            for number, command in _joined(body):
                yield Step(page, line + number, "sh", command)
        elif re.search(r"^(\$ )?(cat-audio|python -)", body, re.MULTILINE):
            raise ValueError(f"{page}:{line}: a command in a block that does not begin with one; call the block ```sh")


def _blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line of its first line, language, text) of every fenced block."""
    fence, start, language, body = "", 0, "", []
    for number, line in enumerate(text.splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, start, language, body = match["fence"], number + 1, match["language"].strip(), []
        elif fence and line.strip() == fence:
            yield start, language, textwrap.dedent("\n".join(body)) + "\n"
            fence = ""
        elif fence:
            body.append(line)
        elif re.match(r"\s+(\$ )?cat-audio ", line):
            raise ValueError(f"line {number}: a command that is only indented; put it between ```sh and ```")


def _joined(body: str) -> Iterator[tuple[int, str]]:
    """(line, command) of a shell block: a line that ends in a backslash, or within quotes, is one with the next."""
    command, start = "", 0
    for number, line in enumerate(body.splitlines()):
        command, start = (command + line.lstrip(), start) if command else (line, number)
        if command.endswith("\\"):
            command = command[:-1].rstrip() + " "
        elif not _is_closed(command):
            command += "\n"
        else:
            if command.strip() and not command.lstrip().startswith("#"):
                yield start, command
            command = ""
    if command:
        raise ValueError(f"a command does not end: {command!r}")


def _is_closed(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def _indented(page: str, text: str, indent: str) -> Iterator[Step]:
    """Examples in a comment or in a help text, each with a description behind three blanks."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(f"{indent}cat-audio "):
            yield Step(page, number, "sh", re.split(r"\s{3,}", line.removeprefix(indent))[0])


def _help(command: str) -> str:
    parser = parser_of(command)
    return f"{parser.description or ''}\n{parser.epilog or ''}"


def made_by(target: str) -> Iterator[Step]:
    """The commands of a target of the Makefile, as a user would type them."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = dict(re.findall(r"^(\w+) :?= (.*)$", text, re.MULTILINE)) | {"BIN": ""}
    before, _, rest = text.partition(f"\n{target}:")
    recipe = re.split(r"\n(?!\t)", rest.partition("\n")[2])[0]
    for number, command in _joined(recipe):
        while re.search(_VARIABLE, command):
            command = re.sub(_VARIABLE, lambda match: names[match[1]] + ("/" if _is_folder(match) else ""), command)
        yield Step("Makefile", before.count("\n") + 3 + number, "sh", command.strip())


def _is_folder(match: re.Match[str]) -> bool:
    return match[1] != "BIN" and match[0].endswith("/")


def inline_commands(page: str) -> list[Step]:
    """``cat-audio ...`` in running text, often with placeholders."""
    return [step for step in _inline(page) if step.text.startswith("cat-audio ")]


def make_targets(page: str) -> list[Step]:
    """Every ``make TARGET`` of a page, in a block or in running text."""
    steps = [step for step in [*steps_of(page), *_inline(page)] if step.language == "sh"]
    return [step for step in steps if re.match(r"make [a-z-]+", step.text)]


def _inline(page: str) -> Iterator[Step]:
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        for match in _INLINE.finditer(line):
            yield Step(page, number, "sh", match["code"])


# ---------------------------------------------------------------- the commands' own words


def parser_of(command: str) -> argparse.ArgumentParser:
    """With all of the command's arguments. Its choices are a mapping from names to parsers."""
    parser = build_parser(command)
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command]


def check_names(step: Step) -> None:
    """That the command exists, and all options of it that the step names; placeholders may stand for the rest."""
    text = re.split(r"cat-audio |-m cat ", step.text, maxsplit=1)[1]  # what follows torchrun's own options
    name = text.split()[0]
    assert name in COMMANDS or name.startswith("-"), f"{step}: there is no command {name}"
    if name in COMMANDS:
        options = parser_of(name)._option_string_actions
        named = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        assert set(named) <= {*options, "--debug", "--version"}, f"{step}: unknown options"


# ---------------------------------------------------------------- running them


def run_in_shell(step: Step, folder: Path, programs: Mapping[str, str]) -> None:
    """By bash, in `folder`: ``cat-audio`` and ``python`` are this checkout's, `programs` {name: script} stand in for
    those that the machine need not have."""
    bin_folder = folder / ".bin"
    bin_folder.mkdir(exist_ok=True)
    own = {
        "cat-audio": f'exec {shlex.quote(sys.executable)} -m cat "$@"',
        "python": f'exec {shlex.quote(sys.executable)} "$@"',
    }
    for name, script in {**own, **programs}.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    # 141: `head` had enough before the other side had written all.
    expected = {0, 141} if "| head" in step.text else {0}
    said = done.stdout[-1000:] + done.stderr[-3000:]
    assert done.returncode in expected, f"{step}\nexit code {done.returncode}\n{said}"
