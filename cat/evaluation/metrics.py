"""Scores of predictions against labels.

Shapes: n clips, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
