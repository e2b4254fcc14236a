"""Intervals: every draw's numbers are scikit-learn's, and the intervals hold the truth as often as they say."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from cat.evaluation.intervals import _draws, _Statistics, bootstrap
from cat.evaluation.metrics import scores_of

metrics = pytest.importorskip("sklearn.metrics")

NAMES = [f"class {c}" for c in range(8)]


def drawn(task: str, n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties; class 6 has one clip, which most draws lose or have several times, and class 7 none."""
    random = np.random.default_rng(seed)
    targets = np.eye(8, dtype=bool)[random.integers(6, size=n)]
    if task != "single-label":
        targets[:, :6] |= random.random((n, 6)) < 0.2
    targets[0] = np.eye(8, dtype=bool)[6]
    return (random.normal(size=(n, 8)) + targets).round(1), targets


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_a_draw_is_judged_as_scikit_learn_judges_it(task):
    scores, targets = drawn(task)
    counts_nR = next(_draws(40, 5, seed=3))
    found, ap_CR = _Statistics(scores, targets, task)(counts_nR)
    for r, counts in enumerate(counts_nR.T):
        clips = np.repeat(np.arange(40), counts)  # the draw itself
        whole = scores_of(scores[clips], targets[clips], task, NAMES)
        assert {name: values[r] for name, values in found.items()} == pytest.approx(whole.metrics, abs=1e-12)
        expected = [math.nan if one.ap is None else one.ap for one in whole.classes]
        np.testing.assert_allclose(ap_CR[:, r], expected, atol=1e-12)


def test_each_class_by_scikit_learns_weights():
    scores, targets = drawn("multi-label", n=300)
    counts = next(_draws(300, 1, seed=0))
    _, ap_CR = _Statistics(scores, targets, "multi-label")(counts)
    for c in range(6):
        expected = metrics.average_precision_score(targets[:, c], scores[:, c], sample_weight=counts[:, 0])
        assert ap_CR[c, 0] == pytest.approx(expected, abs=1e-12)


def test_the_intervals_lie_around_the_scores_and_repeat_with_their_seed():
    scores, targets = drawn("single-label", n=200)
    whole = scores_of(scores, targets, "single-label", NAMES)
    one = bootstrap(scores, targets, "single-label", NAMES, resamples=200, seed=1)
    assert one == bootstrap(scores, targets, "single-label", NAMES, resamples=200, seed=1)
    assert one.metrics != bootstrap(scores, targets, "single-label", NAMES, resamples=200, seed=2).metrics
    assert one.metrics.keys() == whole.metrics.keys()
    for name, (low, high) in one.metrics.items():
        assert low < whole.metrics[name] < high, name
    assert [interval is None for interval in one.classes] == [False] * 7 + [True]
    assert (one.resamples, one.seed, one.level) == (200, 1, 0.95)


def test_more_clips_narrow_the_interval_as_their_root():
    widths = []
    for n in (100, 1600):
        scores, targets = drawn("single-label", n=n)
        low, high = bootstrap(scores, targets, "single-label", NAMES, resamples=300).metrics["accuracy"]
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("truth", [0.3, 0.7])
def test_accuracies_interval_holds_the_truth_as_often_as_said(truth):
    """120 sets of 60 clips, each right with the same probability: 95 % of the intervals hold it, give or take what 120
    sets (2 %) and the percentile method at 60 clips (2 %) deviate."""
    random = np.random.default_rng(0)
    held = 0
    targets = np.eye(2, dtype=bool)[[0] * 60]
    for seed in range(120):
        right = random.random(60) < truth
        scores = np.stack([right, ~right], axis=1).astype(float)
        low, high = bootstrap(scores, targets, "single-label", NAMES[:2], resamples=300, seed=seed).metrics["accuracy"]
        held += low <= truth <= high
    assert 0.89 <= held / 120 <= 0.99


def test_few_clips():
    """One clip says nothing of how clips differ; of two, and a class with a single clip, what is defined is said."""
    two, targets = np.array([[0.9, 0.1], [0.2, 0.8]]), np.eye(2)
    assert bootstrap(two[:1], targets[:1], "single-label", NAMES[:2]).metrics == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bootstrap(two, targets, "single-label", NAMES[:2], resamples=50)
    assert found.metrics["accuracy"] == (1.0, 1.0)
    assert found.metrics["d'"] == (math.inf, math.inf)
    assert found.classes == ((1.0, 1.0), (1.0, 1.0))
    lonely = bootstrap(two, targets[[0, 0]], "single-label", NAMES[:2], resamples=50)
    assert "AUC" not in lonely.metrics, "one class only: no draw has a negative clip"
    assert lonely.classes == ((1.0, 1.0), None)


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap(*drawn("multi-label"), "multi-label", NAMES, resamples=0)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap(np.full((3, 2), np.nan), np.eye(2)[[0, 1, 0]], "single-label", NAMES[:2])
