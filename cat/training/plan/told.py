"""A plan as it is told: lines, each with its arithmetic, in sections; as text and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """A number and where it comes from. ``unit`` "B" are bytes, told in GiB; "" a count or a word."""

    name: str
    value: float | int | str
    unit: str
    how: str
    guess: bool = False

    @property
    def shown(self) -> str:
        if isinstance(self.value, str):
            return self.value
        if self.unit == "B":
            return gib(self.value)
        unit = f" {self.unit}" if self.unit else ""
        return f"{number(self.value)}{unit}"


@dataclass(frozen=True)
class Section:
    title: str
    lines: Sequence[Line]

    def __getitem__(self, name: str) -> Any:
        """A line's value."""
        return next(line.value for line in self.lines if line.name == name)


@dataclass(frozen=True)
class Plan:
    """``problems`` keep the run from starting or from coming to its end; ``notes`` are worth a look."""

    title: str
    sections: Sequence[Section]
    problems: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)

    def __getitem__(self, title: str) -> Section:
        return next(section for section in self.sections if section.title == title)

    def text(self) -> str:
        lines = [line for section in self.sections for line in section.lines]
        names, values = (max(len(words) for words in column) for column in zip(*map(_words, lines), strict=True))
        told = [self.title]
        for section in self.sections:
            told += ["", section.title]
            for line in section.lines:
                how = f"guess: {line.how}" if line.guess else line.how
                told.append(f"  {line.name:<{names}}  {line.shown:>{values}}  {how}".rstrip())
        for heading, sentences in (("worth a look", self.notes), ("what would stop it", self.problems)):
            if sentences:
                told += ["", heading, *(f"  - {sentence}" for sentence in sentences)]
        return "\n".join(told)

    def as_dict(self) -> dict[str, Any]:
        sections = {
            section.title: {
                line.name: {"value": line.value, "unit": line.unit, "how": line.how, "guess": line.guess}
                for line in section.lines
            }
            for section in self.sections
        }
        return {"title": self.title, **sections, "notes": list(self.notes), "problems": list(self.problems)}


def _words(line: Line) -> tuple[str, str]:
    return line.name, line.shown


def number(value: float) -> str:
    """Three digits where it has a fraction, all of a whole one."""
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
