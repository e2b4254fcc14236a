"""What every picture is drawn on and written with, and how it shows names.

Everything is drawn with matplotlib's Agg canvas, without a display, and written whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

from cat.files import replacing

SOFTWARE = "cat-audio (matplotlib)"  # in every picture, to know it by
EXTRA = "figures need matplotlib and scikit-learn: pip install 'cat-kernels[train]'"
# The colours of Okabe and Ito, which colour-blind readers can tell apart, and four more for larger label sets.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#444444", "#9467BD", "#7FBC41")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")


def figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure of that many inches with its axes, on the Agg canvas."""
    _import()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, **options)


def _import() -> None:
    """matplotlib cannot be imported where MPLBACKEND names what this Python does not have: a notebook's own backend, in
    a command that the notebook starts. Here no backend is used; what can be had stays set for others."""
    if "matplotlib" in sys.modules:
        return
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        if asked is not None:
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = asked
    except ImportError as error:
        raise ImportError(EXTRA) from error
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked


def save(drawing: Any, path: Path) -> Path:
    from matplotlib.text import Text

    for axis in drawing.axes:
        axis.get_xticklabels(), axis.get_yticklabels()  # makes those that are not there yet
    for text in drawing.findobj(Text):
        families = {font for character in text.get_text() if (font := _font_with(character)) is not None}
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *sorted(families)])
    with replacing(path) as temporary:
        drawing.savefig(temporary, dpi=150, metadata={"Software": SOFTWARE})
    return path


def is_figure(path: Path) -> bool:
    """Whether a PNG file was drawn here."""
    with open(path, "rb") as file:
        return SOFTWARE.encode() in file.read(1024)


def text_of(name: str, most: int = 1000) -> str:
    """A name of the user's as matplotlib can show it: without bytes that are no text, without mathematics between
    dollar signs, in the legend too if it begins with an underscore, with an escape for a character that no font here
    has, and without its end where it has more characters than ``most``."""
    text, room = "", most
    for character in name:
        drawn = character
        if _font_with(character) == "":
            drawn = character.encode("unicode_escape", "backslashreplace").decode()
        room -= len(drawn)
        if room < 0:
            text += "…"
            break
        text += drawn
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legend_below(drawing: Any, axis: Any, columns: int = 6) -> None:
    """The axis's labels, in as many of the columns as the figure is wide enough for."""
    handles, labels = axis.get_legend_handles_labels()
    style = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    for ncols in range(min(len(labels), columns), 0, -1):
        legend = drawing.legend(handles, labels, ncols=ncols, **style)
        if ncols == 1 or legend.get_window_extent(drawing.canvas.get_renderer()).width <= drawing.bbox.width:
            return
        legend.remove()


@functools.cache
def _font_with(character: str) -> str | None:
    """The family of an installed font that can draw it; None where the default font can, "" where none can."""
    _import()
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    if ord(character) in _characters(findfont(FontProperties())) or character == "\n":
        return None
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        if ord(character) in _characters(font.fname):
            return font.name
    return ""


@functools.cache
def _characters(font: str) -> frozenset[int]:
    """Those that a font has a picture of, if it can be drawn at any size."""
    from matplotlib.ft2font import FT2Font

    if "LastResort" in font:  # has a box for every character there is
        return frozenset()
    try:
        face = FT2Font(font)
        return frozenset(face.get_charmap()) if face.scalable else frozenset()
    except (OSError, RuntimeError):  # listed, and gone or broken
        return frozenset()
