"""docs/scale.md: its numbers are those of the code, and agree with what else is predicted of the base model."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("yaml")

from benchmarks import scale
from cat.data.share import share_out
from cat.provenance import ROOT
from cat.training.plan import estimate
from cat.training.plan.estimate import Case
from cat.training.plan.hardware import Machines
from cat.training.recipe import load_recipe


@pytest.mark.slow
def test_the_base_model_needs_what_is_traced_on_the_gpu_that_is_not_there() -> None:
    """`benchmarks.predict` traces kernels as they are launched; the plan their fake implementations."""
    told = json.loads((ROOT / "benchmarks" / "predictions" / "after.json").read_text())
    found = scale._step(96, 2)
    assert found.peak / 2**20 == pytest.approx(told["memory"]["peak_MiB"], rel=0.001)
    assert sum(found.flops.values()) == pytest.approx(told["parts"]["step"]["flops"], rel=0.01)
    recipe = load_recipe(ROOT / "recipes" / "base.yaml")
    asked = Case(recipe, Machines(gpu="h200"), share_out(96, 96), found, "bf16")
    assert 1e3 * estimate.times(asked).step(1) == pytest.approx(told["parts"]["step"]["ms"], rel=0.05)
    document = (ROOT / "docs" / "scale.md").read_text()
    if torch.__version__.startswith("2.13."):  # others cut some operations another way
        assert scale.example() in document, "out of date: python -m benchmarks.scale --write"
    row = " | ".join(scale.row(768, Machines(8, gpu="h100")))
    assert f"| {row} |" in document, "out of date: python -m benchmarks.scale --write"
