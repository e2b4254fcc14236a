"""`cat-audio doctor --report`: what a reader needs is there, and nothing of the user's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cat.commands.doctor  # noqa: F401  (before anything is patched)
from cat.bugreport import Anonymous, bug_report
from cat.commands import main
from cat.config import write_yaml
from cat.data import DataConfig
from cat.model import GuideConfig
from cat.training.recipe import PretrainConfig, RunConfig

SECRETS = ("zebra", "giraffe", "ocelot", "walrus", "tapir", "lemur", "badger", "kiwi", "marmot", "axolotl")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a secret wherever users put names."""
    home = tmp_path / "ocelot"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "walrus")
    monkeypatch.setenv("LOGNAME", "walrus")
    monkeypatch.setattr("socket.gethostname", lambda: "axolotl.example.org")
    monkeypatch.setenv("CAT_KERNELS_CACHE", "/data/marmot")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr("cat.doctor.report", lambda: f"nvcc {home}/bin/nvcc fails on axolotl, by walrus\ntorch 2.13.0")
    folder = home / "zebra project" / "run giraffe"
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    config = PretrainConfig(
        data=DataConfig(train=f"{home}/zebra project/tapir.jsonl"),
        guides={"lemur": GuideConfig(encoder="clap:badger/clap-large", weight=0.5)},
        run=RunConfig(name="run giraffe", dir=str(folder.parent)),
    )
    write_yaml(config, folder / "config.yaml")
    rows = [
        {"kind": "train", "step": 7, "loss": 1.25, "regularisation.lemur": 0.5, "grad_norm": None},
        {"kind": "warning", "step": 7, "text": f"lemur is not followed; see {home}/zebra project/kiwi song.wav, or "
         "https://badger.org/x?token=kiwi, ask walrus@badger.org"},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    failure = {"step": 1, "path": f"{home}/zebra project/kiwi song.wav", "reason": "kiwi song.wav ends at 3 s of 10"}
    (folder / "failures.jsonl").write_text((json.dumps(failure) + "\n") * 2)
    return folder


def test_nothing_of_the_users_is_told(run: Path) -> None:
    told = bug_report(run)
    assert [word for word in SECRETS if word in told.lower()] == []


def test_what_a_reader_needs_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--report", str(run)]) == 0
    told = capsys.readouterr().out
    for expected in (
        "cat-kernels 0.",
        "torch 2.13.0",
        "NCCL_DEBUG=INFO",
        "CAT_KERNELS_CACHE=(set)",
        "checkpoints: step-00000007",
        "train step=7 loss=1.25 regularisation.NAME1=0.5 grad_norm=null",
        "warning at step 7: NAME1 is not followed; see PATH",
        "    encoder: clap:TEXT",
        "    weight: 0.5",
        "  crop: random",
        "  lr: 0.0005",
        ".jsonl\n",
        "2 x FILE1.wav ends at 3 s of 10",
    ):
        assert expected in told, expected
    paths = re.findall(r"PATH\d+\.wav", told)
    assert len(set(paths)) == 1  # the clip that failed is the one of the warning
    assert told.count("<details>") == told.count("</details>") == told.count("```") // 2


def test_without_a_run_it_has_what_doctor_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--report"]) == 0
    told = capsys.readouterr().out
    assert "MultiResConv" in told
    assert "Configuration of the run" not in told


def test_what_cannot_be_read_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("a: [")
    (run / "metrics.jsonl").write_bytes(b"\xff\n1\n")
    assert "cannot be read: PATH" in bug_report(run)
    assert main(["doctor", "--report", str(tmp_path)]) == 1
    assert "is no run directory (it has no config.yaml)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/x/a.wav and /home/x/a.wav", "PATH1.wav and PATH1.wav"),
        ("see a/b.npy: 3/4 of 1e-3, ~/x", "see PATH1.npy: 3/4 of 1e-3, PATH2"),
        ("/usr/bin/nvcc does not work", "/usr/bin/nvcc does not work"),
        ("C:\\Users\\x\\a.wav", "PATH1.wav"),
        ("s3://bucket/x.tar?sig=1 at 10.0.0.12:8080", "s3:URL1 at ADDRESS1:8080"),
        ("torch 2.11.0 on sm_90, hf_abcdefghijk", "torch 2.11.0 on sm_90, TOKEN1"),
    ],
)
def test_of_a_text(text: str, told: str) -> None:
    assert Anonymous().text(text) == told
