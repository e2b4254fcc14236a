"""Every command on shards, local and behind a URL: what it makes of the files that they were written from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cat.commands import main
from cat.data import load_manifest
from cat.training.records import read_rows

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("yaml")

RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 2, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
masks: {num_masks: 2}
features: {frames: 32}
data: {batch_size: 5, num_workers: 0, gain: true}
optim: {lr: 3e-3, warmup_steps: 2, steps: 8}
ema: {start: 0.9, end: 0.99, steps: 8}
run:
  {threads: 1, log_every: 1, checkpoint_every: 3, eval_every: 0, device: cpu, tensorboard: false, figures: false}
"""
FINETUNE = """
model: {channels: [8, 8], embed_dim: 16, depth: 2, num_heads: 2}
data: {batch_size: 4, num_workers: 0}
optim: {lr: 5e-3, warmup_steps: 2, steps: 3}
run:
  {threads: 1, log_every: 1, checkpoint_every: 3, eval_every: 0, device: cpu, tensorboard: false, figures: false}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Twelve clips in two folders, the same in four shards, and two recipes."""
    root = tmp_path_factory.mktemp("sharded")
    for number in range(12):
        folder = root / "files" / ("hiss", "hum")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        wave = np.random.default_rng(number).integers(-9000, 9000, 5000 + 300 * number).astype(np.int16)
        soundfile.write(folder / f"{number:02}.wav", wave, 16000)
    assert main(["shards", "write", f"{root / 'files'}", "-o", f"{root / 'shards'}", "--size", "50kB", "--quiet"]) == 0
    assert len([*(root / "shards").glob("*.tar")]) == 4
    (root / "pretrain.yaml").write_text(RECIPE)
    (root / "finetune.yaml").write_text(FINETUNE)
    return root


def run(*words: object) -> None:
    assert main([*map(str, words), "--quiet"]) == 0


def numbers(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] not in ("speed", "warning")]


@pytest.fixture(scope="module")
def of_files(root) -> Path:
    run(
        "pretrain", root / "pretrain.yaml", f"data.train={root / 'files'}", f"run.dir={root / 'runs'}", "run.name=files"
    )
    return root / "runs" / "files"


def test_pretraining_stopped_within_an_epoch_goes_on_from_shards(root, of_files):
    """Batches of 5 of 12 clips: step 4 is in the middle of an epoch. Also where the run began with the files."""
    options = [f"run.dir={root / 'runs'}", "run.name=resumed"]
    run("pretrain", root / "pretrain.yaml", f"data.train={root / 'shards'}", *options, "run.stop_at=4")
    run("pretrain", root / "pretrain.yaml", f"data.train={root / 'shards'}", *options, "--resume")
    assert numbers(root / "runs" / "resumed") == numbers(of_files)
    options[1] = "run.name=moved"
    run("pretrain", root / "pretrain.yaml", f"data.train={root / 'files'}", *options, "run.stop_at=4")
    run("pretrain", root / "pretrain.yaml", f"data.train={root / 'shards'}", *options, "--resume")
    assert numbers(root / "runs" / "moved") == numbers(of_files)


def test_pretraining_from_a_url(root, of_files, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("CAT_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(str(root / "shards"), "/sharded", recursive=True)
    options = [f"run.dir={root / 'runs'}", "run.name=url", "data.num_workers=2"]
    run("pretrain", root / "pretrain.yaml", "data.train=memory://sharded", *options)
    store.rm("/sharded", recursive=True)
    assert numbers(root / "runs" / "url") == numbers(of_files)


def test_a_damaged_shard_costs_clips_not_the_run(root, tmp_path):
    (tmp_path / "shards").mkdir()
    for path in (root / "shards").iterdir():
        (tmp_path / "shards" / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "shards" / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    options = [f"run.dir={tmp_path}", "run.name=damaged", "data.max_failed_share=0.5"]
    run("pretrain", root / "pretrain.yaml", f"data.train={tmp_path / 'shards'}", *options)
    failures = [json.loads(line) for line in (tmp_path / "damaged" / "failures.jsonl").read_text().splitlines()]
    assert failures
    for failure in failures:
        assert "000002.tar: h" in failure["path"]
        assert "the shard is cut off" in failure["reason"]


def test_embeddings(root, of_files, tmp_path):
    """The manifest that `embed` writes leads to the shards, and embeddings of the files fit the shards."""
    for data in ("files", "shards"):
        run("embed", root / data, "--encoder", of_files, "-o", tmp_path / f"{data}.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "files.npy"), np.load(tmp_path / "shards.npy"))
    linked = load_manifest(tmp_path / "shards.jsonl")
    assert linked.members is not None
    # Shards of a manifest with embeddings keep them.
    run("shards", "write", tmp_path / "files.jsonl", "-o", tmp_path / "packed", "--size", "50kB")
    for name, data in (("linked", "shards.jsonl"), ("kept", "packed")):
        options = [f"run.dir={tmp_path}", f"run.name={name}", "objective.regularisation_weight=1.0", "optim.steps=3"]
        run("pretrain", root / "pretrain.yaml", f"data.train={tmp_path / data}", *options)
    assert numbers(tmp_path / "linked") == numbers(tmp_path / "kept")
    assert all(row["regularisation"] > 0 for row in numbers(tmp_path / "kept") if row["kind"] == "train")


def test_finetuning_evaluation_and_prediction(root, of_files, tmp_path, capsys):
    found = {}
    for data in ("files", "shards"):
        options = [f"data.train={root / data}", f"data.test={root / data}", f"run.dir={tmp_path}", f"run.name={data}"]
        run("finetune", root / "finetune.yaml", f"encoder={of_files}", *options)
        run("evaluate", tmp_path / "files", root / data, "-o", tmp_path / f"scores-{data}")
        run("predict", tmp_path / "files", root / data, "--json", tmp_path / f"{data}.jsonl")
        run("encode", "--encoder", of_files, root / data, "-o", tmp_path / f"{data}.npz")
        rows = [json.loads(line) for line in (tmp_path / f"{data}.jsonl").read_text().splitlines()]
        table = np.load(tmp_path / f"{data}.npz", allow_pickle=False)
        found[data] = [
            numbers(tmp_path / data),
            [row["scores"] for row in rows],
            (tmp_path / f"scores-{data}" / "classes.csv").read_text(),
            table["clip"].tolist(),
        ]
    assert found["files"] == found["shards"]
