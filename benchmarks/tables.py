"""Tables of a result file, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Data = dict[str, Any]  # a result file


@dataclass(frozen=True)
class Table:
    """Title, header and rows of text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        cells = [
            "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        return "\n".join([self.title, *(line.rstrip() for line in cells)])

    def markdown(self) -> str:
        rule = ["---" if i == 0 else "---:" for i in range(len(self.header))]
        lines = ["| " + " | ".join(line) + " |" for line in (self.header, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def machine_name(data: Data) -> str:
    machine = data["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return machine["gpu"] or f"{machine['cpu']}, {threads}"


def origin(data: Data) -> str:
    """Where and with what the numbers were measured, in a line."""
    versions, machine = data["versions"], data["machine"]
    parts = [machine_name(data), f"torch {versions['torch']}"]
    parts += [f"Triton {versions['triton']}"] if versions["triton"] and machine["gpu"] else []
    parts += [f"driver {machine['driver']}"] if machine["driver"] else []
    parts += [data["date"][:10]]
    parts += [f"commit {data['commit']}"] if data["commit"] else []
    return ", ".join(parts)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _gib(row: dict[str, Any]) -> str:
    return "" if row["peak_MiB"] is None else f"{row['peak_MiB'] / 1024:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _filled(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Without the columns that are empty."""
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return Table(title, [header[i] for i in filled], [[row[i] for i in filled] for row in rows])


def _speedups(data: Data) -> dict[str, dict[str, Any]]:
    return {_identity(c): c for c in data["comparisons"]}


def _identity(row: dict[str, Any]) -> str:
    shape = sorted(row["shape"].items())
    return f"{row['benchmark']}|{row['mode']}|{row['dtype']}|{shape}|{row['provider']}"


def _model_table(data: Data, benchmark: str, title: str, *, rate: bool = False) -> Table:
    speedups = _speedups(data)
    header = ["candidate", "pass", "precision", "clips", "ms", "20 to 80 %", "speed-up",
              *(["clips/s"] if rate else []), "peak GiB", "of matrix rate"]  # fmt: skip
    rows = []
    for r in (row for row in data["rows"] if row["benchmark"] == benchmark):
        c = speedups.get(_identity(r))
        rows.append([
            r["provider"], r["mode"], r["dtype"], str(r["shape"]["clips"]), _ms(r["median_ms"]),
            f"{_ms(r['p20_ms'])} to {_ms(r['p80_ms'])}", f"{c['speedup']:.2f}x {c['baseline']}" if c else "",
            *([f"{1e3 * r['shape']['clips'] / r['median_ms']:.3g}"] if rate else []),
            _gib(r), _percent(r.get("share_of_floor")),
        ])  # fmt: skip
    return Table(title, header, rows)


def stem_table(data: Data) -> Table:
    return _model_table(data, "stem", "Stem")


def sweep_table(data: Data) -> Table:
    """Other batches, and other resolution sets."""
    speedups = _speedups(data)
    header = ["candidate", "resolutions", "clips", "frames", "pass", "precision", "ms", "speed-up", "peak GiB",
              "of matrix rate"]  # fmt: skip
    rows = []
    for r in (row for row in data["rows"] if row["benchmark"] in ("stem sweep", "stem resolutions")):
        c, shape = speedups.get(_identity(r)), r["shape"]
        rows.append([
            r["provider"], shape.get("resolutions", f"{shape['preset']}'s"), str(shape["clips"]), str(shape["frames"]),
            r["mode"], r["dtype"], _ms(r["median_ms"]), f"{c['speedup']:.2f}x {c['baseline']}" if c else "",
            _gib(r), _percent(r.get("share_of_floor")),
        ])  # fmt: skip
    return Table("Stem at other batches and resolutions", header, rows)


def kernels_table(data: Data) -> Table:
    """A line a kernel and precision: each candidate's time, the share of the floor, who is fastest."""
    header = ["kernel of the stem", "precision", "MB", "GFLOP", "floor, ms", "triton, ms", "of floor",
              "triton, cublas, ms", "pytorch, ms", "fastest", "peak MiB", "pytorch, MiB"]  # fmt: skip
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in (row for row in data["rows"] if row["benchmark"] == "kernels"):
        lines.setdefault((r["mode"], r["dtype"]), {})[r["provider"]] = r
    rows = []
    for (name, dtype), by in lines.items():
        r = by.get("triton") or next(iter(by.values()))
        times = [_ms(by[p]["median_ms"]) if p in by else "" for p in ("triton", "triton, cublas", "pytorch")]
        peaks = ["" if p not in by or by[p]["peak_MiB"] is None else f"{by[p]['peak_MiB']:.0f}" for p in
                 ("triton", "pytorch")]  # fmt: skip
        fastest = min(by, key=lambda p: by[p]["median_ms"]) if len(by) > 1 else ""
        floor = f"{r['floor_ms']:.2g}" if r.get("floor_ms") else ""
        rows.append([
            name, dtype, _ms(r["bytes"] / 1e6), _ms(2 * r["multiply_adds"] / 1e9), floor,
            times[0], _percent(r.get("share_of_floor")), *times[1:], fastest, *peaks,
        ])  # fmt: skip
    return _filled("The stem's kernels alone", header, rows)  # a CPU has no kernels of ours


def step_table(data: Data) -> Table:
    return _model_table(data, "step", "Pre-training step", rate=True)


def finetune_table(data: Data) -> Table:
    return _model_table(data, "fine-tuning", "Fine-tuning step (AudioSet-20k)", rate=True)


def fbank_table(data: Data) -> Table:
    speedups = _speedups(data)
    header = ["candidate", "result", "precision", "clips", "ms", "20 to 80 %", "speed-up", "GB/s", "of copy bandwidth"]
    rows = []
    for r in (row for row in data["rows"] if row["benchmark"] == "fbank" and row["mode"] in ("log-mel", "model input")):
        c = speedups.get(_identity(r))
        rows.append([
            r["provider"], r["mode"], r["dtype"], str(r["shape"]["clips"]), _ms(r["median_ms"]),
            f"{_ms(r['p20_ms'])} to {_ms(r['p80_ms'])}", f"{c['speedup']:.2f}x {c['baseline']}" if c else "",
            f"{r['bytes'] / r['median_ms'] / 1e6:.3g}", _percent(r.get("share_of_floor")),
        ])  # fmt: skip
    return Table("Log-mel features", header, rows)


def features_table(data: Data) -> Table:
    rows = [
        [
            r["provider"], r["shape"]["preset"], str(r["shape"]["clips"]), _ms(r["median_ms"]), _ms(r["step_ms"]),
            f"{100 * r['share_of_step']:.2g} %",
        ]
        for r in data["rows"]
        if r["benchmark"] == "features"
    ]  # fmt: skip
    header = ["features by", "model", "clips", "ms", "pre-training step, ms", "share"]
    return Table("Features in a pre-training step", header, rows)


def operators_table(data: Data) -> Table:
    """A line an operator, pass, precision and what it is compared with: its reference, or what PyTorch users write."""
    rows_by = {_identity(r): r for r in data["rows"]}
    header = [
        "operator",
        "pass",
        "precision",
        "ms",
        "of copy bandwidth",
        "us a call",
        "against",
        "ms",
        "speed-up",
        "memory",
    ]
    rows, told = [], set()
    for c in (c for c in data["comparisons"] if c["provider"] == "operator"):
        r, other = rows_by[_identity(c)], rows_by[_identity({**c, "provider": c["baseline"]})]
        own = ["", "", "", "", "", ""]
        if _identity(c) not in told:
            told.add(_identity(c))
            cost = f"{r['overhead_us']:.0f}" if c["mode"] == "forward" else ""
            own = [c["benchmark"], c["mode"], c["dtype"], _ms(r["median_ms"]), _percent(r.get("share_of_floor")), cost]
        saved = f"{c['peak_memory_ratio']:.2f}x" if c["peak_memory_ratio"] is not None else ""
        rows.append([*own, c["baseline"], _ms(other["median_ms"]), f"{c['speedup']:.2f}x", saved])
    return Table("Operators", header, rows)


def inference_table(data: Data) -> Table:
    speedups = _speedups(data)
    header = ["candidate", "model", "precision", "clips", "ms", "20 to 80 %", "speed-up", "seconds of audio a second",
              "weights, MiB", "peak MiB", "distance"]  # fmt: skip
    rows = []
    for r in (row for row in data["rows"] if row["benchmark"] == "inference"):
        c, peak = speedups.get(_identity(r)), r["peak_MiB"]
        rows.append([
            r["provider"], r["shape"]["preset"], r["dtype"], str(r["shape"]["clips"]), _ms(r["median_ms"]),
            f"{_ms(r['p20_ms'])} to {_ms(r['p80_ms'])}", f"{c['speedup']:.2f}x {c['baseline']}" if c else "",
            f"{1e3 * r['audio_s'] / r['median_ms']:.3g}", f"{r['persistent_MiB']:.0f}",
            "" if peak is None else f"{peak:.0f}", f"{r['parity_error']:.1g}",
        ])  # fmt: skip
    return Table("Embedding of ten-second clips, waveform in", header, rows)


def parts_table(data: Data) -> Table:
    """Of a pre-training step, beside the prediction."""
    rows = []
    for shape, found in data.get("parts", {}).items():
        for part, c in found["parts"].items():
            rows.append([shape, part, _ms(c["ms"]), *_beside(c["ms"], c["predicted_ms"], _ms)])
        peak = found["peak_MiB"]
        if peak is not None:
            rows.append(
                [shape, "peak MiB", f"{peak:.0f}", *_beside(peak, found["predicted_peak_MiB"], "{:.0f}".format)]
            )
    header = ["step", "part", "ms", "PREDICTED for an H200", "error of the prediction"]
    return Table("Parts of a pre-training step", header, rows)


def _beside(measured: float, predicted: float | None, words: Callable[[float], str]) -> tuple[str, str]:
    if not predicted or not measured:
        return "", ""
    return words(predicted), f"{100 * (predicted / measured - 1):+.0f} percent"


def starts_table(data: Data) -> Table:
    rows = [[name, *(f"{found[key]:.1f}" for key in ("imports_s", "first_update_s", "ready_s"))]
            for name, found in data.get("starts", {}).items()]  # fmt: skip
    return Table("Start of a pre-training step, seconds", ["start", "imports", "first update", "at speed"], rows)


def entries_table(data: Data) -> Table:
    header = [
        "start on a manifest",
        "entries",
        "imports",
        "list",
        "rest",
        "first batch, s",
        "peak MiB",
        "a worker's own MiB",
    ]
    rows = []
    for r in data["rows"]:
        if r["benchmark"] == "entries":
            seconds = [f"{r[name]:.1f}" for name in ("import_s", "read_s", "rest_s")]
            rows.append([
                f"{r['mode']}, {r['provider']}", f"{r['shape']['clips']:,}", *seconds, f"{r['median_ms'] / 1000:.1f}",
                f"{r['peak_MiB']:.0f}", f"{r['worker_MiB']:.0f}",
            ])  # fmt: skip
    return Table("Start of a run, CPU time of the main process", header, rows)


def loader_table(data: Data) -> Table:
    """Which side is the bottleneck: the GPU where few cores feed it, else the loader."""
    header = ["clips of ten seconds", "read from", "kB a clip", "ms of a core", "20 to 80 %", "clips/s a core",
              "cores that feed an H200", "MB/s then", "bottleneck, 8 cores a GPU"]  # fmt: skip
    rows = []
    for r in data["rows"]:
        if r["benchmark"] == "loader":
            cores = r["demand"] / r["clips_a_second"]
            rows.append([
                r["mode"], r["provider"], f"{r['bytes_a_clip'] / 1e3:.0f}", _ms(r["median_ms"]),
                f"{_ms(r['p20_ms'])} to {_ms(r['p80_ms'])}", f"{r['clips_a_second']:.0f}",
                f"{cores:.1f}", f"{r['demand'] * r['bytes_a_clip'] / 1e6:.0f}", "GPU" if cores <= 8 else "loader",
            ])  # fmt: skip
    taken = next((r["demand"] for r in data["rows"] if r["benchmark"] == "loader"), 0)
    return Table(f"Reading clips, CPU time; an H200 takes {taken:.0f} clips/s (predicted step, base)", header, rows)


def scaling_table(data: Data) -> Table:
    header = ["trained by", "reads", "model", "precision", "clips an update", "ms an update", "20 to 80 %", "clips/s",
              "of one process", "exchanging gradients", "waiting for data", "of matrix rate", "MiB a process",
              "first update after, s"]  # fmt: skip
    found = [r for r in data["rows"] if r["benchmark"] == "scaling"]
    one = {(r["mode"], r["dtype"], r["shape"]["preset"]): r["clips_a_second"] for r in reversed(found)
           if r["shape"]["processes"] == 1}  # fmt: skip
    rows = []
    for r in found:
        base = one.get((r["mode"], r["dtype"], r["shape"]["preset"]))
        rows.append([
            r["provider"], r["mode"], r["shape"]["preset"], r["dtype"], str(r["shape"]["clips"]), _ms(r["median_ms"]),
            f"{_ms(r['p20_ms'])} to {_ms(r['p80_ms'])}", f"{r['clips_a_second']:.3g}",
            f"{r['clips_a_second'] / base:.2f}x" if base else "", _percent(r.get("exchange_share")),
            _percent(r["data_wait"]), _percent(r.get("matrix_share")), f"{r['peak_MiB']:.0f}", f"{r['start_s']:.1f}",
        ])  # fmt: skip
    return _filled("Training in one process and in several", header, rows)


def checkpoints_table(data: Data) -> Table:
    rows = []
    for r in (row for row in data["rows"] if row["benchmark"] == "checkpoint"):
        rows.append([
            r["provider"], r["shape"]["preset"], f"{r['bytes'] / 1e6:.0f}", _ms(r["median_ms"]),
            f"{_ms(r['p20_ms'])} to {_ms(r['p80_ms'])}", _ms(r["first_ms"]), _ms(r["written_ms"]),
        ])  # fmt: skip
    header = ["written", "model", "MB", "a step waits, ms", "20 to 80 %", "the first time", "all written after, ms"]
    return Table("Checkpoints", header, rows)


PARTS = {
    "student_stem": "student's stem",
    "student": "student, stem included",
    "decoder": "decoder",
    "teacher": "teacher",
    "unused_pass": "unused pass of the stem",
    "step": "whole step with backward",
}


def multiply_adds_table(data: Data) -> Table:
    """Of the first model counted; all precisions and devices do the same."""
    if not data["multiply_adds"]:
        return Table("Multiply-adds", ["forward, unless said"], [])
    title, counts = next(iter(data["multiply_adds"].items()))
    pair = ("visible", "dense")
    rows = [[words, *(f"{counts[name][part] / 1e9:.1f}" for name in pair)] for part, words in PARTS.items()]
    return Table(f"Multiply-adds ({title})", ["forward, unless said", *(f"{name}, G" for name in pair)], rows)


HEADLINE = {
    ("stem", "forward"): "stem, forward",
    ("stem", "forward+backward"): "stem, forward + backward",
    ("step", "step"): "whole pre-training step",
}


def headline(data: Data) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """What is compared, in words, and the rows of "dense", "visible" and, where it ran, "triton", with their "speedup":
    of the eager ones the largest batch."""
    faster = {_identity(c): c["speedup"] for c in data["comparisons"] if c["baseline"] == "dense"}
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for r in sorted(data["rows"], key=lambda r: r["shape"].get("clips", 0)):
        if (r["benchmark"], r["mode"]) in HEADLINE and r["provider"] in ("dense", "visible", "triton"):
            case = cases.setdefault((r["benchmark"], r["mode"], r["dtype"]), {})
            if case and r["shape"] != next(iter(case.values()))["shape"]:
                case.clear()
            case[r["provider"]] = {**r, "speedup": faster.get(_identity(r), 1.0)}
    found = []
    for (benchmark, mode, dtype), rows in cases.items():
        if {"dense", "visible"} <= set(rows):
            shape = rows["dense"]["shape"]
            words = f"{HEADLINE[benchmark, mode]}, {shape['preset']}, {dtype}, clips: {shape['clips']}"
            found.append((words, rows))
    return found


def headline_table(data: Data) -> Table:
    """Visible patches only against dense, in time and peak memory: what the repository's front page shows."""
    header = ["", "as released (dense), ms", "visible patches, PyTorch, ms", "in kernels, ms", "speed-up", "peak GiB"]
    lines = []
    for words, rows in headline(data):
        dense, best = rows["dense"], rows.get("triton", rows["visible"])
        times = [_ms(rows[name]["median_ms"]) if name in rows else "" for name in ("dense", "visible", "triton")]
        memory = " to ".join(filter(None, (_gib(dense), _gib(best))))
        lines.append([words, *times, f"{best['speedup']:.1f}x", memory])
    return Table("Speed, 4 masks a clip", header, lines)


TABLES: dict[str, Callable[[Data], Table]] = {
    "headline": headline_table,
    "stem": stem_table,
    "step": step_table,
    "parts": parts_table,
    "starts": starts_table,
    "entries": entries_table,
    "loader": loader_table,
    "stem-sweep": sweep_table,
    "kernels": kernels_table,
    "fbank": fbank_table,
    "features": features_table,
    "operators": operators_table,
    "inference": inference_table,
    "finetune": finetune_table,
    "checkpoints": checkpoints_table,
    "scaling": scaling_table,
    "multiply-adds": multiply_adds_table,
}


def tables(data: Data) -> Iterable[Table]:
    """Those that have rows, without the headline, which repeats them."""
    made = [make(data) for name, make in TABLES.items() if name != "headline"]
    return [table for table in made if table.rows]


def rejected_lines(data: Data) -> list[str]:
    return [f"{r['benchmark']} {r['mode']} {r['dtype']} {r['provider']}: {r['reason']}" for r in data["rejected"]]


def summary(data: Data) -> str:
    """The end of a run's output: short, the largest numbers first."""
    lines = [origin(data)]
    copy = data["ceilings"].get("copy_GBps")
    if copy:
        rates = [f"{name.split('_')[1]} {value:.3g}" for name, value in data["ceilings"].items() if "matmul" in name]
        lines.append(f"copy {copy:.4g} GB/s, matrix product TFLOP/s: {', '.join(rates)}")
    if data["tests"]:
        lines.append(f"tests: {', '.join(f'{count} {what}' for what, count in data['tests'].items() if count)}")
    for table in tables(data):
        lines += ["", table.text()]
    problems = [f"{p['name']}: {p['status']}, {p['reason']}" for p in data["pieces"] if p["status"] != "ok"]
    for title, found in (("notes", data["notes"]), ("rejected", rejected_lines(data)), ("not complete", problems)):
        lines += ["", f"{title}:", *(f"  {line}" for line in dict.fromkeys(found))] if found else []
    return "\n".join(lines)
