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
