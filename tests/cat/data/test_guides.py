"""Which rows of embeddings another manifest's clips have."""

from cat.data import Clip, Manifest
from cat.data.guides import _places
from cat.data.matching import last_places


def test_rows_are_found_by_where_the_clips_lie(tmp_path):
    """By links to folders, by absolute paths, and of a clip that occurs twice the last."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = ["real/a.wav", "a.wav", "real/b.wav", "real/\udce9.wav", "link/a.wav", str(tmp_path / "c.wav")]
    linked = Manifest([Clip(name, embedding=row) for row, name in enumerate(names)], tmp_path)
    wanted = ["../link/b.wav", "a.wav", "../a.wav", "../c.wav", "../real/a.wav", "../d.wav", "\udce9.wav"]
    places = _places(Manifest([Clip(name) for name in wanted], tmp_path / "real"))
    assert last_places(places, _places(linked)).tolist() == [2, 4, 1, 5, 4, -1, 3]
