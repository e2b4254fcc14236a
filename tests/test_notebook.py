"""docs/notebook.ipynb runs from top to bottom: as Python and shell here, and in Jupyter where that is installed."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documented import ROOT, Step, check_names, run_in_shell
from tests.lookalikes import SMALL

for module in ("soundfile", "yaml"):
    pytest.importorskip(module)
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
INSTALLS = re.compile(r"%pip install ")
COMMAND = re.compile(r"^!(cat-audio (\w+)(?: recipes/\S+)?)", re.MULTILINE)


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def made_small(text: str) -> str:
    """Two steps of a smaller model; no more than that is left out."""
    return COMMAND.sub(lambda match: " ".join([match[0], *map(repr, SMALL.get(match[2], []))]), text)


@pytest.mark.slow
def test_it_runs_as_python_and_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    state = torch.get_rng_state()
    for number, cell in enumerate(cells()):
        text = made_small(source(cell)) if cell["cell_type"] == "code" else ""
        if not text or INSTALLS.match(text):
            continue
        if text.startswith("!"):
            for line in text.splitlines():
                run_in_shell(Step("docs/notebook.ipynb", number, "sh", line.removeprefix("!")), tmp_path, {})
        else:
            exec(compile(text, f"notebook, cell {number}", "exec"), names)
    torch.set_rng_state(state)
    told = capsys.readouterr().out
    assert re.search(r"largest difference \d\.\de-0[5-9]", told)
    assert "operator" in told


@pytest.mark.slow
def test_it_runs_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cat-audio").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cat "$@"\n')
    (tmp_path / "bin" / "cat-audio").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    notebook.cells = [cell for cell in notebook.cells if not INSTALLS.match(cell.source)]
    for cell in notebook.cells:
        cell.source = made_small(cell.source)
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()


def test_its_commands_exist_and_it_is_whole() -> None:
    """It begins with an installation; outputs, if any (`make notebook`), are of one run in order and of no machine."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert INSTALLS.match(source(code[0]))
    counts = [cell["execution_count"] for cell in code]
    assert counts in ([None] * len(code), list(range(1, len(code) + 1)))
    for cell in code:
        for line in source(cell).splitlines():
            if line.startswith("!"):
                check_names(Step("docs/notebook.ipynb", 0, "sh", line.removeprefix("!")))
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert len(text) < 200_000
