"""Events out of rows of scores: what they are, and that it does not matter how the rows come."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat.data import FeatureConfig
from cat.prediction import EventFinder, EventSettings, Plan, find_events
from cat.prediction.events import ended, home_of_settings, read_settings, settings_of, write_settings

PLAN = Plan(FeatureConfig(), 16, 8, 4, 2)  # rows of 0.16 s
STEP = 0.16
CLASSES = ("a", "b", "c")


def rows(text: str) -> np.ndarray:
    """Tenths: "0900" is a row of 0, one of 0.9 and two of 0."""
    return np.array([int(digit) / 10 for digit in text])[:, None]


def found(text: str, **options) -> list[tuple[int, int, float]]:
    """(first row, end row, score) of the events of one class."""
    events = find_events(rows(text), ("a",), {"a": EventSettings(**options)}, PLAN, len(text) * STEP)
    return [(round(e.onset / STEP), round(e.offset / STEP), e.score) for e in events]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("00990", {}, [(2, 4, 0.9)]),
        ("99009", {}, [(0, 2, 0.9), (4, 5, 0.9)]),
        ("05000", {}, [(1, 2, 0.5)]),  # at the threshold is inside
        ("00000", {}, []),
        ("", {}, []),
        (
            "03973040",
            {"low": 0.3},
            [(1, 5, 0.9)],
        ),  # hysteresis: where 0.5 is reached, down to `low`
        ("0900900", {"median": 3}, []),
        ("0990990", {"median": 3}, [(1, 6, 0.9)]),
        ("9000000", {"median": 3}, [(0, 1, 0.9)]),  # the first row goes on before the file
        ("0900900", {"gap": 0.32}, [(1, 5, 0.9)]),
        ("0900900", {"gap": 0.31}, [(1, 2, 0.9), (4, 5, 0.9)]),
        ("0904009", {"low": 0.4, "gap": 0.16}, [(1, 2, 0.9), (6, 7, 0.9)]),
        ("0904900", {"low": 0.4, "gap": 0.16}, [(1, 5, 0.9)]),
        ("0900990", {"shortest": 0.32}, [(4, 6, 0.9)]),
        ("0909000", {"shortest": 0.48, "gap": 0.16}, [(1, 4, 0.9)]),  # first joined, then measured
    ],
)
def test_events_are_what_the_settings_say(text, options, expected):
    assert found(text, **options) == expected


def test_the_filter_is_as_long_whatever_the_step():
    """Rows of 0.04 s, four to each of those above: three rows of patches still outvote one."""
    fine = dataclasses.replace(PLAN, shifts=4)
    for text, expected in (("0900900", 0), ("0990990", 1)):
        scores = rows(text).repeat(4, axis=0)
        events = find_events(scores, ("a",), {"a": EventSettings(median=3)}, fine, len(text) * STEP)
        assert len(events) == expected


def by_hand(scores_R: np.ndarray, one: EventSettings) -> list[tuple[int, int]]:
    """The same from the whole array: another way to the answer."""
    half = one.median // 2
    padded = np.pad(scores_R, half, mode="edge") if len(scores_R) else scores_R
    smooth = [float(np.median(padded[i : i + one.median])) for i in range(len(scores_R))]
    runs, start = [], None
    for i, score in enumerate([*smooth, -1.0]):
        if score >= one.lowest and start is None:
            start = i
        if score < one.lowest and start is not None:
            if max(smooth[start:i]) >= one.threshold:
                runs.append((start, i))
            start = None
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if joined and (start - joined[-1][1]) * STEP <= one.gap + 1e-9:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return [(start, end) for start, end in joined if (end - start) * STEP >= one.shortest - 1e-9]


options = st.builds(
    lambda threshold, share, median, gap, shortest: EventSettings(
        threshold / 10, threshold * share / 100, median, gap * STEP, shortest * STEP
    ),
    st.integers(1, 9),
    st.sampled_from([50, 100]).map(lambda x: x / 10),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 3),
    st.integers(0, 3),
)
many_rows = st.lists(st.lists(st.integers(0, 10), min_size=3, max_size=3), max_size=40)


@settings(max_examples=150, deadline=None)
@given(many_rows, st.tuples(options, options, options), st.data())
def test_events_do_not_depend_on_the_pieces(values, chosen, data):
    scores_RC = np.array(values, dtype=float).reshape(-1, 3) / 10
    duration = max(len(scores_RC), 1) * STEP
    each = dict(zip(CLASSES, chosen, strict=True))
    whole = EventFinder(CLASSES, each, PLAN)
    said = [*whole.feed(scores_RC), *whole.finish(duration)]

    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores_RC)), max_size=6)))
    pieces = EventFinder(CLASSES, each, PLAN)
    parts = [event for piece in np.split(scores_RC, cuts) for event in pieces.feed(piece)]
    assert parts + pieces.finish(duration) == said

    events = ended(said)
    for c, label in enumerate(CLASSES):
        mine = [event for event in events if event.label == label]
        expected = by_hand(scores_RC[:, c], each[label])
        assert [(round(e.onset / STEP), round(e.offset / STEP)) for e in mine] == expected
        assert all(0 <= e.onset < e.offset <= duration for e in mine)
        assert all(one.offset < two.onset for one, two in itertools.pairwise(mine))
    # Reported once: an onset and, with the same number, an end.
    assert sorted(e.number for e in said if e.offset is None) == list(range(1, len(events) + 1))
    assert sorted(e.number for e in events) == list(range(1, len(events) + 1))


def test_an_onset_is_told_as_soon_as_it_is_certain():
    finder = EventFinder(("a",), {"a": EventSettings(low=0.3, median=3, shortest=0.48)}, PLAN)
    told = {}
    for number, row in enumerate(rows("0003999930000000")):
        for event in finder.feed(row[None]):
            told[number] = event
    # Rows 3 to 8; the filter knows a row with the next one, the third row of three makes it long enough.
    assert [(at, event.onset, event.offset) for at, event in told.items()] == [
        (6, pytest.approx(3 * STEP), None),
        (10, pytest.approx(3 * STEP), pytest.approx(9 * STEP)),
    ]


def test_not_a_number_is_no_event():
    scores = rows("0990990")
    scores[3] = np.nan
    events = find_events(scores, ("a",), {"a": EventSettings()}, PLAN, 7 * STEP)
    assert [(e.onset, e.offset) for e in events] == [
        (pytest.approx(STEP), pytest.approx(3 * STEP)),
        (pytest.approx(4 * STEP), pytest.approx(6 * STEP)),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0}, "expected 0 < low <= threshold <= 1"),
        ({"threshold": 0.4, "low": 0.5}, "low is 0.5"),
        ({"median": 2}, "expected an odd number of rows"),
        ({"gap": -1.0}, "expected seconds"),
        ({"shortest": float("nan")}, "expected seconds"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        EventSettings(**values)


def test_every_class_needs_settings():
    with pytest.raises(ValueError, match="no event settings for b, c"):
        EventFinder(CLASSES, {"a": EventSettings()}, PLAN)


# ---------------------------------------------------------------- on disk


def test_settings_come_back(tmp_path):
    chosen = {"a": EventSettings(0.3, 0.1, 5, 0.2, 0.1), "b": EventSettings()}
    write_settings(tmp_path / "events.json", chosen, {"on": "valid.jsonl"})
    assert read_settings(tmp_path / "events.json", ("a", "b")) == chosen
    with pytest.raises(ValueError, match="no settings for c: it belongs to a model of other classes"):
        read_settings(tmp_path / "events.json", CLASSES)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": "other", "version": 1, "classes": {}}', "cut"],
)
def test_a_file_that_holds_no_settings(tmp_path, content):
    path = tmp_path / "events.json"
    if content == "cut":
        write_settings(path, {"a": EventSettings()}, {})
        values = json.loads(path.read_text())
        values["classes"]["a"]["treshold"] = 0.4
        content = json.dumps(values)
    path.write_text(content)
    with pytest.raises(ValueError, match="has no usable event settings"):
        read_settings(path, ("a",))


def test_the_settings_of_a_run_are_found_from_its_checkpoint(tmp_path):
    model = tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors"
    assert settings_of(model, ("a",)) == ({"a": EventSettings()}, None)
    write_settings(tmp_path / "run" / "events.json", {"a": EventSettings(0.3)}, {})
    assert settings_of(model, ("a",)) == ({"a": EventSettings(0.3)}, tmp_path / "run" / "events.json")
    assert settings_of(tmp_path / "other.safetensors", ("a",)) == ({"a": EventSettings()}, None)
    assert home_of_settings(tmp_path / "other.safetensors") == tmp_path / "events.json"
