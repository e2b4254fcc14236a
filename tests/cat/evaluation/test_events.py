"""Scores of sound events: known answers, and what sed_eval leaves to its caller."""

from __future__ import annotations

import numpy as np
import pytest

from cat.data import FeatureConfig
from cat.evaluation.events import HeardClips, choose_settings, evaluate_events, score_events
from cat.prediction import Event, EventSettings, Plan
from cat.prediction.files import FileResult

pytestmark = pytest.mark.usefixtures("sed_eval")

CLASSES = ("dog", "cat", "bird")
PLAN = Plan(FeatureConfig(), 16, 8, 4, 2)  # rows of 0.16 s


def event(label: str, onset: float, offset: float) -> Event:
    return Event(label, onset, offset, 0.9, 1)


def test_collars_are_those_of_dcase():
    truth = [[(1.0, 2.0, "dog"), (5.0, 9.0, "dog")], [(0.0, 1.0, "cat")]]
    found = [[event("dog", 1.19, 2.19), event("dog", 4.9, 9.79)], [event("cat", 0.3, 1.0)]]
    scores = score_events(found, truth, [10.0, 2.0], CLASSES)
    dog, cat, bird = scores.classes
    assert (dog.labelled, dog.found, dog.f1) == (2, 2, pytest.approx(1))  # the long one's end by a fifth of it
    assert (cat.labelled, cat.found, cat.f1, cat.segment_f1) == (1, 1, 0, pytest.approx(1))
    assert (bird.f1, bird.segment_f1, scores.left_out) == (None, None, ("bird",))
    assert scores.main == pytest.approx(0.5)
    assert scores.metrics["event F1 (all events)"] == pytest.approx(2 / 3)
    assert scores.metrics["event error rate"] == pytest.approx(2 / 3)
    assert scores.clips == 2


def test_a_class_that_is_never_found_counts_as_zero():
    """sed_eval alone gives NaN, and means over the others."""
    scores = score_events([[event("dog", 0, 1)]], [[(0, 1, "dog"), (2, 3, "cat")]], [4.0], CLASSES)
    assert [row.f1 for row in scores.classes] == [pytest.approx(1), 0, None]
    assert scores.metrics["event F1"] == pytest.approx(0.5)
    assert scores.metrics["segment F1"] == pytest.approx(0.5)
    nothing = score_events([[]], [[(0, 1, "dog")]], [4.0], CLASSES)
    assert nothing.main == nothing.metrics["segment F1"] == 0


def test_one_event_is_found_once():
    twice = [event("dog", 1.0, 2.0), event("dog", 1.05, 2.05)]
    (dog, *_) = score_events([twice], [[(1.0, 2.0, "dog")]], [4.0], CLASSES).classes
    assert (dog.precision, dog.recall) == (pytest.approx(0.5), pytest.approx(1))


def heard() -> HeardClips:
    """Two clips of 20 rows. The dog is quiet (0.3) and the cat flickers; the bird never sings."""
    rows = np.full((2, 20, 3), 0.02, np.float32)
    rows[0, 5:10, 0] = 0.35
    rows[0, 15, 0] = 0.12
    rows[1, 2:12, 1] = 0.8
    rows[1, [4, 8], 1] = 0.1
    rows[1, 16, 1] = 0.8
    truth = [[(0.8, 1.6, "dog")], [(0.32, 1.92, "cat")]]
    clips = [FileResult(f"{i}.wav", 3.2, rows=rows[i]) for i in range(2)]
    return HeardClips(CLASSES, PLAN, clips, truth, [])


def test_settings_are_chosen_for_each_class():
    chosen = choose_settings(heard())
    assert chosen["dog"] == EventSettings(0.175)  # half of the highest
    assert chosen["cat"] == EventSettings(0.4, None, 3)  # the filter closes the holes and takes the one row away
    assert chosen["bird"] == EventSettings(0.5)
    scores = evaluate_events(heard(), chosen)
    assert scores.main == pytest.approx(1)
    assert evaluate_events(heard(), dict.fromkeys(CLASSES, EventSettings())).main == 0
    # Of rows, whatever the settings: one row of the cat's holes is below one of the rest.
    assert (
        scores.metrics["frame mAP"]
        == evaluate_events(heard(), dict.fromkeys(CLASSES, EventSettings())).metrics["frame mAP"]
    )
    assert scores.classes[0].frame_ap == pytest.approx(1)
    assert 0.8 < scores.classes[1].frame_ap < 1
    assert scores.classes[2].frame_ap is None
