"""How well scores name the classes of clips: the field's metrics, each by scikit-learn.

A class without a positive clip has no average precision and no AUC; one without a negative clip has no AUC. Such a
class is left out of the mean over classes, and named. `cat.evaluation.intervals` says how sure the numbers are.

Shapes: n clips, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EXTRA = "scores need scikit-learn: pip install 'cat-kernels[train]'"
MAIN_METRIC = {"single-label": "accuracy", "multi-label": "mAP", "events": "mAP"}
TOP = 5  # of "top-5"; left out where there are no more classes than that


def main_metric(task: str) -> str:
    """The metric that a task is judged by; higher is better. Events are judged here by the clip's labels alone."""
    if task not in MAIN_METRIC:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(MAIN_METRIC)}")
    return MAIN_METRIC[task]


@dataclass(frozen=True)
class ClassScores:
    """One class. What the clips do not define is None; with an AUC of 1 d' is infinite."""

    label: str
    clips: int  # with this label
    ap: float | None
    auc: float | None
    d_prime: float | None
    precision: float | None = None  # these three, of the highest score, with one label a clip only
    recall: float | None = None
    predicted: int | None = None  # clips whose highest score this class has


@dataclass(frozen=True)
class Scores:
    """All metrics of one set of clips, in 0..1 but for d'."""

    task: str
    clips: int
    metrics: dict[str, float]  # by name, the main one first
    classes: tuple[ClassScores, ...]
    left_out: dict[str, tuple[str, ...]]  # metric -> classes that are not in its mean
    confusion: np.ndarray | None  # (C, C) int64, true class by predicted one; with one label a clip only

    @property
    def main(self) -> float:
        return self.metrics[main_metric(self.task)]


def scores_of(scores: np.ndarray, targets: np.ndarray, task: str, classes: Sequence[str]) -> Scores:
    """All metrics of ``scores`` (n, C), higher is likelier, against ``targets`` (n, C) bool or 0 and 1.

    One label a clip ("single-label"): accuracy, balanced accuracy, top-5; every task: mAP, AUC, d' (of the mean AUC, as
    published for AudioSet) and lwlrap, which counts every label once. A metric that the clips do not define is not
    there. Raises ValueError for scores that are not finite, shapes that do not fit and targets of another task.
    """
    main_metric(task)
    scores, targets = checked(scores, targets, task, classes)
    single = task == "single-label"
    metrics = _of_the_highest(scores, targets) if single else {}
    ap, auc = _per_class(scores, targets)
    d_prime = _d_prime(auc)
    if np.isfinite(ap).any():
        metrics["mAP"] = float(np.nanmean(ap))
    if np.isfinite(auc).any():
        metrics["AUC"] = float(np.nanmean(auc))
        metrics["d'"] = float(_d_prime(metrics["AUC"]))
    metrics["lwlrap"] = lwlrap(scores, targets)
    confusion = confusion_matrix(scores, targets) if single else None
    of_highest = _per_class_of_the_highest(scores, targets) if single else [{} for _ in classes]
    without = {"mAP": np.isnan(ap), "AUC": np.isnan(auc)}
    if single:
        without["balanced accuracy"] = ~targets.any(axis=0)
    return Scores(
        task,
        len(scores),
        metrics,
        tuple(
            ClassScores(
                label, int(targets[:, c].sum()), _known(ap[c]), _known(auc[c]), _known(d_prime[c]), **of_highest[c]
            )
            for c, label in enumerate(classes)
        ),
        {metric: tuple(classes[c] for c in np.flatnonzero(missing)) for metric, missing in without.items()},
        confusion,
    )


