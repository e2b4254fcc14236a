"""Which rows of embeddings another manifest's clips have."""

import numpy as np

from cat.data import Clip, Manifest
from cat.data.guides import _places, _rows_at


def test_rows_are_found_by_where_the_clips_lie(tmp_path):
    """By links to folders, by absolute paths, and of a clip that occurs twice the last."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = ["real/a.wav", "a.wav", "real/b.wav", "real/\udce9.wav", "link/a.wav", str(tmp_path / "c.wav")]
    linked = Manifest([Clip(name, embedding=row) for row, name in enumerate(names)], tmp_path)
    wanted = ["../link/b.wav", "a.wav", "../a.wav", "../c.wav", "../real/a.wav", "../d.wav", "\udce9.wav"]
    places = _places(Manifest([Clip(name) for name in wanted], tmp_path / "real"))
    assert _rows_at(places, _places(linked), linked.rows).tolist() == [2, 4, 1, 5, 4, -1, 3]


def test_rows_of_many_clips():
    random = np.random.default_rng(0)
    places = random.integers(0, 200, 300).astype("S16")
    wanted = random.integers(0, 250, 300).astype("S16")
    rows = dict(zip(places.tolist(), range(300), strict=True))
    assert _rows_at(wanted, places, np.arange(300)).tolist() == [rows.get(place, -1) for place in wanted.tolist()]
