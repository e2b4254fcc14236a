"""Figures: what is drawn is what the run saw, and a picture appears whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cat import figures
from cat.config import from_mapping, write_yaml
from cat.data import load_manifest, pretrain_batches
from cat.training.recipe import SECTION_PRESETS, PretrainConfig, load_recipe

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")
Image = pytest.importorskip("PIL.Image")


def is_picture(path: Path, *, wider_than: int = 600) -> bool:
    """A PNG with something in it: many grey values, no leftovers beside it."""
    with Image.open(path) as image:
        colours = image.convert("L").getcolors(256) or []
        return image.width > wider_than and len(colours) > 20 and not list(path.parent.glob("*.tmp*"))


@pytest.fixture
def run_dir(tmp_path):
    """What a pre-training run leaves behind, as far as figures read it."""
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    for i, samples in enumerate((3000, 9000, 20000)):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", 0.1 * rng.normal(size=samples), 16000)
    recipe = {
        "data": {"train": str(tmp_path / "audio"), "batch_size": 2, "num_workers": 0},
        "model": {"preset": "tiny"},
        "features": {"frames": 64},
        "run": {"name": "drawn"},
    }
    config = from_mapping(PretrainConfig, recipe, presets=SECTION_PRESETS)
    run_dir = tmp_path / "drawn"
    run_dir.mkdir()
    write_yaml(config, run_dir / "config.yaml")
    rows = [
        {"kind": "train", "step": s, "loss": 20 / s, "regression": 15 / s, "global": 5 / s, "regularisation": 0.0}
        | {"pred_std": 0.5, "target_std": 0.9}
        for s in range(1, 41)
    ]
    rows[7]["loss"] = None  # a step whose loss was not finite
    rows.insert(5, {"kind": "speed", "step": 5, "clips_per_s": 3.0})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_run_figures(run_dir):
    paths = figures.write_run_figures(run_dir)
    assert [path.name for path in paths] == ["loss.png", "patches.png"]
    assert all(path.parent == run_dir / "figures" and is_picture(path) for path in paths)


def test_agreement_of_runs(tmp_path):
    """Equal steps, a difference of zero, cannot be drawn on its logarithmic axis, and need not be."""
    runs = {
        name: [{"step": t, "loss": 20 / t + gap * (t > 20)} for t in range(1, 41)]
        for name, gap in (("dense", 0.0), ("triton", 1e-6), ("re-seeded", 0.5))
    }
    path = tmp_path / "agreement.png"
    assert is_picture(figures.write_agreement(path, runs, tested="triton", limit=0.005))


def test_run_figures_show_the_clip_and_masks_of_the_run(run_dir, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures, "write_patches", lambda path, spec, visible, **kw: drawn.update(s=spec, v=visible, **kw)
    )
    figures.write_run_figures(run_dir)
    config = load_recipe(run_dir / "config.yaml")
    batch = next(pretrain_batches(config.data, config.features, config.masks, patch_size=16, seed=0, num_steps=1))
    np.testing.assert_array_equal(drawn["s"], batch.spec[0, 0].numpy())
    np.testing.assert_array_equal(drawn["v"], batch.visible[:4].numpy())
    assert drawn["title"] == load_manifest(config.data.train).clips[int(batch.clips[0])].path


@pytest.mark.parametrize("name", ["caf\udce9.wav", "\ud800", "$x^", "_silence_", "a\nb", "\x00", "🐕"])
def test_names_of_any_text_can_be_shown(tmp_path, name):
    rows = [{"step": t, "loss": 1.0, "pred_std": 1.0, "target_std": 1.0} for t in range(3)]
    path = figures.write_loss_curves(tmp_path / "loss.png", {name: rows, "other": rows})
    assert is_picture(path)
    spec, visible = np.zeros((32, 32), np.float32), np.array([[0, 1]])
    assert is_picture(figures.write_patches(tmp_path / "patches.png", spec, visible, patch_size=16, title=name))
    embeddings = np.random.default_rng(0).standard_normal((8, 4))
    drawn = {name: (embeddings, [(name,), ("other",)] * 4)}
    assert is_picture(figures.write_projection(tmp_path / "projection.png", drawn))


def test_directory_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        figures.write_run_figures(tmp_path)


def test_loss_curves_of_several_runs(tmp_path):
    parts = ("loss", "regression", "global", "regularisation", "pred_std", "target_std")
    rows = [{"step": s, **dict.fromkeys(parts, 1 / s)} for s in range(1, 9)]
    assert is_picture(figures.write_loss_curves(tmp_path / "loss.png", {"with": rows, "without": rows[:5]}))


def test_smoothing_looks_back_only_and_skips_what_is_missing():
    values = np.array([4.0, 2.0, np.nan, 6.0, 8.0])
    np.testing.assert_allclose(figures.smoothed(values, 2), [4, 3, 2, 6, 7])
    np.testing.assert_allclose(figures.smoothed(np.array([np.nan, 1.0]), 5), [np.nan, 1])


def test_visible_grid():
    seen = figures.visible_grid(np.array([0, 5]), frames=12, bins=8, patch_size=4)  # 3 x 2 patches, h * 2 + w
    assert seen.shape == (12, 8)
    assert seen.sum() == 2 * 16
    assert seen[:4, :4].all()
    assert seen[8:, 4:].all()


def test_trailing_padding():
    spec = np.random.default_rng(0).normal(size=(10, 4))
    assert figures.trailing_padding(spec) == 0
    spec[7:] = 0.467
    assert figures.trailing_padding(spec) == 3


def embeddings(clips: int, classes: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    rng = np.random.default_rng(0)
    centres, label = 5 * rng.normal(size=(classes, 16)), np.arange(clips) % classes
    return centres[label] + rng.normal(size=(clips, 16)), [(f"class {c}",) for c in label]


def test_projection_keeps_clusters_apart():
    rows, labels = embeddings(60, 6)
    points, method = figures.project(rows)
    assert method == "t-SNE"
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(60)
    assert np.mean([labels[i] == labels[j] for i, j in enumerate(distance.argmin(axis=1))]) > 0.85
    few, method = figures.project(rows[:5])
    assert (few.shape, method) == ((5, 2), "PCA")
    with pytest.raises(ValueError, match="at least two"):
        figures.project(rows[:1])


def test_nearest_neighbour_agreement_by_hand():
    rows = np.array([[1.0, 0], [0.9, 0.1], [-1, 0.2], [-1, 0]])
    assert figures.nearest_neighbour_agreement(rows, [("a",), ("a", "b"), ("b",), ("c",)]) == 0.5


def test_projection_picture(tmp_path):
    rows, labels = embeddings(48, 12)
    labels[3] = ()  # a clip without a label must not be in the way
    path = figures.write_projection(
        tmp_path / "new" / "p.png", {"trained": (rows, labels), "twin": (rows[:20], labels[:20])}
    )
    assert is_picture(path)
