"""Plots of a result file, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import headline, machine_name

# One colour a candidate, the same in every plot.
COLOURS = {
    "dense": "#9a9a9a",
    "dense compiled": "#5f5f5f",
    "visible": "#e8a33d",
    "visible compiled": "#c4541c",
    "triton": "#1f6f8b",
    "triton compiled": "#14495c",
    "triton, CUDA graph": "#5b3f8c",
    "triton compiled, CUDA graph": "#3a2760",
    "triton, cublas": "#7fb2c2",
    "pytorch": "#9a9a9a",
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
    """Write stem.png, stem-resolutions.png, step.png, kernels.png, fbank.png, operators.png and stem-sweep.png, of
    those that have rows.

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
    swept = _swept(data)
    if swept:
        path = directory / "stem-sweep.png"
        _lines(swept, f"stem by batch, {machine_name(data)}, {data['date'][:10]}", path)
        written.append(path)
    return written


def plot_headline(results: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as dense, of every machine and comparison of the front page's table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    words = {
        "dense": "as released (dense)",
        "visible": "visible patches, PyTorch",
        "triton": "visible patches, kernels",
    }
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for data in results:
        for name, rows in headline(data):
            cases.setdefault(f"{machine_name(data)}\n{name}", rows)
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.75 * len(cases)), layout="constrained")
    for place, rows in enumerate(cases.values()):
        for line, provider in enumerate(name for name in words if name in rows):
            faster, ms = rows[provider]["speedup"], rows[provider]["median_ms"]
            at = place + 0.26 * (line - (len(rows) - 1) / 2)
            axis.barh(at, faster, 0.24, color=COLOURS[provider], label=words[provider])
            axis.text(faster, at, f" {faster:.1f}x, {ms:,.{0 if ms >= 100 else 1}f} ms", va="center", fontsize=8)
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as dense")
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(named.values(), named.keys(), fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _figures(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]], list[tuple[str, str]]]]:
    time_and_memory = [("median_ms", "milliseconds"), ("peak_MiB", "peak MiB of a call")]
    apart = ("stem", "stem sweep", "stem resolutions", "kernels", "step", "fbank", "features")
    of = {name: [r for r in data["rows"] if r["benchmark"] == name] for name in apart}
    operators = [r for r in data["rows"] if r["benchmark"] not in of]
    time_and_share = [("median_ms", "milliseconds"), ("share_of_floor", "share of the copy bandwidth")]
    return [
        ("stem", of["stem"], time_and_memory),
        ("stem-resolutions", of["stem resolutions"], time_and_memory),
        ("step", of["step"], time_and_memory),
        (
            "kernels",
            _compared(of["kernels"]),
            [("median_ms", "milliseconds"), ("share_of_floor", "share of the floor")],
        ),
        ("fbank", of["fbank"], time_and_share),
        ("operators", operators, time_and_share),
    ]


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels of ours, where any were measured, with what they are compared with: not the library's alone."""
    ours = {r["mode"] for r in rows if r["provider"] == "triton"}
    return [r for r in rows if r["mode"] in ours or not ours]


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
        figsize=(5.5 * len(panels), 1.2 + 0.2 * len(groups) * (len(providers) + 0.5)),
        sharey=True,
        squeeze=False,
        layout="constrained",
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
            _plain_ticks(axis.xaxis)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(groups)), groups)
    axes[0][0].set_ylim(len(groups) - 0.4, -0.6)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _swept(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the sweep, and those of the main comparison that differ in the batch alone."""
    swept = [r for r in data["rows"] if r["benchmark"] == "stem sweep"]
    shapes = [{**r["shape"], "clips": None} for r in swept]
    return swept + [r for r in data["rows"] if r["benchmark"] == "stem" and {**r["shape"], "clips": None} in shapes]


def _lines(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time and peak memory by batch, both axes logarithmic; a row of panels for every pass and precision."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    quantities = [("median_ms", "milliseconds"), ("peak_MiB", "peak MiB of a call")]
    quantities = [q for q in quantities if any(r[q[0]] for r in rows)]
    cases = list(dict.fromkeys((r["mode"], r["dtype"]) for r in rows))
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    batches = sorted({r["shape"]["clips"] for r in rows})
    figure, axes = plt.subplots(
        len(cases),
        len(quantities),
        figsize=(5 * len(quantities), 1 + 3 * len(cases)),
        squeeze=False,
        layout="constrained",
    )
    for line, (mode, dtype) in zip(axes, cases, strict=True):
        for axis, (quantity, label) in zip(line, quantities, strict=True):
            for provider in providers:
                own = [r for r in rows if (r["mode"], r["dtype"], r["provider"]) == (mode, dtype, provider)]
                points = sorted((r["shape"]["clips"], r[quantity]) for r in own if r[quantity])
                clips, values = [p[0] for p in points], [p[1] for p in points]
                axis.plot(clips, values, "o-", color=COLOURS.get(provider), label=provider, ms=4)
            axis.set_xscale("log")
            axis.set_yscale("log")
            _plain_ticks(axis.yaxis)
            axis.set_xticks(batches, batches)
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_xlabel("clips")
            axis.set_ylabel(label)
            axis.set_title(f"{mode}, {dtype}", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _group(row: dict[str, Any]) -> str:
    if row["benchmark"] == "kernels":
        return f"{row['mode']}, {row['dtype']}"
    if row["benchmark"] == "stem resolutions":
        return f"{row['shape']['resolutions']}, {row['mode']}, {row['dtype']}"
    name = "" if row["benchmark"] in ("stem", "step", "fbank") else f"{row['benchmark']}, "
    return f"{name}{row['mode']}, {row['dtype']}, {row['shape']['clips']} clips"
