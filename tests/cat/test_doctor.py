"""`cat-audio doctor`: complete where all is there, and no failure where nothing is."""

import importlib.util
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from cat import doctor
from cat.commands import main

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_report_has_operators_versions_and_compilers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "MultiResConv",
        "fbank",
        "PyTorch",
        "GPU driver",
        "C++ compiler",
        "CUDA compiler",
        "numpy",
        "soundfile",
    ):
        assert expected in out


def test_missing_things_are_named_with_their_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    missing = {"soxr", "transformers"}

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["doctor"]) == 0
    rows = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split(maxsplit=1)) == 2
    )
    assert rows["soxr"] == "missing: pip install 'cat-kernels[train]'"
    assert rows["transformers"] == "missing: pip install 'cat-kernels[clap]'"
    assert rows["C++"] == "compiler  none (c++ not found)"
    assert "nvcc not found" in rows["CUDA"]


def test_extras_are_those_of_pyproject() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert list(doctor.EXTRAS) == [extra for extra in extras if extra not in ("test", "bench", "docs", "release")]
    for extra, packages in doctor.EXTRAS.items():
        assert [requirement.split(">=")[0] for requirement in extras[extra]] == list(packages)
