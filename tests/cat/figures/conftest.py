"""What the tests of pictures share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def is_picture() -> Callable[[Path], bool]:
    """Whether a file is a PNG with something in it: many grey values, no leftovers beside it."""
    image = pytest.importorskip("PIL.Image")

    def look(path: Path, *, wider_than: int = 600) -> bool:
        with image.open(path) as picture:
            colours = picture.convert("L").getcolors(256) or []
            return picture.width > wider_than and len(colours) > 20 and not list(path.parent.glob("*.tmp*"))

    return look
