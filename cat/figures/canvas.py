"""What every picture is drawn on and written with, and how it shows names.

Everything is drawn with matplotlib's Agg canvas, without a display, and written whole or not at all.
"""

from __future__ import annotations

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(EXTRA) from error
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, **options)


def save(drawing: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        drawing.savefig(temporary, dpi=150, metadata={"Software": SOFTWARE})
    return path


def is_figure(path: Path) -> bool:
    """Whether a PNG file was drawn here."""
    with open(path, "rb") as file:
        return SOFTWARE.encode() in file.read(1024)


def text_of(name: str) -> str:
    """A name of the user's as matplotlib can show it: without bytes that are no text, without mathematics between
    dollar signs, and in the legend too if it begins with an underscore."""
    text = name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legend_below(drawing: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        drawing.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9
        )
