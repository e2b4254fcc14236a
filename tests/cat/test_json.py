"""`--json` of every command: stdout holds one JSON value and nothing else, also beside what people read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cat.commands import COMMANDS, main
from tests.lookalikes import SMALL, esc50, folder_of_folders

ROOT = Path(__file__).parents[2]
for module in ("soundfile", "yaml", "sklearn"):
    pytest.importorskip(module)
pytestmark = pytest.mark.slow

# In an order in which each finds what it needs; and what must be in its result.
RUNS: dict[str, tuple[list[str], set[str]]] = {
    "synth": ([*SMALL["synth"], "synth", "--seed", "3"], {"folder", "made", "clips", "manifests"}),
    "dataset": ([*SMALL["dataset"], "esc50", "esc50.zip", "-o", "esc50"], {"title", "licence", "manifests", "notes"}),
    "prepare": (["sounds", "-o", "prepared", "--shards", "1MB"], {"manifest", "clips", "rejected", "shards"}),
    "shards": (["write", "sounds", "-o", "shards"], {"folder", "clips", "shards", "failures"}),
    "embed": (["sounds", "--encoder", "random", "-o", "out.npy"], {"embeddings", "manifest", "width", "left_out"}),
    "pretrain": (
        [str(ROOT / "recipes/tiny.yaml"), *SMALL["pretrain"], "data.train=sounds", "run.name=a"],
        {"run_dir", "step", "steps", "checkpoint", "last_loss", "stopped_by"},
    ),
    "finetune": (
        [str(ROOT / "recipes/finetune.yaml"), *SMALL["finetune"], "data.train=sounds", "encoder=runs/a", "run.name=b"],
        {"run_dir", "step", "scores", "checkpoint"},
    ),
    "probe": (
        ["random", "--train", "sounds", "--valid", "sounds", "--test", "sounds", "--knn", "--no-cache", "--figures"],
        {"metric", "rows", "written"},
    ),
    "evaluate": (["runs/b", "sounds", "-o", "scores", "--figures"], {"metrics", "classes", "written", "drawn"}),
    "predict": (["runs/b", "sounds"], {"path", "scores"}),
    "encode": (["sounds", "broken.wav", "--encoder", "runs/a", "-o", "out.npz"], {"embeddings", "files", "left_out"}),
    "similar": (["sounds", "sounds/hum/0.wav", "--encoder", "runs/a"], {"similarity", "begin", "end", "path"}),
    "checkpoints": (["list", "runs/a"], {"path", "step", "score", "newest"}),
    "export": (["runs/a", "a.pt2"], {"written", "bytes", "metadata", "difference"}),
    "report": (["runs/a", "-o", "report.html"], {"written", "notes"}),
    "experiment": (
        [
            "overfit",
            "--data",
            "synth",
            *SMALL["pretrain"][:7],
            "optim.steps=2",
            "optim.warmup_steps=1",
            "--out",
            "experiments",
        ],
        {"passed", "verdict", "rows", "config"},
    ),
    "doctor": ([], {"versions", "operators", "machine", "packages"}),
}
CODES = {"encode": 1, "experiment": 1}  # a file cannot be read; two steps reach no verdict
UNTOLD = {"convert"}  # tests/cat/checkpoints/test_released.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("json")
    folder_of_folders(made / "sounds")
    esc50(made / "esc50.zip")
    (made / "broken.wav").write_bytes(b"RIFF")
    return made


def test_every_command_is_here() -> None:
    assert set(RUNS) | UNTOLD == set(COMMANDS)


@pytest.mark.parametrize("command", RUNS)
def test_stdout_is_json(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words, keys = RUNS[command]
    assert main([command, *words, "--json"]) == CODES.get(command, 0)
    told = capsys.readouterr()
    values = list(read(told.out)) if command == "predict" else [json.loads(told.out, parse_constant=refused)]
    first = values[0][0] if isinstance(values[0], list) else values[0]
    assert keys <= set(first), told.out[:2000]


def read(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        yield json.loads(line, parse_constant=refused)


def refused(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
