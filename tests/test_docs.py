"""What the documentation promises has a test, by the name it gives."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<situation>[^|]+) \| (?P<happens>[^|]+) \| (?P<tests>[^|]+) \|$")
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_row_of_robustness_names_a_test_that_exists() -> None:
    rows = [match for line in (ROOT / "docs" / "robustness.md").read_text().splitlines() if (match := ROW.match(line))]
    rows = [row for row in rows if row["situation"] not in ("situation", "---")]
    assert len(rows) > 50
    for row in rows:
        tests = TEST.findall(row["tests"])
        assert tests, f"no test: {row['situation']}"
        for file, name in tests:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file} has no {name}: {row['situation']}"
