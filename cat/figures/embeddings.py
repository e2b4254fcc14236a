"""Embeddings in two dimensions.

Shapes: n clips, d embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cat.figures.canvas import COLOURS, EXTRA, MARKERS, figure, legend_below, save, text_of
from cat.scaling import standardising, whitening


def write_projection(
    path: Path, embeddings: Mapping[str, tuple[np.ndarray, Sequence[Sequence[str]]]], *, seed: int = 0
) -> Path:
    """Embeddings in two dimensions, a panel an encoder, coloured by label.

    `embeddings` maps a panel's title to ((n, d) array, the n clips' labels); of several labels the first is shown.
    Whitened PCA to at most 50 dimensions, then t-SNE; below ten clips PCA alone. The title says how many clips have a
    nearest neighbour (cosine, before t-SNE) that shares a label: distances in a t-SNE picture are not to be measured.
    """
    classes = sorted({labels[0] for _, every in embeddings.values() for labels in every if labels})
    drawing, axes = figure(5.2 * len(embeddings), 5.4, columns=len(embeddings), squeeze=False)
    for axis, (name, (rows, labels)) in zip(axes[0], embeddings.items(), strict=True):
        points, method = project(rows, seed)
        first = np.array([clip[0] if clip else "" for clip in labels])
        for c, label in enumerate(classes):
            mine = first == label
            axis.scatter(
                *points[mine].T,
                s=30,
                color=COLOURS[c % len(COLOURS)],
                marker=MARKERS[(c + c // len(COLOURS)) % len(MARKERS)],  # twenty classes and more stay apart
                label=text_of(label.replace("_", " ")),
                linewidths=0.4,
                edgecolors="white",
            )
        agreement = nearest_neighbour_agreement(whitened(rows), labels)
        axis.set_title(f"{text_of(name)}\n{100 * agreement:.0f} % of nearest neighbours share the label", fontsize=10)
        axis.set_xlabel(f"{method} 1 (no unit)")
        axis.set_ylabel(f"{method} 2 (no unit)")
        axis.set_xticks([])
        axis.set_yticks([])
    legend_below(drawing, axes[0, 0])
    return save(drawing, path)


def project(rows: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """(n, d) -> ((n, 2), name of the method), from `whitened` features."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(EXTRA) from error
    if len(rows) < 2:
        raise ValueError(f"a projection needs at least two embeddings, got {len(rows)}.")
    reduced = whitened(rows)
    if len(rows) < 10:
        return reduced[:, :2], "PCA"
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced), "t-SNE"


def whitened(rows: np.ndarray, dimensions: int = 50) -> np.ndarray:
    """The leading principal components of the standardised columns, each of deviation 1: (n, at most `dimensions`).

    Without it one direction that every clip of an encoder shares, loudness say, stretches the picture to a line.
    """
    scaled = standardising(rows)(rows)
    return whitening(scaled, dimensions)(scaled)


def nearest_neighbour_agreement(rows: np.ndarray, labels: Sequence[Sequence[str]]) -> float:
    """Share of clips whose nearest other clip, by cosine of the rows, has a label in common."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    sets = [set(clip) for clip in labels]
    return float(np.mean([bool(sets[i] & sets[j]) for i, j in enumerate(similarity.argmax(axis=1))]))
