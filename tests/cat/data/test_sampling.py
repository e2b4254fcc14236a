"""The order of clips: a pure function of (seed, epoch), with weights and without."""

import time

import numpy as np
import pytest

from cat.data.randomness import Purpose, generator
from cat.data.sampling import Order, boundaries


def test_without_weights_an_epoch_is_the_permutation_that_it_always_was():
    order = Order(50, seed=3)
    for epoch in (0, 1, 7):
        assert order.epoch(epoch).tolist() == generator(3, Purpose.PERMUTATION, epoch).permutation(50).tolist()
    assert (Purpose.PERMUTATION, Purpose.WAVEFORM) == (1, 2)  # of runs that go on from before there was a third


def test_a_part_of_an_epoch():
    order = Order(50, seed=3, epoch_clips=20)
    assert order.epoch(2).tolist() == Order(50, seed=3).epoch(2)[:20].tolist()
    assert [clip for _, clip in order.following(45, 100)][:3] == order.epoch(2)[5:8].tolist()


def test_what_follows_goes_round_the_epoch_once():
    order = Order(5, seed=0)
    places = list(order.following(8, 100))
    assert [epoch for epoch, _ in places] == [1] * 5
    assert [clip for _, clip in places] == np.roll(order.epoch(1), -3).tolist()
    assert len(list(order.following(8, 2))) == 2


def test_weighted_epochs_have_no_clip_twice_and_none_without_weight():
    weights = np.arange(10.0)
    order = Order(10, seed=0, weights=weights)
    assert len(order) == 9
    drawn = [order.epoch(epoch).tolist() for epoch in range(20)]
    assert all(sorted(epoch) == list(range(1, 10)) for epoch in drawn)
    assert len({tuple(epoch) for epoch in drawn}) == 20
    other = Order(10, seed=0, weights=weights)
    assert [other.epoch(epoch).tolist() for epoch in reversed(range(20))] == drawn[::-1]
    assert Order(10, seed=1, weights=weights).epoch(0).tolist() != drawn[0]


def test_clips_are_drawn_by_weight_without_replacement():
    """Of weights 1, 2, 5 two are drawn: first i with w_i / 8, then j with w_j / (8 - w_i)."""
    weights = np.array([1.0, 2.0, 5.0])
    order = Order(3, seed=0, epoch_clips=2, weights=weights)
    epochs = 4000
    drawn = np.bincount(np.concatenate([order.epoch(epoch) for epoch in range(epochs)]), minlength=3) / epochs
    left_out = [
        weights[i] / 8 * weights[j] / (8 - weights[i]) + weights[j] / 8 * weights[i] / (8 - weights[j])
        for i, j in ((1, 2), (0, 2), (0, 1))
    ]
    np.testing.assert_allclose(1 - drawn, left_out, atol=0.03)


def test_heavy_clips_are_not_first():
    weights = np.where(np.arange(100) < 50, 1000.0, 1.0)
    order = Order(100, seed=0, weights=weights)
    first_half = np.mean([(order.epoch(epoch)[:50] < 50).mean() for epoch in range(50)])
    assert first_half == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epoch_clips": 11}, r"data\.epoch_clips is 11, but there are 10 clips"),
        ({"epoch_clips": 10, "weights": np.arange(10.0)}, "there are 9 clips with a weight above 0"),
        ({"epoch_clips": 0}, "data.epoch_clips is 0"),
    ],
)
def test_more_clips_than_there_are(options, words):
    with pytest.raises(ValueError, match=words):
        Order(10, seed=0, **options)


def test_two_million_weighted_clips_take_no_time():
    weights = np.random.default_rng(0).random(2_000_000) + 0.01
    order = Order(2_000_000, seed=0, epoch_clips=200_000, weights=weights)
    begun = time.process_time()
    assert len(np.unique(order.epoch(0))) == 200_000
    assert time.process_time() - begun < 5  # measured: 0.13


SHARDS = np.array([0, 30, 31, 31, 60, 100])  # one is empty


@pytest.mark.parametrize("options", [{}, {"epoch_clips": 37}, {"epoch_clips": 37, "weights": np.arange(100.0)}])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_by_shard_an_epoch_has_the_clips_that_it_has(options, window):
    order = Order(100, seed=3, shards=SHARDS, window=window, **options)
    length = options.get("epoch_clips", 100)
    epochs = [order.epoch(epoch).tolist() for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for number, epoch in enumerate(epochs):
        assert len(set(epoch)) == length
        # Whatever is asked for first, and by whom.
        other = Order(100, seed=3, shards=SHARDS, window=window, **options)
        assert [clip for _, clip in other.following(number * length + 20, length)] == epoch[20:] + epoch[:20]
        if "weights" in options:
            assert sorted(epoch) == sorted(Order(100, seed=3, **options).epoch(number).tolist())


def test_only_some_shards_are_read_from_at_a_time():
    """Within a window all clips come in any order, and windows follow each other."""
    shards = np.arange(0, 1001, 10)
    order = Order(1000, seed=0, shards=shards, window=4)
    seen = np.array([order.epoch(epoch) // 10 for epoch in range(20)]).reshape(20, 25, 40)
    for epoch in seen:
        windows = [set(window.tolist()) for window in epoch]
        assert all(len(window) == 4 for window in windows)
        assert len(set.union(*windows)) == 100
    assert len({tuple(window[:8].tolist()) for epoch in seen for window in epoch}) == 500
    first = np.bincount(seen[:, 0, 0], minlength=100)
    assert first.max() < 4  # any shard may be the first
    mixed = np.mean(seen[:, :, :-1] == seen[:, :, 1:])
    assert mixed == pytest.approx(9 / 39, abs=0.01)  # as often as of two clips out of the 40


def test_where_shards_begin():
    assert boundaries(np.array([4, 4, 4, 2, 2, 4])).tolist() == [0, 3, 5, 6]
    assert boundaries(np.zeros(3, dtype=np.uint32)).tolist() == [0, 3]


def test_an_order_by_shard_takes_no_array_of_all_clips():
    order = Order(10**9, seed=0, shards=np.arange(0, 10**9 + 1, 10**6), window=2)
    assert len({clip for _, clip in order.following(10**9 - 1000, 1000)}) == 1000
    assert sum(window.nbytes for window in order._places._windows.values()) == 16 * 10**6
