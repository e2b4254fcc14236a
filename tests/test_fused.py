"""`benchmarks.fused`: what is counted before and after, and that docs/fusion.md has it."""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.usual import repeat_and_select

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fusion.md"
STANDIN_WORKS = not list((Path(torch.__file__).parent / "lib").glob("libtorch_cuda*"))


@pytest.fixture
def fused(monkeypatch):
    """The module without its stand-in, which has to be loaded before PyTorch is."""
    monkeypatch.setitem(sys.modules, "benchmarks.standin", types.ModuleType("benchmarks.standin"))
    yield importlib.import_module("benchmarks.fused")
    del sys.modules["benchmarks.fused"]


def test_masked_places_by_number_are_those_of_the_mask(fused):
    torch.manual_seed(0)
    prediction, target = torch.randn(6, 10, 8, dtype=torch.float64), torch.randn(2, 10, 8, dtype=torch.float64)
    visible = torch.rand(6, 10).argsort(1)[:, :3]
    found = fused.repeat_and_index(prediction, target, visible)
    for ours, usual in zip(found, repeat_and_select(prediction, target, visible), strict=True):
        torch.testing.assert_close(ours, usual)


def test_a_row_adds_up_its_calls(fused):
    row = fused.Row("`x`", "forward", fused.Cost(3, 4_000_000_000), fused.Cost(1, 1_000_000_000), times=2)
    (line,) = fused.table("title", [row], "calls").rows
    assert line == ["`x`", "forward", "2", "6", "2", "8.00", "2.00", "4.0x"]


@pytest.mark.slow
@pytest.mark.skipif(not STANDIN_WORKS, reason="takes the place of CUDA in a PyTorch built without it")
def test_the_page_has_what_is_counted():
    counted = re.search(r"^Counted with PyTorch (\d+\.\d+)", PAGE.read_text(), re.MULTILINE)
    assert counted is not None, "no table in docs/fusion.md: python -m benchmarks.fused --write"
    if not torch.__version__.startswith(counted[1] + "."):
        pytest.skip(f"counted with PyTorch {counted[1]}; others cut some of their operations another way")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fused", "--check"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
