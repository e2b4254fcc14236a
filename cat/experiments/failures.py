"""Are failures recognised? Each is provoked, and the trainer's own warning must name it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cat.data import EmbeddingWriter, Manifest, load_manifest, write_manifest
from cat.encoders import FrozenEncoder
from cat.encoders.embed import write_embeddings
from cat.experiments.runs import constant_to_beat
from cat.experiments.verdict import Verdict
from cat.figures import write_loss_curves
from cat.model import CAT
from cat.training.pretraining import Pretraining
from cat.training.recipe import PretrainConfig
from cat.training.records import read_rows
from cat.training.start import started

PULL = 1.0  # of the control: weight * L_r over L_p, each of its best constant prediction

# ---------------------------------------------------------------- networks that fail


class UnwiredCAT(CAT):
    """Its regulariser's head learns to read the CLS token, and the student does not learn to be read."""

    def encode(self, spec: Tensor, visible: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        x, cls = super().encode(spec, visible)
        return x, {layer: token.detach() for layer, token in cls.items()}


class CollapsingCAT(CAT):
    """With a projector on both sides that is trained on both: student and teacher can agree on a constant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        D = self.config.embed_dim
        self.projector = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def targets(self, spec: Tensor) -> Tensor:
        target_BLD = super().targets(spec)
        with torch.enable_grad():
            return self.projector(target_BLD)

    def decode(self, *args: Any, **options: Any) -> Tensor:
        return self.projector(super().decode(*args, **options))


class Unwired(Pretraining):
    network = UnwiredCAT


class Collapsing(Pretraining):
    network = CollapsingCAT


# ---------------------------------------------------------------- guides that fail

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # of embeddings (clips, D_e)


def of_other_clips(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rows[rng.permutation(len(rows))]


def nearly_the_same(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As of an encoder that heard mostly the padding: what is the clip's own is 3 % of what all have."""
    return np.sqrt(rows.shape[1]) + 0.03 * rows


def of_silence(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As of an encoder to which every other clip is silent."""
    return np.where(np.arange(len(rows))[:, None] % 2, rows, rows[:1])


def of_odd_lengths(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(np.arange(len(rows))[:, None] % 10, rows, 300 * rows)


# ---------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Case:
    """One failure, and the words by which the trainer must name it; None for the control, which it must not warn of."""

    words: str | None
    weight: float = 1.0  # times the control's
    change: Change | None = None  # of the embeddings
    task: type[Pretraining] = Pretraining
    whole: bool = False  # over the whole schedule; else for one update: the warning comes at the start


CASES: dict[str, Case] = {
    "control": Case(None, whole=True),
    "weight of L_r 0": Case("regularisation_weight is 0", weight=0.0),
    "weight of L_r too small": Case("will hardly feel the guide", weight=1e-3),
    "weight of L_r too large": Case("will drown the patches", weight=1e2),
    "head not wired to the student": Case("does not reach the student", task=Unwired),
    "embeddings of other clips": Case("does not follow the guide", change=of_other_clips, whole=True),
    "embeddings nearly the same": Case("hardly tells the clips apart", change=nearly_the_same),
    "every other clip silent to the guide": Case("that another clip has too", change=of_silence),
    "lengths that differ hundredfold": Case("lengths go from", change=of_odd_lengths),
    "projector on the teacher too": Case("may have collapsed", task=Collapsing, weight=0.0, whole=True),
}


def failures(config: PretrainConfig, out: Path, *, encoder: FrozenEncoder, progress: bool = True) -> Verdict:
    """Pre-trains once as it should be, towards the embeddings of `encoder`, and once for each way to go wrong.

    Passes when the trainer's warnings name every failure and it warns of nothing in the control. The embeddings are
    scaled to a root mean square of 1: at this rate AdamW's steps are ten times the entries of a unit vector, and in a
    run as short as this the head would not come to rest.
    """
    linked, skipped = write_embeddings(
        load_manifest(config.data.train), encoder, out / "embeddings.npy", progress=progress
    )
    rows = np.load(out / "embeddings.npy", allow_pickle=False)
    rows /= np.sqrt(np.square(rows).mean())
    config = _with_weight(config, rows)
    told: dict[str, list[dict[str, Any]]] = {}
    curves = {}
    for number, (name, case) in enumerate(CASES.items(), start=1):
        run_dir = out / f"run{number}"
        _train(case, _changed(config, case, linked, rows, out), run_dir, progress)
        told[name] = read_rows(run_dir / "metrics.jsonl", "warning")
        if case.whole:
            curves[name] = read_rows(run_dir / "metrics.jsonl", "train")
    write_loss_curves(out / "figures" / "loss.png", curves)
    explained = [row["regularisation_explained"] for row in curves["control"]]
    tenth = max(1, len(explained) // 10)
    verdict = _verdict(told, config.optim.steps, sum(explained[-tenth:]) / tenth)
    verdict.notes += [f"{len(skipped)} clips got no embedding and were left out"] if skipped else []
    verdict.values["encoder"] = encoder.name
    return verdict


def _verdict(told: dict[str, list[dict[str, Any]]], steps: int, explained: float) -> Verdict:
    named = {name: _naming(case, told[name]) for name, case in CASES.items() if case.words is not None}
    missed = [name for name, row in named.items() if row is None]
    false = [row["text"] for row in told["control"]]
    parts = [
        *([f"the trainer did not name: {', '.join(missed)}"] if missed else []),
        *([f"it warned of the control: {'; '.join(false)}"] if false else []),
    ]
    return Verdict(
        passed=not parts,
        text="; ".join(parts)
        or f"the trainer named all {len(named)} failures and warned of nothing in the control, which explains "
        f"{100 * explained:.0f} % of what the mean embedding leaves",
        columns=("failure", "step", "named by", "other warnings"),
        rows=[_row(name, case, told[name], named.get(name)) for name, case in CASES.items()],
        notes=[
            f"step: updates done when it was said, of {steps}; 0: before the first.",
            "A guide of another domain, sound and all, is not among them: without labels nothing tells it from a right "
            "one (`cat-audio probe` with some labels does).",
        ],
        values={"explained": explained, "warnings": told},
    )


def _with_weight(config: PretrainConfig, rows: np.ndarray) -> PretrainConfig:
    """With a weight of L_r, where the recipe has none."""
    constant = constant_to_beat(rows, config)
    if config.objective.regularisation_weight:
        return config
    weight = PULL * math.sqrt(config.model.embed_dim) / constant
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, regularisation_weight=weight))


def _changed(config: PretrainConfig, case: Case, linked: Manifest, rows: np.ndarray, out: Path) -> PretrainConfig:
    weight = case.weight * config.objective.regularisation_weight
    train = config.data.train if case.task is Collapsing else str(_embedded(case, linked, rows, out))
    return dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, regularisation_weight=weight),
        data=dataclasses.replace(config.data, train=train),
        run=dataclasses.replace(config.run, stop_at=config.run.stop_at if case.whole else 1),
    )


def _embedded(case: Case, linked: Manifest, rows: np.ndarray, out: Path) -> Path:
    """The manifest of the clips with a case's embeddings."""
    name = case.change.__name__ if case.change else "scaled"
    path = out / f"{name}.npy"
    with EmbeddingWriter(path, linked, dim=rows.shape[1], encoder=name) as writer:
        writer.append(range(len(rows)), case.change(rows, np.random.default_rng(0)) if case.change else rows)
    write_manifest(writer.manifest, path.with_suffix(".jsonl"))
    return path.with_suffix(".jsonl")


def _train(case: Case, config: PretrainConfig, run_dir: Path, progress: bool) -> None:
    def task() -> Pretraining:
        return case.task(config, load_manifest(config.data.train))

    with started(task, config.run, run_dir, resume=False, overwrite=True, progress=progress) as trainer:
        if trainer.run().stopped_by:
            raise KeyboardInterrupt


def _naming(case: Case, told: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in told if case.words is not None and case.words in row["text"]), None)


def _row(name: str, case: Case, told: list[dict[str, Any]], naming: dict[str, Any] | None) -> tuple[str, ...]:
    if case.words is None:
        return name, "", "nothing, as it should be" if not told else "", str(len(told))
    if naming is None:
        return name, "", "not named", str(len(told))
    return name, str(naming["step"]), f"... {case.words} ...", str(len(told) - 1)
