"""What experiments share: runs side by side, and where their losses begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from cat.config import ConfigError
from cat.figures import write_loss_curves
from cat.training.guidance import constant_loss, reduced
from cat.training.pretrain import pretrain
from cat.training.recipe import PretrainConfig
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


def constant_to_beat(rows: np.ndarray, config: PretrainConfig) -> float:
    """L_r of the best constant prediction of embeddings (clips, D_e), reduced as the run's.

    Raises: `ConfigError` where there is none.
    """
    constant = constant_loss(torch.from_numpy(rows), config.objective.regularisation)
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
