"""Embeddings in two dimensions."""

from __future__ import annotations

import numpy as np
import pytest

from cat.figures.embeddings import nearest_neighbour_agreement, project, write_projection

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def embeddings(clips: int, classes: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    rng = np.random.default_rng(0)
    centres, label = 5 * rng.normal(size=(classes, 16)), np.arange(clips) % classes
    return centres[label] + rng.normal(size=(clips, 16)), [(f"class {c}",) for c in label]


def test_projection_keeps_clusters_apart():
    rows, labels = embeddings(60, 6)
    points, method = project(rows)
    assert method == "t-SNE"
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(60)
    assert np.mean([labels[i] == labels[j] for i, j in enumerate(distance.argmin(axis=1))]) > 0.85
    few, method = project(rows[:5])
    assert (few.shape, method) == ((5, 2), "PCA")
    with pytest.raises(ValueError, match="at least two"):
        project(rows[:1])


def test_nearest_neighbour_agreement_by_hand():
    rows = np.array([[1.0, 0], [0.9, 0.1], [-1, 0.2], [-1, 0]])
    assert nearest_neighbour_agreement(rows, [("a",), ("a", "b"), ("b",), ("c",)]) == 0.5


def test_projection_picture(is_picture, tmp_path):
    rows, labels = embeddings(48, 12)
    labels[3] = ()  # a clip without a label must not be in the way
    path = write_projection(tmp_path / "new" / "p.png", {"trained": (rows, labels), "twin": (rows[:20], labels[:20])})
    assert is_picture(path)
