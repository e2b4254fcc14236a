"""Probes of frozen features: k nearest neighbours and logistic regression, each tuned on a validation split.

The one setting of each probe (k, C) is chosen on the validation split; the test split is scored once, with
it. Features are standardised with the training split's mean and deviation for both probes.

Shapes: n clips, d feature width, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KNN_CANDIDATES = (1, 3, 5, 10, 20, 50)
LINEAR_CANDIDATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
EXTRA = "probes need scikit-learn: pip install 'cat-kernels[train]'"


@dataclass(frozen=True)
class Split:
    """features (n, d) float32 and targets (n, C) bool of the same clips in the same order."""

    features: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Result:
    """A probe's score on the test split, and how its setting came about. Scores are in 0..1."""

    score: float
    setting: str  # "k" or "C"
    value: float
    valid_score: float
    tried: dict[str, float]  # setting -> score on the validation split


def accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of clips whose highest score is their class. scores (n, C), targets (n, C) with one True a row."""
    return float(np.mean(targets[np.arange(len(targets)), scores.argmax(axis=1)]))


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over classes of the area under the precision-recall curve. A class without a positive clip has no average
    precision and is left out of the mean (`classes_without_positives` names them). Raises when no class is left."""
    from sklearn.metrics import average_precision_score

    positive = targets.any(axis=0)
    if not positive.any():
        raise ValueError("mean average precision is undefined: no class has a positive clip in this split.")
    return float(np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in np.flatnonzero(positive)]))


def classes_without_positives(targets: np.ndarray, classes: Sequence[str]) -> list[str]:
    return [name for name, column in zip(classes, targets.T, strict=True) if not column.any()]


def chance(train: Split, test: Split, *, multi_label: bool) -> float:
    """What needs no features: always the commonest training class, or, for mAP, the share of positive test clips."""
    if multi_label:
        return float(test.targets[:, test.targets.any(axis=0)].mean())
    return float(test.targets[:, train.targets.sum(axis=0).argmax()].mean())


def knn_probe(train: Split, valid: Split, test: Split, *, multi_label: bool) -> Result:
    """Cosine nearest neighbours; a neighbour votes for its classes with its similarity. k chosen on `valid`."""
    train, valid, test = _standardised(train, valid, test)
    candidates = [k for k in KNN_CANDIDATES if k <= len(train.features)]

    def scores(k: int, features: np.ndarray) -> np.ndarray:
        similarity = _unit(features) @ _unit(train.features).T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        # from -1..1 to 0..2, so that a neighbour on the other side is a weak vote, never a negative one
        weight = 1 + np.take_along_axis(similarity, nearest, axis=1)
        return np.einsum("nk,nkc->nc", weight, train.targets[nearest].astype(np.float64)) / k

    return _choose("k", candidates, scores, valid, test, multi_label)


def linear_probe(train: Split, valid: Split, test: Split, *, multi_label: bool) -> Result:
    """Logistic regression, multinomial for one label a clip and one a class for several. C chosen on `valid`."""
    train, valid, test = _standardised(train, valid, test)
    fitted: dict[float, Callable[[np.ndarray], np.ndarray]] = {}

    def scores(c: float, features: np.ndarray) -> np.ndarray:
        if c not in fitted:
            fitted[c] = _fit_several(train, c) if multi_label else _fit_one(train, c)
        return fitted[c](features)

    return _choose("C", LINEAR_CANDIDATES, scores, valid, test, multi_label)


PROBES: dict[str, Callable[..., Result]] = {"knn": knn_probe, "linear": linear_probe}


def _choose(
    setting: str,
    candidates: Sequence[float],
    scores: Callable[..., np.ndarray],
    valid: Split,
    test: Split,
    multi_label: bool,
) -> Result:
    metric = mean_average_precision if multi_label else accuracy
    tried = {c: metric(scores(c, valid.features), valid.targets) for c in candidates}
    best = max(tried, key=lambda c: tried[c])  # the first, hence smallest, of equals
    return Result(
        score=metric(scores(best, test.features), test.targets),
        setting=setting,
        value=best,
        valid_score=tried[best],
        tried={f"{c:g}": score for c, score in tried.items()},
    )


def _fit_one(train: Split, c: float) -> Callable[[np.ndarray], np.ndarray]:
    classes = train.targets.shape[1]
    labels = train.targets.argmax(axis=1)
    seen = np.unique(labels)
    if len(seen) == 1:
        return lambda features: np.eye(classes)[np.full(len(features), seen[0])]
    model = _logistic_regression(c, train.features, labels)

    def scores(features: np.ndarray) -> np.ndarray:
        known = np.zeros((len(features), classes))  # a class the training split lacks is never predicted
        known[:, model.classes_] = model.predict_proba(features)
        return known

    return scores


def _fit_several(train: Split, c: float) -> Callable[[np.ndarray], np.ndarray]:
    models = [
        _logistic_regression(c, train.features, target) if 0 < target.sum() < len(target) else None
        for target in train.targets.T
    ]
    constant = train.targets.mean(axis=0)  # of a class with no positive or no negative clip to learn from

    def scores(features: np.ndarray) -> np.ndarray:
        columns = [
            np.full(len(features), constant[c]) if model is None else model.decision_function(features)
            for c, model in enumerate(models)
        ]
        return np.stack(columns, axis=1)

    return scores


def _logistic_regression(c: float, features: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # A weakly regularised fit of separable data never converges; validation decides whether it was worth anything.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(features, labels)


def _standardised(train: Split, *others: Split) -> tuple[Split, ...]:
    try:
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(EXTRA) from error
    scaler = StandardScaler().fit(train.features)
    return tuple(Split(scaler.transform(split.features), split.targets) for split in (train, *others))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
