"""`cat-audio experiment visible`: what it shows, and that it would find a stem that is not exact."""

from __future__ import annotations

import json

import pytest

from cat.commands import main
from cat.figures import is_figure
from cat_kernels.stem import module as stem_module

pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

SMALL = ("model.channels=[8,16]", "model.embed_dim=48", "model.num_heads=3", "model.decoder_dim=48", "run.threads=1")


def examine(data, out, *words):
    return main(["experiment", "visible", *SMALL, "--pool", str(data / "train.jsonl"), "--out", str(out), *words])


def test_visible_patches_alone_are_exact(two_sounds, tmp_path, capsys):
    assert examine(two_sounds, tmp_path) == 0
    assert "0 masked pixels reach a visible token" in capsys.readouterr().out
    result = json.loads((tmp_path / "visible" / "result.json").read_text())
    assert result["passed"]
    assert not (tmp_path / "data").exists()  # with --pool none are made
    values = result["values"]
    assert values["positions"] == {"4": [4 * 80 * 16, 4 * 15 * 16], "8": [4 * 80 * 4, 4 * 15 * 4], "16": [320, 60]}
    assert values["multiply_adds"]["dense"] * 15 == values["multiply_adds"]["visible"] * 80
    for name in ("reach", "halo"):
        assert is_figure(tmp_path / "visible" / "figures" / f"{name}.png")


def test_a_neighbour_that_leaks_is_found(two_sounds, tmp_path, monkeypatch, capsys):
    """The formula without its mask: masked neighbours reach visible tokens."""

    def without_mask(stem, spec, visible):
        tokens = stem_module.multires_conv_whole(stem, spec)
        tokens = tokens.repeat_interleave(len(visible) // len(spec), dim=0)
        return tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))

    monkeypatch.setattr(stem_module, "multires_conv_dense", without_mask)
    assert examine(two_sounds, tmp_path) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said
    assert "; 0 masked pixels" not in said


def test_a_stem_without_neighbours(two_sounds, tmp_path, capsys):
    assert examine(two_sounds, tmp_path, "model.stem=patch", "model.resolutions=[16]", "model.channels=[]") == 1
    assert "a plain patch embedding has no neighbours" in capsys.readouterr().err
