"""What each layer knows."""

from __future__ import annotations

import pytest

from cat.figures.layers import write_layers

pytest.importorskip("matplotlib")

GATES = {"trained": {0: 0.1, 1: 0.9}, "_twin $x$": {0: 0.5, 1: 0.5}}
SCORES = {"linear": {"trained": {0: 0.3, 1: 0.6}, "_twin $x$": {0: 0.2, 1: 0.1}}, "kNN": {"trained": {1: 0.5}}}


@pytest.mark.parametrize(("scores", "gates"), [(SCORES, GATES), (SCORES, {}), ({}, GATES)])
def test_picture_of_what_there_is(scores, gates, is_picture, tmp_path):
    levels = {"linear": {"chance": 0.1, "log-mel": 0.2}}
    path = write_layers(tmp_path / "figures" / "layers.png", scores, gates, metric="accuracy", levels=levels)
    assert is_picture(path)
