"""Names in pictures."""

from __future__ import annotations

import numpy as np
import pytest

from cat import figures

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")


@pytest.mark.parametrize("name", ["caf\udce9.wav", "\ud800", "$x^", "_silence_", "a\nb", "\x00", "🐕"])
def test_names_of_any_text_can_be_shown(is_picture, tmp_path, name):
    rows = [{"step": t, "loss": 1.0, "pred_std": 1.0, "target_std": 1.0} for t in range(3)]
    path = figures.write_loss_curves(tmp_path / "loss.png", {name: rows, "other": rows})
    assert is_picture(path)
    spec, visible = np.zeros((32, 32), np.float32), np.array([[0, 1]])
    assert is_picture(figures.write_patches(tmp_path / "patches.png", spec, visible, patch_size=16, title=name))
    embeddings = np.random.default_rng(0).standard_normal((8, 4))
    drawn = {name: (embeddings, [(name,), ("other",)] * 4)}
    assert is_picture(figures.write_projection(tmp_path / "projection.png", drawn))
