"""Does training with the operators' kernels follow training by the dense formula?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cat.config import ConfigError
from cat.experiments.runs import ends, train_runs
from cat.experiments.verdict import Verdict
from cat.figures import smoothed, write_agreement
from cat.training.recipe import PretrainConfig, pick_device, pick_precision
from cat.training.records import read_rows
from cat_kernels.backends import why_not

# The root mean square that a run's differences may have, as a share of what re-seeding changes. "reference" on a CPU,
# 300 steps of 32 frames: 1.5e-6 in fp32, one clip a batch, and 0.009 in bf16, two clips. (Where training is chaotic
# rounding grows to noise, in fp32 too: with three times the rate one clip a batch made 0.2.)
AGREEMENT = {"fp32": 0.01, "bf16": 0.1}


def kernels(config: PretrainConfig, out: Path, *, progress: bool = True) -> Verdict:
    """Pre-trains with ``model.kernels``, with the dense formula, and twice more with the latter re-seeded.

    All start from the same weights. The first two runs draw the same order of clips, crops, masks and noise, so their
    losses differ by rounding and by what training makes of it; the re-seeded ones draw all of that anew. With d(t) the
    difference of two runs' running means over a twentieth of the run, at step t, and *noise* the root mean square of d
    between the re-seeded runs and the dense one, over steps and runs, it passes when for the loss and for each of its
    parts

        RMS over steps of d(kernels, dense) <= AGREEMENT * noise    and    |d(kernels, dense)| <= noise at every step.

    That a kernel computes its formula is the operators' tests' to show, and they are stricter; this shows that what
    they let pass does not grow in training to something that matters.
    """
    precision = pick_precision(config.run.precision, pick_device(config.run.device))
    if precision not in AGREEMENT:
        raise ConfigError(f"run.precision is {precision}; expected {' or '.join(AGREEMENT)}, whose limits are known")
    tested, seed = _tested_kernels(config), config.run.seed
    configs = {"dense": _with_kernels(config, "dense", seed), tested: _with_kernels(config, tested, seed)}
    configs |= {f"dense, re-seeded {i}": _with_kernels(config, "dense", seed + i) for i in (1, 2)}
    runs = train_runs(configs, out, progress)
    curves = {name: read_rows(run / "metrics.jsonl", "train") for name, run in runs.items()}
    found = agreement(curves, tested)
    share, largest = (max(row[name] / row["noise"] for row in found.values()) for name in ("difference", "largest"))
    limit = AGREEMENT[precision]
    write_agreement(out / "figures" / "agreement.png", curves, tested=tested, limit=limit * found["loss"]["noise"])
    return Verdict(
        passed=share <= limit and largest <= 1,
        text=f"the losses with {tested} differ from those of the dense formula by {share:.2g} of what re-seeding "
        f"changes, at one step by up to {largest:.2g} (needed: {limit:g} and 1)",
        columns=("", "dense, last", f"{tested}, last", "first difference", "difference", "largest", "re-seeding"),
        rows=[
            (
                {"loss": "loss", "regression": "L_p", "global": "L_g"}[key],
                *(f"{ends(runs[name], key)[1]:.5f}" for name in ("dense", tested)),
                *(f"{row[name]:.2e}" for name in ("first", "difference", "largest", "noise")),
            )
            for key, row in found.items()
        ],
        notes=[
            f"last: mean of the last tenth of {len(curves['dense'])} steps. first difference: at step 1. difference, "
            "re-seeding: root mean square over steps, of running means; largest: at one step."
        ],
        values={"kernels": tested, "share": share, "largest": largest, "found": found},
    )


def agreement(curves: Mapping[str, Sequence[Mapping[str, Any]]], tested: str) -> dict[str, dict[str, float]]:
    """How far the running means of `tested` are from those of "dense", and how far those of all others (noise).

    `curves`: train rows by name of the run. Returns for the loss and its parts "first" (step 1) and "largest"
    difference, and the root mean squares "difference" and "noise".
    """
    found = {}
    for key in ("loss", "regression", "global"):
        lines = {name: np.array([row[key] for row in rows]) for name, rows in curves.items()}
        dense = lines.pop("dense")
        window = max(1, len(dense) // 20)
        gaps = {name: np.abs(smoothed(line - dense, window)) for name, line in lines.items()}
        gap = gaps.pop(tested)
        found[key] = {"first": gap[0], "difference": np.sqrt(np.mean(gap**2)), "largest": gap.max()}
        found[key]["noise"] = np.sqrt(np.mean(np.square(list(gaps.values()))))
    return {key: {name: float(value) for name, value in row.items()} for key, row in found.items()}


def _tested_kernels(config: PretrainConfig) -> str:
    """``model.kernels``; "auto" is Triton where it can run, in its interpreter too, and else PyTorch."""
    chosen = config.model.kernels
    if chosen == "dense":
        raise ConfigError(
            "model.kernels='dense' is what this experiment compares with; expected auto, triton or reference"
        )
    if chosen == "auto":
        triton = why_not("MultiResConv", "triton", pick_device(config.run.device).type) is None
        return "triton" if triton else "reference"
    return chosen


def _with_kernels(config: PretrainConfig, name: str, seed: int) -> PretrainConfig:
    """The same weights whatever the seed."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, kernels=name),
        run=dataclasses.replace(config.run, seed=seed, weights_seed=config.run.seed),
    )
