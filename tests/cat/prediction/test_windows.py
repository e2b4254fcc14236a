"""Windows over long audio: every row is heard once, whatever pieces the audio comes in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat.data import FeatureConfig
from cat.prediction import Plan, Windower
from cat.prediction.classifier import as_windows

FEATURES = FeatureConfig(sample_rate=1000)  # frames of 25 samples every 10, rows of 160
ROW = 160


def plan(rows: int = 6, hop: int = 3, lookahead: int = 1, shifts: int = 1) -> Plan:
    return Plan(FEATURES, 16, rows, hop, lookahead, shifts)


plans = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.sampled_from([1, 2, 4])).filter(
    lambda numbers: numbers[1] + numbers[2] <= numbers[0]
)


def heard(windows, plan: Plan) -> np.ndarray:
    """Of each row, the first sample that it was heard in, if a window gives that as its answer."""
    rows = []
    for window in windows:
        answer = np.full((len(window.waves), plan.rows, 1), -1.0)
        for shift, wave in enumerate(window.waves):
            count = plan.rows_in(len(wave))
            answer[shift, :count, 0] = wave[: count * ROW : ROW]
        rows.append(window.taken(answer))
    return np.concatenate(rows)[:, 0]


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(25, 4000), st.data())
def test_every_row_is_heard_once_whatever_the_pieces(numbers, samples, data):
    one = plan(*numbers)
    wave = np.arange(samples, dtype=np.float32)
    whole = list(as_windows([wave], one))
    np.testing.assert_array_equal(heard(whole, one), np.arange(one.total(samples)) * (ROW // one.shifts))
    assert all(len(wave) <= one.samples for window in whole for wave in window.waves)

    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=8)))
    pieces = list(as_windows(np.split(wave, cuts), one))
    assert [(w.start, w.begin, w.end) for w in pieces] == [(w.start, w.begin, w.end) for w in whole]
    for one_window, other in zip(pieces, whole, strict=True):
        assert all(map(np.array_equal, one_window.waves, other.waves))


@settings(max_examples=50, deadline=None)
@given(plans, st.integers(25, 4000))
def test_rows_are_heard_with_what_comes_behind_them(numbers, samples):
    """As far as there is anything: no row is nearer to its window's end than the lookahead."""
    one = plan(*numbers)
    for window in as_windows([np.zeros(samples, np.float32)], one):
        last = window.start * one.shifts + one.rows * one.shifts
        assert window.end <= last - one.lookahead * one.shifts or window.end == one.total(samples)


@pytest.mark.parametrize("shifts", [1, 4])
def test_rows_begin_one_after_the_other_inside_the_file(shifts):
    one = plan(shifts=shifts)
    for samples in range(25, 1500):
        times = [one.time(row) for row in range(one.total(samples))]
        assert times[0] == 0
        assert times == sorted(set(times))
        assert times[-1] < samples / one.rate


def test_what_is_held_does_not_grow():
    windower = Windower(plan())
    held = windower._held
    for _ in range(2000):
        for _ in windower.feed(np.zeros(997, np.float32)):
            pass
    assert windower._held is held
    assert len(held) < 4 * windower.plan.samples


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((6, 4, 3), "windows of 0.96 s every 0.64 s with 0.48 s of lookahead"),
        ((6, 0, 3), "expected hop and lookahead within the window"),
        ((6, 3, 1, 7), "cannot be divided by 7"),
    ],
)
def test_plans_that_cannot_be(numbers, message):
    with pytest.raises(ValueError, match=message):
        plan(*numbers)
