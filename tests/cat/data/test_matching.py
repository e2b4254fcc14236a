"""Which entries of one list are in another."""

import numpy as np

from cat.data.matching import last_places


def test_of_what_occurs_several_times_the_last_is_found():
    random = np.random.default_rng(0)
    others = [b"%d" % number for number in random.integers(0, 200, 300)]
    wanted = [b"%d" % number for number in random.integers(0, 250, 300)]
    places = dict(zip(others, range(300), strict=True))
    assert last_places(wanted, others).tolist() == [places.get(text, -1) for text in wanted]
    assert last_places([], others).tolist() == []
    assert last_places(wanted[:2], []).tolist() == [-1, -1]
