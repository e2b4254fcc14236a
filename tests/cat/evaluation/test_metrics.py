"""Metrics: values worked out by hand and by the definitions, and what is undefined is left out and named."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("sklearn")

from cat.evaluation.metrics import lwlrap, main_metric, mean_average_precision, scores_of

CLASSES = ("a", "b", "c")
# Four clips, three classes. Highest scores: a, a, b, c; true: a, b, b, c.
SCORES = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])


def drawn(n: int = 60, classes: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and one to three labels a clip."""
    random = np.random.default_rng(seed)
    targets = random.random((n, classes)) < 0.2
    targets[np.arange(n), random.integers(classes, size=n)] = True
    return (random.normal(size=(n, classes)) + targets).round(1), targets


def test_one_label_a_clip_by_hand():
    found = scores_of(SCORES, TARGETS, "single-label", CLASSES)
    assert (found.main, found.metrics["accuracy"]) == (0.75, 0.75)
    assert found.metrics["balanced accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert "top-5" not in found.metrics, "of three classes any five are all"
    np.testing.assert_array_equal(found.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    a, b, c = found.classes
    assert (a.precision, a.recall, a.predicted, a.clips) == (0.5, 1.0, 2, 1)
    assert (b.precision, b.recall, b.predicted, b.clips) == (1.0, 0.5, 1, 2)
    # b's scores 0.8 (true), 0.3 (true), then 0.2 twice: perfect. a: 0.7 (true) is the first of all.
    assert (a.ap, b.ap, c.ap, b.auc) == (1.0, 1.0, 1.0, 1.0)
    assert b.d_prime == math.inf
    # The rank of the true label in each clip: 1, 2, 1, 1.
    assert found.metrics["lwlrap"] == pytest.approx((1 + 1 / 2 + 1 + 1) / 4)
    assert next(iter(found.metrics)) == main_metric("single-label")


def test_several_labels_by_hand():
    scores = np.array([[4.0, 0.0], [3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    targets = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    found = scores_of(scores, targets, "multi-label", ("a", "b"))
    a, b = found.classes
    assert a.ap == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert b.ap == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (a.auc, b.auc) == (3 / 4, 2 / 4)  # pairs of a positive and a negative clip in the right order
    assert a.d_prime == pytest.approx(math.sqrt(2) * 0.6744897501960817)  # the normal distribution's upper quartile
    assert found.metrics["d'"] == pytest.approx(math.sqrt(2) * 0.31863936396437514)  # of the mean AUC, 0.625
    assert (found.main, found.metrics["mAP"]) == ((a.ap + b.ap) / 2,) * 2
    # Three labels in clips that have one: clip 0 a, rank 1; clip 1 b, rank 2; clip 2 a and b, tied: 2 of 2 above.
    assert found.metrics["lwlrap"] == pytest.approx((1 + 1 / 2 + 1 + 1) / 4)
    assert found.confusion is None
    assert "accuracy" not in found.metrics


def test_lwlrap_by_its_definition():
    scores, targets = drawn()
    precisions = [
        np.sum(targets[i] & (scores[i] >= scores[i, c])) / np.sum(scores[i] >= scores[i, c])
        for i, c in np.argwhere(targets)
    ]
    assert lwlrap(scores, targets) == pytest.approx(np.mean(precisions), abs=1e-12)


def test_average_precision_and_auc_by_their_definitions():
    scores, targets = drawn()
    for c, found in enumerate(scores_of(scores, targets, "multi-label", range(8)).classes):
        s, t = scores[:, c], targets[:, c]
        pairs = np.sign(s[t][:, None] - s[~t][None])
        assert found.auc == pytest.approx((pairs.mean() + 1) / 2, abs=1e-12)
        thresholds = np.unique(s)[::-1]
        recall = np.array([0.0, *((t & (s >= x)).sum() / t.sum() for x in thresholds)])
        precision = np.array([t[s >= x].mean() for x in thresholds])
        assert found.ap == pytest.approx(np.sum(np.diff(recall) * precision), abs=1e-12)


def test_top_five_of_six():
    scores = np.array([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    targets = np.eye(6)[[4, 5]]
    assert scores_of(scores, targets, "single-label", "abcdef").metrics["top-5"] == 0.5


@pytest.mark.parametrize("task", ["single-label", "multi-label", "events"])
def test_the_order_of_clips_and_classes_and_the_scale_change_nothing(task):
    scores, targets = drawn()
    if task == "single-label":
        targets = np.eye(8, dtype=bool)[targets.argmax(axis=1)]
        scores += np.arange(8) * 1e-3  # no ties within a clip: of equal scores the first class counts as the highest
    names = [f"class {c}" for c in range(8)]
    before = scores_of(scores, targets, task, names)
    clips, columns = np.random.default_rng(1).permutation(60), np.random.default_rng(2).permutation(8)
    after = scores_of(
        np.exp(0.1 * scores[clips][:, columns]), targets[clips][:, columns], task, [names[c] for c in columns]
    )
    assert after.metrics == pytest.approx(before.metrics, abs=1e-12)
    assert {c.label: c for c in after.classes}.keys() == {c.label: c for c in before.classes}.keys()
    for one in before.classes:
        assert next(c for c in after.classes if c.label == one.label).ap == pytest.approx(one.ap, abs=1e-12)
    if before.confusion is not None:
        np.testing.assert_array_equal(after.confusion, before.confusion[np.ix_(columns, columns)])


def test_classes_that_the_clips_do_not_define_are_left_out_and_named():
    targets = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1]])
    scores = np.array([[0.1, 0.9, 0.8, 0.2], [0.2, 0.8, 0.9, 0.1], [0.3, 0.7, 0.7, 0.3]])
    found = scores_of(scores, targets, "multi-label", ("always", "never", "some", "one"))
    assert found.left_out == {"mAP": ("never",), "AUC": ("always", "never")}
    always, never, some, one = found.classes
    assert (always.ap, always.auc, always.d_prime) == (1.0, None, None)
    assert (never.ap, never.auc, never.clips) == (None, None, 0)
    assert found.metrics["mAP"] == pytest.approx((1 + some.ap + one.ap) / 3)
    assert found.metrics["AUC"] == pytest.approx((0.0 + 1.0) / 2)
    single = scores_of(SCORES[:3], TARGETS[:3], "single-label", CLASSES)
    assert single.left_out["balanced accuracy"] == ("c",)
    assert single.metrics["balanced accuracy"] == pytest.approx((1 + 0.5) / 2)


def test_clips_of_one_class_only():
    found = scores_of(SCORES[1:3], TARGETS[1:3], "single-label", CLASSES)
    assert found.metrics == {"accuracy": 0.5, "balanced accuracy": 0.5, "mAP": 1.0, "lwlrap": 0.75}
    assert found.left_out["AUC"] == CLASSES


def test_the_same_scores_everywhere_are_chance():
    """What a silent input, or a model that has collapsed, gives."""
    found = scores_of(np.zeros((4, 3)), TARGETS, "multi-label", CLASSES)
    assert found.metrics == pytest.approx({"mAP": 1 / 3, "AUC": 0.5, "d'": 0.0, "lwlrap": 1 / 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.where(SCORES == 0.8, np.nan, SCORES)}, "1 of 4 clips have .* the first: clip 2, class 'b', nan"),
        ({"scores": np.full((4, 3), np.inf)}, "4 of 4 clips have scores that are not finite"),
        ({"scores": SCORES[:3]}, r"scores are \(3, 3\) and targets \(4, 3\)"),
        ({"classes": ("a", "b")}, "expected both to be .clips, 2 classes"),
        ({"targets": TARGETS * 0.5}, "targets hold values between 0 and 1"),
        ({"targets": TARGETS * 0}, "clip 0 has 0 labels; the task is single-label"),
        ({"targets": TARGETS * 0, "task": "multi-label"}, "not one of the clips has a label"),
        ({"scores": SCORES[:0], "targets": TARGETS[:0]}, "there is no clip to score"),
        ({"task": "regression"}, "task is 'regression'; expected one of single-label, multi-label, events"),
    ],
)
def test_what_cannot_be_scored(change, message):
    with pytest.raises(ValueError, match=message):
        scores_of(**{"scores": SCORES, "targets": TARGETS, "task": "single-label", "classes": CLASSES, **change})


def test_the_mean_of_no_class():
    with pytest.raises(ValueError, match="no class has a positive clip"):
        mean_average_precision(SCORES, np.zeros((4, 3), bool))
