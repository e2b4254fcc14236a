"""What an experiment found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Verdict:
    """What an experiment found: a table, one sentence, and whether it is as it must be."""

    passed: bool
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def format(self) -> str:
        lines = [list(self.columns), *[list(row) for row in self.rows]]
        widths = [max(len(line[c]) for line in lines) for c in range(len(self.columns))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*text, *self.notes, f"{'PASS' if self.passed else 'FAIL'}: {self.text}"])

    def markdown(self) -> str:
        """The table, words to the left and numbers to the right, and the notes."""
        rule = ["---" if any(map(_is_word, cells)) else "---:" for cells in zip(*self.rows, strict=True)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([*lines, "", *(f"{note[:1].upper()}{note[1:]}." for note in self.notes), ""])


def _is_word(cell: str) -> bool:
    return cell[:1].isalpha() or cell[:1] == "{"
