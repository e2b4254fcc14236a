"""Plots of a result file, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import machine_name

# One colour a candidate, the same in every plot.
COLOURS = {
    "dense": "#9a9a9a",
    "dense compiled": "#5f5f5f",
    "visible": "#e8a33d",
    "visible compiled": "#c4541c",
    "reference": "#9a9a9a",
    "operator": "#c4541c",
    "torchaudio": "#5f5f5f",
    "torch": "#9a9a9a",
    "torch compiled": "#c9c9c9",
    "kaldi-native-fbank": "#7f9bb3",
    "librosa": "#a9b88a",
    "native": "#e8a33d",
    "native, CUDA graph": "#c4541c",
}


def plot(data: dict[str, Any], directory: Path) -> list[Path]:
    """Write stem.png, step.png, fbank.png and operators.png, of those that have rows.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for name, rows, panels in _figures(data):
        if rows:
            path = directory / f"{name}.png"
            _bars(rows, panels, f"{name}, {machine_name(data)}, {data['date'][:10]}", path)
            written.append(path)
    return written


def _figures(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]], list[tuple[str, str]]]]:
    time_and_memory = [("median_ms", "milliseconds"), ("peak_MiB", "peak MiB of a call")]
    of = {name: [r for r in data["rows"] if r["benchmark"] == name] for name in ("stem", "step", "fbank", "features")}
    operators = [r for r in data["rows"] if r["benchmark"] not in of]
    time_and_share = [("median_ms", "milliseconds"), ("share_of_floor", "share of the copy bandwidth")]
    return [
        ("stem", of["stem"], time_and_memory),
        ("step", of["step"], time_and_memory),
        ("fbank", of["fbank"], time_and_share),
        ("operators", operators, time_and_share),
    ]


def _bars(rows: list[dict[str, Any]], panels: list[tuple[str, str]], title: str, path: Path) -> None:
    """Horizontal bars, one group a case, one panel a quantity; whiskers from the 20th to the 80th percentile."""
    import matplotlib.pyplot as plt

    panels = [panel for panel in panels if any(r.get(panel[0]) is not None for r in rows)]
    groups = list(dict.fromkeys(_group(r) for r in rows))
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    height = 0.8 / len(providers)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.5 * len(panels), 1.2 + 0.24 * len(groups) * len(providers)),
        sharey=True,
        squeeze=False,
    )
    for axis, (quantity, label) in zip(axes[0], panels, strict=True):
        for i, provider in enumerate(providers):
            own = [r for r in rows if r["provider"] == provider and r.get(quantity) is not None]
            places = [groups.index(_group(r)) + (i - (len(providers) - 1) / 2) * height for r in own]
            spread = None
            if quantity == "median_ms":
                spread = [[r["median_ms"] - r["p20_ms"] for r in own], [r["p80_ms"] - r["median_ms"] for r in own]]
            values = [r[quantity] for r in own]
            axis.barh(
                places, values, height, xerr=spread, color=COLOURS.get(provider), label=provider, error_kw={"lw": 0.8}
            )
        axis.set_xlabel(label)
        if quantity == "median_ms" and max(r[quantity] for r in rows) > 50 * min(r[quantity] for r in rows):
            axis.set_xscale("log")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(groups)), groups)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _group(row: dict[str, Any]) -> str:
    name = "" if row["benchmark"] in ("stem", "step", "fbank") else f"{row['benchmark']}, "
    return f"{name}{row['mode']}, {row['dtype']}, {row['shape']['clips']} clips"