def checked(
    scores: np.ndarray, targets: np.ndarray, task: str, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and targets as bool, if they can be judged."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape or scores.shape[1] != len(classes):
        raise ValueError(
            f"scores are {scores.shape} and targets {targets.shape}; expected both to be (clips, {len(classes)} "
            "classes)"
        )
    if len(scores) == 0:
        raise ValueError("there is no clip to score; give at least one with a label")
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        clip, c = bad[0]
        raise ValueError(
            f"{len(np.unique(bad[:, 0]))} of {len(scores)} clips have scores that are not finite; the first: clip "
            f"{clip}, class {classes[c]!r}, {scores[clip, c]}. The model's weights are damaged or its training has "
            "diverged; give another checkpoint"
        )
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("targets hold values between 0 and 1; a metric needs true or false for each clip and class")
    targets = targets.astype(bool)
    counts = targets.sum(axis=1)
    if task == "single-label" and (counts != 1).any():
        clip = int((counts != 1).argmax())
        raise ValueError(f"clip {clip} has {counts[clip]} labels; the task is single-label: expected one a clip")
    if not targets.any():
        raise ValueError("not one of the clips has a label of these classes; there is nothing to score")
    return scores, targets


# ---------------------------------------------------------------- one number each


def accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of clips whose highest score is their class. scores (n, C), targets (n, C) with one True a row."""
    return float(np.mean(targets[np.arange(len(targets)), scores.argmax(axis=1)]))


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over classes of the area under the precision-recall curve. A class without a positive clip has no average
    precision and is left out of the mean (`classes_without_positives` names them). Raises when no class is left."""
    metrics = _sklearn_metrics()
    positive = targets.any(axis=0)
    if not positive.any():
        raise ValueError("mean average precision is undefined: no class has a positive clip in this split.")
    return float(
        np.mean([metrics.average_precision_score(targets[:, c], scores[:, c]) for c in np.flatnonzero(positive)])
    )


def classes_without_positives(targets: np.ndarray, classes: Sequence[str]) -> list[str]:
    return [name for name, column in zip(classes, targets.T, strict=True) if not column.any()]


def lwlrap(scores: np.ndarray, targets: np.ndarray) -> float:
    """Label-weighted label-ranking average precision: clips weigh as much as they have labels."""
    counts = targets.sum(axis=1)
    kept = counts > 0
    ranked = _sklearn_metrics().label_ranking_average_precision_score
    return float(ranked(targets[kept], scores[kept], sample_weight=counts[kept]))


def confusion_matrix(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(C, C) int64: clips of the row's class whose highest score the column's class has."""
    matrix = _sklearn_metrics().confusion_matrix
    return matrix(targets.argmax(axis=1), scores.argmax(axis=1), labels=np.arange(targets.shape[1]))


# ---------------------------------------------------------------- parts


def _of_the_highest(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """One label a clip: accuracy, balanced (the mean of the recalls of the classes that occur) and top-5."""
    metrics = _sklearn_metrics()
    true, classes = targets.argmax(axis=1), targets.shape[1]
    recall = metrics.recall_score(
        true, scores.argmax(axis=1), labels=np.unique(true), average="macro", zero_division=0.0
    )
    found = {"accuracy": accuracy(scores, targets), "balanced accuracy": float(recall)}
    if classes > TOP:
        found[f"top-{TOP}"] = float(metrics.top_k_accuracy_score(true, scores, k=TOP, labels=np.arange(classes)))
    return found


def _per_class_of_the_highest(scores: np.ndarray, targets: np.ndarray) -> list[dict[str, Any]]:
    true, predicted, every = targets.argmax(axis=1), scores.argmax(axis=1), np.arange(targets.shape[1])
    precision, recall, _, _ = _sklearn_metrics().precision_recall_fscore_support(
        true, predicted, labels=every, average=None, zero_division=np.nan
    )
    counts = np.bincount(predicted, minlength=len(every))
    return [
        {"precision": _known(precision[c]), "recall": _known(recall[c]), "predicted": int(counts[c])} for c in every
    ]


def _per_class(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP and AUC (C,), NaN where the clips do not define them."""
    metrics = _sklearn_metrics()
    positives = targets.sum(axis=0)

    def each(metric: Callable[[np.ndarray, np.ndarray], float], defined: np.ndarray) -> np.ndarray:
        columns = [metric(targets[:, c], scores[:, c]) if defined[c] else math.nan for c in range(len(defined))]
        return np.array(columns, dtype=np.float64)

    return (
        each(metrics.average_precision_score, positives > 0),
        each(metrics.roc_auc_score, (positives > 0) & (positives < len(targets))),
    )


def _d_prime(auc: Any) -> Any:
    """How far apart two normal distributions of deviation 1 are whose AUC this is."""
    from scipy.stats import norm

    return math.sqrt(2) * norm.ppf(auc)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(EXTRA) from error
    return metrics
