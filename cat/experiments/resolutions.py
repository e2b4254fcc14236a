"""Patches only, against the multi-resolution stem."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cat.experiments.runs import comparison, ends, probe_columns, probe_runs, table_rows, train_runs
from cat.experiments.verdict import Verdict
from cat.training.recipe import PretrainConfig


def resolutions(config: PretrainConfig, data: Path, out: Path, *, progress: bool = True) -> Verdict:
    """Pre-trains with resolutions {16} and with {4, 8, 16} and probes both against their untrained twins.

    {16} gets one block more: the paper counts the multi-resolution stem as a block. Their losses are not comparable,
    the targets being each model's own; the probes are. Passes when both losses fall.
    """
    patches = dataclasses.replace(config.model, resolutions=(16,), channels=(), depth=config.model.depth + 1)
    models = {"{16}": patches, "{4, 8, 16}": dataclasses.replace(config.model, resolutions=(4, 8, 16))}
    runs = train_runs({name: dataclasses.replace(config, model=model) for name, model in models.items()}, out, progress)
    report = probe_runs(runs, data, out, config, progress, untrained=True)
    falls = {name: 1 - last / first for name, (first, last) in ((n, ends(r, "regression")) for n, r in runs.items())}
    scores = [report.row(name).scores for name in runs]
    fallen = ", ".join(f"{100 * fall:.0f} % with {name}" for name, fall in falls.items())
    return Verdict(
        passed=all(fall > 0 for fall in falls.values()),
        text=f"the regression losses fell, by {fallen}. "
        + comparison("{4, 8, 16}", scores[1], "{16}", scores[0], report)
        if all(fall > 0 for fall in falls.values())
        else f"a regression loss did not fall: {fallen}",
        columns=("run", "parameters", "clips/s", "L_p first", "L_p last", *probe_columns(report)),
        rows=table_rows(runs, report, ("regression",), with_speed=True),
        notes=report.notes,
        values={"falls": falls, "scores": {row.name: row.scores for row in report.rows}},
    )
