"""What experiments share: runs side by side, their probes, and the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cat.config import ConfigError
from cat.data import load_manifest
from cat.encoders import CatEncoder, FrozenEncoder, LogMelStatistics
from cat.evaluation.probe import SPLITS, Report, run_probe
from cat.figures import write_loss_curves, write_projection
from cat.training.guidance import constant_loss, reduced
from cat.training.pretrain import pretrain
from cat.training.recipe import PretrainConfig, pick_device
from cat.training.records import read_rows


def train_runs(configs: Mapping[str, PretrainConfig], out: Path, progress: bool) -> dict[str, Path]:
    """One run a configuration, with the same seed and so the same data order and masks; name -> run directory."""
    runs = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        run_dir = out / f"run{number}"
        result = pretrain(config, run_dir, overwrite=True, progress=progress)
        if result.stopped_by:
            raise KeyboardInterrupt
        runs[name] = run_dir
    write_loss_curves(
        out / "figures" / "loss.png", {n: read_rows(r / "metrics.jsonl", "train") for n, r in runs.items()}
    )
    return runs


def probe_runs(
    runs: Mapping[str, Path],
    data: Path,
    out: Path,
    config: PretrainConfig,
    progress: bool,
    *,
    untrained: bool = False,
    pooling: str = "mean",
) -> Report:
    device = pick_device(config.run.device)
    trained = {n: CatEncoder.from_checkpoint(run, pooling=pooling, device=device) for n, run in runs.items()}
    encoders: dict[str, FrozenEncoder] = dict(trained)
    twins = trained if untrained else dict(list(trained.items())[:1])
    encoders |= {f"{name}, untrained" if untrained else "untrained": e.untrained_twin(0) for name, e in twins.items()}
    encoders["log-mel mean + std"] = LogMelStatistics(config.features, device=device)
    manifests = {split: load_manifest(data / f"{split}.jsonl") for split in SPLITS}
    report = run_probe(encoders, manifests, batch_size=32, progress=progress)
    drawn = {r.name: (r.test.rows, r.test_labels) for r in report.rows if r.name in runs and r.test is not None}
    write_projection(out / "figures" / "embeddings.png", drawn)
    return report


def constant_to_beat(rows: np.ndarray, config: PretrainConfig) -> float:
    """L_r of the best constant prediction of embeddings (clips, D_e), reduced as the run's.

    Raises: `ConfigError` where there is none.
    """
    constant = constant_loss(torch.from_numpy(rows), config.objective)
    if constant is None:
        raise ConfigError(
            f"objective.regularisation_projection={config.objective.regularisation_projection!r}, and {len(rows)} "
            "embeddings: there is no constant prediction to compare with; expected 'student', and embeddings that are "
            "not all the same"
        )
    return reduced(constant, config)


def ends(run_dir: Path, key: str) -> tuple[float, float]:
    """Mean over the first and over the last tenth of a run's steps."""
    values = [row[key] for row in read_rows(run_dir / "metrics.jsonl", "train")]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def table_rows(
    runs: Mapping[str, Path], report: Report, losses: Sequence[str], *, with_speed: bool = False
) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for row in report.rows:
        cells: list[str] = [row.name]
        if row.name in runs:
            if with_speed:
                model = CatEncoder.from_checkpoint(runs[row.name]).encoder
                speeds = [s["clips_per_s"] for s in read_rows(runs[row.name] / "metrics.jsonl", "speed")]
                cells += [
                    f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                    f"{sorted(speeds)[len(speeds) // 2]:.1f}",
                ]
            cells += [f"{value:.4f}" for key in losses for value in ends(runs[row.name], key)]
        else:
            cells += [""] * (2 * len(losses) + 2 * with_speed)
        rows.append([*cells, *(f"{100 * score:.1f} %" for score in row.scores.values())])
    return rows


def probe_columns(report: Report) -> list[str]:
    return [f"{'kNN' if probe == 'knn' else probe} {report.task.metric}" for probe in report.rows[0].scores]


def comparison(name: str, scores: dict[str, float], other: str, others: dict[str, float], report: Report) -> str:
    """In words, with the standard error of a difference of two shares of the test clips."""
    clips = report.counts["test"]
    parts = []
    for probe, score in scores.items():
        gap = score - others[probe]
        error = math.sqrt((score * (1 - score) + others[probe] * (1 - others[probe])) / clips)
        sure = "" if abs(gap) > 2 * error else ", less than chance allows for"
        title = "kNN" if probe == "knn" else probe
        parts.append(f"{title} probe {100 * gap:+.1f} points (standard error {100 * error:.1f}{sure})")
    return f"{name} against {other}: {'; '.join(parts)}. One seed."
