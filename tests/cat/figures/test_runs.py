"""Pictures of runs: what is drawn is what the run saw, and a picture appears whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cat.config import from_mapping, write_yaml
from cat.data import load_manifest, pretrain_batches
from cat.figures import runs
from cat.training.recipe import SECTION_PRESETS, PretrainConfig, load_recipe

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")


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


def test_run_figures(is_picture, run_dir):
    paths = runs.write_run_figures(run_dir)
    assert [path.name for path in paths] == ["loss.png", "patches.png"]
    assert all(path.parent == run_dir / "figures" and is_picture(path) for path in paths)


def test_the_figure_of_fine_tuning(is_picture, run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step, accuracy in ((20, 0.5), (40, None)):
            file.write(json.dumps({"kind": "valid", "step": step, "loss": 1.0, "accuracy": accuracy}) + "\n")
    path = runs.write_finetune_figure(run_dir, "accuracy")
    assert path == run_dir / "figures" / "loss.png"
    assert is_picture(path)


def test_agreement_of_runs(is_picture, tmp_path):
    """Equal steps, a difference of zero, cannot be drawn on its logarithmic axis, and need not be."""
    curves = {
        name: [{"step": t, "loss": 20 / t + gap * (t > 20)} for t in range(1, 41)]
        for name, gap in (("dense", 0.0), ("triton", 1e-6), ("re-seeded", 0.5))
    }
    path = tmp_path / "agreement.png"
    assert is_picture(runs.write_agreement(path, curves, tested="triton", limit=0.005))


def test_run_figures_show_the_clip_and_masks_of_the_run(run_dir, monkeypatch):
    drawn = {}
    monkeypatch.setattr(runs, "write_patches", lambda path, spec, visible, **kw: drawn.update(s=spec, v=visible, **kw))
    runs.write_run_figures(run_dir)
    config = load_recipe(run_dir / "config.yaml")
    batch = next(pretrain_batches(config.data, config.features, config.masks, patch_size=16, seed=0, num_steps=1))
    np.testing.assert_array_equal(drawn["s"], batch.spec[0, 0].numpy())
    np.testing.assert_array_equal(drawn["v"], batch.visible[:4].numpy())
    assert drawn["title"] == load_manifest(config.data.train).clips[int(batch.clips[0])].path


def test_directory_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        runs.write_run_figures(tmp_path)


def test_loss_curves_of_several_runs(is_picture, tmp_path):
    parts = ("loss", "regression", "global", "regularisation", "pred_std", "target_std")
    rows = [{"step": s, **dict.fromkeys(parts, 1 / s)} for s in range(1, 9)]
    assert is_picture(runs.write_loss_curves(tmp_path / "loss.png", {"with": rows, "without": rows[:5]}))


def test_every_guide_has_a_panel(tmp_path, monkeypatch):
    rows = [{"step": s, "loss": 1 / s, "regularisation": 0.0, "regularisation.yamnet": 2 / s} for s in range(1, 9)]
    drawn = []
    monkeypatch.setattr(runs, "save", lambda drawing, path: drawn.append([a.get_title() for a in drawing.axes]) or path)
    runs.write_loss_curves(tmp_path / "loss.png", {"guided": rows, "plain": [{"step": 1, "loss": 1.0}]})
    assert drawn[0][:2] == ["total, as optimised", "L_r towards yamnet"]


def test_smoothing_looks_back_only_and_skips_what_is_missing():
    values = np.array([4.0, 2.0, np.nan, 6.0, 8.0])
    np.testing.assert_allclose(runs.smoothed(values, 2), [4, 3, 2, 6, 7])
    np.testing.assert_allclose(runs.smoothed(np.array([np.nan, 1.0]), 5), [np.nan, 1])
