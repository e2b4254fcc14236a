"""The gallery's pictures: drawn by the commands beside them, all of which `make gallery` runs."""

from __future__ import annotations

import re

import pytest

from cat.figures import is_figure
from tests.documented import ROOT, made_by, steps_of

PICTURE = re.compile(r"!\[[^\]]+\]\((figures/[^)]+)\)")
PAGES = ("docs/gallery.md", "docs/visible-only.md")


def arguments(step):
    """A command without its order, and without what differs between a page and the Makefile: where visible goes."""
    return sorted(word for word in step.words if word not in ("--overwrite",))


def test_make_gallery_runs_the_commands_of_the_page():
    made = [arguments(step) for target in ("quickstart", "gallery") for step in made_by(target)]
    for step in steps_of("docs/gallery.md"):
        assert arguments(step) in made, f"{step}: neither make quickstart nor make gallery runs it"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_those_that_make_gallery_copies(page):
    pictures = PICTURE.findall((ROOT / page).read_text(encoding="utf-8"))
    copied = {
        f"{step.words[-1]}/{word.rpartition('/')[2]}"
        for step in made_by("gallery")
        if step.words[0] == "cp"
        for word in step.words[1:-1]
    }
    assert len(pictures) > 1
    for picture in pictures:
        path = ROOT / "docs" / picture
        assert is_figure(path), f"{path} was not drawn by us"
        assert path.stat().st_size < 250_000, f"{path}: the repository is no place for large pictures"
        assert f"docs/{picture}" in copied, f"{path}: make gallery does not copy it"
