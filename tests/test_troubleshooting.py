"""docs/troubleshooting.md has every kind of error message there is, and none that is gone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tests.messages import BUILTIN, ROOT, VALUE, Message, matches, messages, own_errors, strings

PAGE = "docs/troubleshooting.md"
# Exceptions that nobody outside sees: who catches them.
INSIDE = {
    "AssertionError": "says that a test's specification, or we, made a mistake",
    "ChildProcessError": "cat.data.workers raises WorkerDied in its place",
    "DamagedBlock": "a note; the block is made again",
    "DamagedEntry": "a note; the features are computed again",
    "Unsaid": "another process says why",
    "UnknownIdentity": "embeddings of such an encoder are not kept",
    "_CutOff": "tried again, then a RemoteError",
    "_DoesNotFit": "a ValueError of cat.encoders.pretrained, with its words",
    "_Fault": "a ManifestError, with its words",
    "_InWorkerError": "the worker's own error is raised in its place",
    "_NothingError": "the file is left out",
}


@dataclass(frozen=True)
class Section:
    title: str
    errors: frozenset[str]  # that it is about
    families: tuple[str, ...]


def sections() -> list[Section]:
    parts = re.split(r"^## ", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [Section(part.partition("\n")[0], frozenset(_raised(part)), tuple(_families(part))) for part in parts]


def _raised(part: str) -> list[str]:
    sentences = re.findall(r"^Raised as [^.]*\.", part, re.MULTILINE)
    return re.findall(r"`(\w+)`", " ".join(sentences))


def _families(part: str) -> list[str]:
    cells = re.findall(r"^\| (`.*?`) \| (?!-)", part, re.MULTILINE)
    return [span for cell in cells for span in _spans(cell)]


def _spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def places_for(message: Message, among: list[Section]) -> list[str]:
    return [
        family
        for section in among
        if message.error in section.errors
        for family in section.families
        if matches(family, message.text)
    ]


@pytest.fixture(scope="module")
def page() -> list[Section]:
    return sections()


def test_every_message_has_its_place(page: list[Section]) -> None:
    lost = [m for m in messages() if m.error not in INSIDE and not places_for(m, page)]
    assert lost == [], "no row of docs/troubleshooting.md, under a heading with this exception, has the words of\n" + (
        "\n".join(map(str, lost))
    )


def test_every_row_is_of_a_message_that_exists(page: list[Section]) -> None:
    everything = strings()
    gone = [(s.title, f) for s in page for f in s.families if not any(matches(f, text) for text in everything)]
    assert gone == [], "no string of cat or cat_kernels has these words any more"


def test_every_exception_is_named_or_stays_inside(page: list[Section]) -> None:
    named = frozenset().union(*(section.errors for section in page))
    assert named <= {*own_errors(), *BUILTIN}
    assert {m.error for m in messages()} - named - {*INSIDE} == set()
    assert set(INSIDE) <= {*own_errors(), *BUILTIN}
    assert {name for name in own_errors() if not name.startswith("_")} - named - {*INSIDE} == set()


def test_these_tests_can_fail(page: list[Section]) -> None:
    assert len(messages()) > 600
    assert len(page) > 8
    assert matches("…: no such file; give …", "…: no such file; give a folder")
    assert not matches("a … b", "b a")
    new = Message("cat/new.py:1", "ManifestError", f"{VALUE}: the moon is in the wrong quarter")
    assert places_for(new, page) == []
    known = Message("cat/new.py:1", "ManifestError", f"{VALUE}: no such file or folder; give another")
    assert places_for(known, page)
    assert places_for(Message("cat/new.py:1", "ArchiveError", known.text), page) == []
