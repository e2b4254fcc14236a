"""Every link of the documentation leads somewhere: to a file, to a heading in it, or to an address that could be one.

`make linkcheck` asks the addresses themselves, where there is a network.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.documented import ROOT

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target><[^>]*>|[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")
ADDRESS = re.compile(r"\bhttps?://[^\s<>\"'`)\]|]+")
NAMED = re.compile(r"\b(?:docs|recipes|benchmarks|cat_kernels/\w+)/[\w/.-]+\.(?:md|yaml)\b")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)


@cache
def files() -> tuple[str, ...]:
    """That git knows, and those that are new; of an unpacked archive all."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


PAGES = [name for name in files() if name.endswith(".md")]


def without_code(text: str) -> str:
    """Blocks and spans of code hold no links; lines keep their numbers."""
    text = re.sub(r"^(\s*)(```+|~~~+).*?^\s*\2\s*$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    found: Counter[str] = Counter()
    anchors: set[str] = set()
    for heading in HEADING.findall(re.sub(r"^\s*(```+).*?^\s*\1\s*$", "", text, flags=re.M | re.S)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return anchors


def faults(page: str, text: str, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the links in a page."""
    bare = without_code(text)
    for match in LINK.finditer(bare):
        target = match["target"].strip("<>")
        where = f"{page}:{bare.count(chr(10), 0, match.start()) + 1}: {target}"
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue  # an address, looked at below
        path, _, anchor = target.partition("#")
        file = (root / page).parent / unquote(path) if path else root / page
        if not target or path.startswith("/"):
            yield f"{where}: not relative to the page"
        elif not file.exists():
            yield f"{where}: there is no such file"
        elif not file.resolve().is_relative_to(root.resolve()):
            yield f"{where}: outside of the repository"
        elif anchor and anchor not in slugs(file.read_text(encoding="utf-8")):
            yield f"{where}: no such heading"
    yield from (f"{page}: {fault}" for address in ADDRESS.findall(bare) if (fault := fault_of(address)))


def fault_of(address: str) -> str | None:
    parts = urlsplit(address)
    if parts.scheme != "https":
        return f"{address}: not https"
    if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.hostname or ""):
        return f"{address}: {parts.hostname!r} is not the name of a server"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert list(faults(page, (ROOT / page).read_text(encoding="utf-8"))) == []


def test_pages_named_in_code_exist() -> None:
    """In messages, comments, help texts and recipes: ``docs/install.md`` must not be gone."""
    ends = (".py", ".yaml", ".yml", ".toml", ".cmake", "Makefile", ".sh", ".txt")
    sources = [name for name in files() if name.endswith(ends)]
    gone = [
        (name, named)
        for name in sources
        if not name.startswith("tests/")
        for named in NAMED.findall((ROOT / name).read_text(encoding="utf-8"))
        if not (ROOT / named).exists()
    ]
    assert gone == []


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    for folder in ("docs", "docs/evidence"):
        index = (ROOT / folder / "index.md").read_text(encoding="utf-8")
        for page in sorted((ROOT / folder).glob("*.md")):
            named = re.search(rf"^{page.stem}$", index, re.MULTILINE)
            assert named or page.name == "index.md", f"{page} is in no toctree"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](gone.md)", "no such file"),
        ("[a](there.md#two-words)", None),
        ("[a](there.md#three-words)", "no such heading"),
        ("[a](#here)", None),
        ("[a](#gone)", "no such heading"),
        ("[a](/there.md)", "not relative"),
        ("[a](../../../etc/hostname)", "no such file|outside"),
        ("[a](http://example.org/x)", "not https"),
        ("<https://localhost/x>", "not the name of a server"),
        ("[a](https://example.org/x_(y)) `[b](gone.md)`", None),
        ("```\n[a](gone.md)\n```", None),
    ],
)
def test_these_tests_can_fail(text: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# There\n\n## Two `words`?\n")
    (tmp_path / "page.md").write_text(f"# Here\n{text}\n")
    found = list(faults("page.md", (tmp_path / "page.md").read_text(), tmp_path))
    assert len(found) == (said is not None), found
    assert said is None or re.search(said, found[0])
