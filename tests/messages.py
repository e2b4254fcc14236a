"""What the two packages can say: their exceptions' messages and all their strings, read in the source."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cat", "cat_kernels")
VALUE = "…"  # stands where a message has a value
BUILTIN = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}


@dataclass(frozen=True)
class Message:
    """One place that makes an exception. `text`: what it says, with `VALUE` for what is known only then."""

    place: str
    error: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.error}: {self.text}"


@cache
def trees() -> dict[str, ast.Module]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@cache
def own_errors() -> dict[str, str]:
    """{exception class that a package defines: its first base}, of whatever it inherits by however many steps."""
    bases = {
        node.name: [_name(base) for base in node.bases]
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found: dict[str, str] = {}
    while more := {
        name: named[0]
        for name, named in bases.items()
        if name not in found and any(base in BUILTIN or base in found for base in named)
    }:
        found |= more
    return found


@cache
def messages() -> tuple[Message, ...]:
    """Of every exception that is made, whether raised at once or given back by a helper. One that only passes another's
    words on is left out."""
    made = (message for file, tree in trees().items() for message in _made_in(file, tree))
    return tuple(message for message in made if re.search("[a-z]{2}", message.text))


def _made_in(file: str, scope: ast.Module | ast.FunctionDef, known: dict[str, str] | None = None) -> Iterator[Message]:
    """In a module or a function. `known`: the names around it that stand for a text."""
    inside = list(_own(scope))
    known = {**(known or {}), **_named(inside)}
    for node in inside:
        if isinstance(node, ast.FunctionDef):
            yield from _made_in(file, node, known)
        elif isinstance(node, ast.Call):
            name = _name(node.func)
            if name in BUILTIN or name in own_errors() or ast.unparse(node.func) == "parser.error":
                text = " ".join(_text(argument, known) for argument in node.args)
                yield Message(f"{file}:{node.lineno}", name if name != "error" else "SystemExit", text)


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """What is in a scope, but not what is in its functions."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from _own(node)


def _named(nodes: list[ast.AST]) -> dict[str, str]:
    """{name: the first text that it is given}"""
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, _text(node.value, {}))
    return {name: text for name, text in found.items() if text != VALUE}


@cache
def strings() -> tuple[str, ...]:
    """Every string of the packages that is no docstring, with `VALUE` for what a format puts in."""
    found = []
    for tree in trees().values():
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            _text(node, {})
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in docs
        ]
    return tuple(text for text in found if text.strip(f"{VALUE} "))


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants) if isinstance(node.value, ast.Name) else VALUE
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name):
        return constants.get(node.id, VALUE)
    return VALUE


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def matches(family: str, text: str) -> bool:
    """Whether the words of `family`, such as ``…: no such file``, are in `text`, in this order."""
    place = 0
    for words in _words(family):
        place = text.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True


@cache
def _words(family: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in family.split(VALUE) if part.strip())
