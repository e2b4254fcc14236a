"""Several processes train as one does: the same losses, one voice, one end; killed or told to stop, they go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cat import distributed
from cat.checkpoints import store as checkpoints
from cat.config import ConfigError
from cat.data import Clip, EmbeddingWriter, Manifest, load_manifest, write_manifest
from cat.data.share import share_out
from cat.distributed import Processes
from cat.training.pretraining import Pretraining
from cat.training.recipe import load_recipe
from cat.training.records import read_rows
from tests.processes import together

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("yaml")
pytest.importorskip("sklearn")

REPOSITORY = Path(__file__).parents[3]
MODEL = (
    "{channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}"
)
RUN = """
run:
  {threads: 1, log_every: 2, checkpoint_every: 10, eval_every: 0, device: cpu, tensorboard: false, figures: false}
"""
PRETRAIN = f"""
model: {MODEL}
objective: {{regularisation_weight: 0.1, regularisation_schedule: decay, regularisation_steps: 30}}
masks: {{num_masks: 2}}
features: {{frames: 32}}
data: {{batch_size: 4, num_workers: 0, max_failed_share: 1}}
optim: {{lr: 3e-3, warmup_steps: 2, steps: 20}}
{RUN}"""
FINETUNE = f"""
model: {MODEL}
task: events
augment: {{roll: true, noise: 0.1, roll_frames: 5, mixup: 0.8, mask_bins: 0.2, mask_frames: 0.3}}
loss: {{over: positives}}
data: {{batch_size: 8, num_workers: 0}}
optim: {{lr: 5e-3, warmup_steps: 2, steps: 4, drop_path: 0.3, average: 0.8}}
{RUN}"""
# In process 1, before it reads the piece of this key: of update 2 where there are two processes.
AT_A_PIECE = """
import os, signal, time
from cat.data.dataset import PretrainDataset as dataset
read = dataset.__getitem__
def reads(self, key):
    if key == 5:
        {}
    return read(self, key)
dataset.__getitem__ = reads
"""

NOT_FINITE = "batch = read(self, key); batch.spec.fill_(float('nan')); return batch"
LAUNCHED = "import os; os.environ['TORCHELASTIC_RUN_ID'] = 'none'"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Noise with embeddings to pre-train on, one file of it damaged, and tones with events, of one clip unknown."""
    folder, random = tmp_path_factory.mktemp("distributed"), np.random.default_rng(0)
    for part, count in (("train", 10), ("valid", 7)):
        (folder / part).mkdir()
        for i in range(count):
            soundfile.write(folder / part / f"{i}.wav", 0.1 * random.standard_normal(6000), 16000)
            if (part, i) == ("train", 3):
                (folder / part / "3.wav").write_bytes(b"RIFF")
        manifest = load_manifest(folder / part)
        with EmbeddingWriter(folder / f"{part}.npy", manifest, dim=6, encoder="test") as writer:
            writer.append(range(count), random.standard_normal((count, 6)).astype(np.float32))
        write_manifest(writer.manifest, folder / f"{part}.jsonl")
    clips = []
    for i in range(12):
        wave = 0.05 * random.standard_normal(int(random.integers(4000, 9000)))
        wave[1000:3000] += 0.3 * np.sin(np.arange(2000) * (0.2 + 0.3 * (i % 2)))
        soundfile.write(folder / f"tone{i}.wav", wave, 16000)
        label = f"tone {i % 2}"
        event = {"onset": 1 / 16, "offset": 3 / 16, "label": label}
        extra = {} if i == 3 else {"events": [event]}
        clips.append(Clip(f"tone{i}.wav", labels=(label,) if i == 3 else (), extra=extra))
    for part, chosen in (("tones", clips[:8]), ("heard", clips[8:])):
        write_manifest(Manifest(tuple(chosen), folder), folder / f"{part}.jsonl")
    names = f"train: {folder / 'train.jsonl'}, valid: {folder / 'valid.jsonl'}"
    (folder / "pretrain.yaml").write_text(PRETRAIN.replace("data: {", f"data: {{{names}, "))
    names = f"train: {folder / 'tones.jsonl'}, valid: {folder / 'heard.jsonl'}, test: {folder / 'heard.jsonl'}"
    (folder / "finetune.yaml").write_text(FINETUNE.replace("data: {", f"data: {{{names}, "))
    return folder


def group(data: Path, size: int, run_dir: Path, *changes: str, command="pretrain", **more: Any) -> dict[str, Any]:
    where = [f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"]
    return {"size": size, "argv": [command, str(data / f"{command}.yaml"), *where, *changes], **more}


def rows(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    return read_rows(run_dir / "metrics.jsonl", kind)


def assert_same_numbers(run_dir: Path, other: Path) -> None:
    """To rounding; deviations, which are the mean of those of pieces, roughly."""
    for kind in ("train", "valid"):
        theirs = rows(other, kind)
        ours = [row for row in rows(run_dir, kind) if row["step"] in {its["step"] for its in theirs}]
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.pop("kind") == its.pop("kind")
            deviations = {name: mine.pop(name) for name in ("pred_std", "target_std") if name in mine}
            assert deviations == pytest.approx({name: its.pop(name) for name in deviations}, rel=0.3)
            assert mine == pytest.approx(its, rel=2e-4), run_dir.name


def ended(ends: list[list[dict[str, Any]]], *codes: int) -> bool:
    assert [end["code"] for end in ends] == list(codes), [end["err"] for end in ends]
    return True


# ---------------------------------------------------------------- the same numbers


def test_losses_agree_on_one_two_and_four_processes_and_whatever_the_pieces(data, tmp_path):
    """20 steps, of losses that are means and sums, with a schedule, one clip unreadable; evaluations too."""
    cases = {
        "1": (1, []),
        "2": (2, []),
        "4": (4, []),
        "1 in 2 pieces": (1, ["data.global_batch=4", "data.batch_size=2"]),
        "2 in 4 pieces": (2, ["data.global_batch=4", "data.batch_size=1"]),
    }
    ends = together(
        tmp_path, *(group(data, size, tmp_path / name, *changes) for name, (size, changes) in cases.items())
    )
    for end, (name, (size, _)) in zip(ends, cases.items(), strict=True):
        assert ended(end, *[0] * size)
        assert len(rows(tmp_path / name)) == 20
        assert [row["step"] for row in rows(tmp_path / name, "valid")] == [10, 20]
        assert_same_numbers(tmp_path / name, tmp_path / "1")
        failures = [(row["step"], row["path"]) for row in read_rows(tmp_path / name / "failures.jsonl")]
        assert failures == [(failures[0][0], str(data / "train" / "3.wav"))]
        # One of them speaks.
        assert "20/20 steps" in end[0]["err"]
        assert "trained 20 steps" in end[0]["out"]
        assert [(other["out"], other["err"]) for other in end[1:]] == [("", "")] * (size - 1)


def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path):
    """1 -> 2 -> 1 in other pieces, and the losses are those of one process throughout."""
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    ends = together(
        tmp_path,
        group(data, 1, whole, "run.stop_at=6"),
        group(data, 1, changed, "run.stop_at=2"),
        group(data, 2, changed, "run.stop_at=4", "--resume"),
        group(data, 1, changed, "run.stop_at=6", "data.global_batch=4", "data.batch_size=2", "--resume"),
    )
    for end in ends:
        assert ended(end, *[0] * len(end))
    assert "processes was 1 and is now 2: losses will agree up to rounding" in ends[2][0]["err"]
    assert_same_numbers(changed, whole)
    ours, theirs = (checkpoints.load(checkpoints.newest(run)).model for run in (changed, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_fine_tuning_agrees_whatever_the_processes(data, tmp_path):
    """Mixup, drop path, SpecAugment, frames that are not known, and a loss over the positives of the whole batch."""
    cases = {"1": (1, []), "2": (2, []), "1 in 4": (1, ["data.global_batch=8", "data.batch_size=2"])}
    runs = [group(data, size, tmp_path / n, *more, command="finetune") for n, (size, more) in cases.items()]
    ends = together(tmp_path, *runs)
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in cases]
    for end, (name, (size, _)), score in zip(ends, cases.items(), scores, strict=True):
        assert ended(end, *[0] * size)
        assert_same_numbers(tmp_path / name, tmp_path / "1")
        assert score["test"] == pytest.approx(scores[0]["test"], rel=1e-4)
        assert end[0]["out"].count("test ") == 1


def test_pieces_are_the_batch():
    for paired in (False, True):
        shares = [share_out(12, 3, processes=2, rank=rank, paired=paired) for rank in (0, 1)]
        places = [place for share in shares for key in share.keys(5, 1) for place in share.place(key)[1]]
        assert sorted(places) == list(range(12))
        assert {share.place(key)[0] for share in shares for key in share.keys(5, 1)} == {5}
        assert [share.size for share in shares] == ([2, 2] if paired else [3, 3])
    for key in shares[1].keys(0, 1):
        piece = shares[1].place(key)[1]
        assert [11 - place for place in piece] == piece[::-1]  # whom its clips are mixed with
    with pytest.raises(ConfigError, match=r"6 clips .* cannot be shared out to 4 processes .* that fit: 1, 2, 3, 6. "):
        share_out(6, 4, processes=4)
    with pytest.raises(ConfigError, match=r"pairs that augment.mixup mixes.* 6 processes .* that fit: 1, 3. "):
        share_out(6, 6, processes=6, paired=True)


# ---------------------------------------------------------------- ends


def test_what_happens_to_one_process_ends_all_alike(data, tmp_path):
    def process_1(what: str) -> str:
        return AT_A_PIECE.format(what)

    runs = {name: tmp_path / name for name in ("raises", "SIGTERM", "SIGUSR1", "killed", "left", "hangs")}
    kill = "os.kill(os.getpid(), signal.{})"
    occupied = f"""
import time
from pathlib import Path
while not Path({str(runs["hangs"] / ".lock")!r}).exists():
    time.sleep(0.02)
"""
    groups = {
        "raises": group(data, 2, runs["raises"], before=process_1("raise RuntimeError('a surprise')")),
        "SIGTERM": group(data, 2, runs["SIGTERM"], before=process_1(kill.format("SIGTERM"))),
        "SIGUSR1": group(data, 2, runs["SIGUSR1"], "run.stop_at=5", before=process_1(kill.format("SIGUSR1"))),
        "killed": group(data, 2, runs["killed"], before=process_1(kill.format("SIGKILL"))),
        "left": group(data, 2, runs["left"], before=f"{LAUNCHED}{process_1('os.getppid = lambda: 1')}"),
        "not finite": group(data, 2, tmp_path / "not-finite", "run.stop_at=5", before=process_1(NOT_FINITE)),
        "hangs": group(data, 2, runs["hangs"], "run.timeout=2", before=process_1("time.sleep(8)")),
        "occupied": group(data, 2, runs["hangs"], before=occupied, beside=True),
        "other": group(data, 2, tmp_path / "other", before="rank and argv.append('optim.lr=1')"),
        "unfit": group(data, 3, tmp_path / "unfit"),
        "alone": group(data, 2, tmp_path / "alone", "run.timeout=1", ranks=[0]),
    }
    ends = dict(zip(groups, together(tmp_path, *groups.values()), strict=True))

    # The process where it happened says it, the other ends in silence, and nothing that was trained is lost.
    first, second = ends["raises"]
    assert ended(ends["raises"], 1, 1)
    assert "error: a surprise" in second["err"]
    assert "(process 1 of 2, on " in second["err"]
    assert first["err"].splitlines()[-1] == f"step 2 is saved; go on with: cat-audio pretrain --resume {runs['raises']}"
    assert checkpoints.newest(runs["raises"]).name == "step-00000002"

    assert ended(ends["SIGTERM"], 143, 143)
    assert "stopped by SIGTERM after step 2" in ends["SIGTERM"][0]["out"]
    assert checkpoints.newest(runs["SIGTERM"]).name == "step-00000002"

    assert ended(ends["SIGUSR1"], 0, 0)
    assert "step 3: saved" in ends["SIGUSR1"][0]["err"]

    assert ended(ends["killed"], 1, -9)
    assert "process 1 (" in ends["killed"][0]["err"]
    assert "of 2 (counted from 0) has ended without a word: killed" in ends["killed"][0]["err"]
    assert checkpoints.newest(runs["killed"]).name == "step-00000002"

    # Of torchrun, which then cannot end them.
    assert ended(ends["left"], 143, 143)
    assert checkpoints.newest(runs["left"]).name == "step-00000002"

    # All skip the update of which one process has a loss that is not finite, and its whole batch is written down.
    assert ended(ends["not finite"], 0, 0)
    assert [row["grad_norm"] is None for row in rows(tmp_path / "not-finite")] == [False, False, True, False, False]
    (skipped,) = (tmp_path / "not-finite" / "skipped").iterdir()
    assert len(json.loads(skipped.read_text())["clips"]) == 4

    assert ended(ends["hangs"], 1, 1)
    assert "has not answered for 2 s (run.timeout)" in ends["hangs"][0]["err"]
    assert ends["hangs"][1]["err"] == ""

    # A second job in the directory is refused, by the name of the first.
    assert ended(ends["occupied"], 1, 1)
    assert f"{runs['hangs']} is in use by process " in ends["occupied"][0]["err"]
    assert ends["occupied"][1]["err"] == ""

    assert ended(ends["other"], 1, 1)
    assert "would not train the same: optim.lr is 1.0, and there 0.003. " in ends["other"][1]["err"]

    assert ended(ends["unfit"], 1, 1, 1)
    said = [end["err"] for end in ends["unfit"] if "error: " in end["err"]]
    assert len(said) == 1
    assert "numbers of processes that fit: 1, 2, 4" in said[0]

    assert ended(ends["alone"], 1)
    assert "process 1 of 2 (counted from 0) has not come within 1 s (run.timeout)" in ends["alone"][0]["err"]


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_goes_on(data, tmp_path):
    """torchrun --max-restarts: SIGKILL of one of two, and the losses are those of a run that was not disturbed."""
    script = tmp_path / "killed.py"
    kill = AT_A_PIECE.format("os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.kill(os.getpid(), signal.SIGKILL)")
    script.write_text(f"import sys\nfrom cat.commands import main\n{kill}\nsys.exit(main())\n")
    assert ended(*together(tmp_path, group(data, 2, tmp_path / "undisturbed")), 0, 0)
    ended_at = torchrun(tmp_path, script, *group(data, 2, tmp_path / "killed")["argv"])
    assert ended_at.returncode == 0, ended_at.stderr
    assert f"going on from {tmp_path / 'killed' / 'checkpoints' / 'step-00000002'}" in ended_at.stderr
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")


def torchrun(folder: Path, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---------------------------------------------------------------- one process


def test_a_restart_takes_up_only_what_had_begun():
    """A run that was refused, because there is one of that name, is refused again."""
    store, before, after = dist.HashStore(), Processes(), Processes(restarts=1)
    before._store = after._store = store
    assert not after.begun("runs/a")
    before.begin("runs/a")
    assert [after.begun("runs/a"), after.begun("runs/b"), before.begun("runs/a")] == [True, False, False]


def test_processes_on_gpus(monkeypatch):
    monkeypatch.setattr(distributed, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Processes(5, 8, local_rank=1).device("cuda") == torch.device("cuda", 1)
    assert Processes().device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="number 3 on this machine, but torch sees 2 GPUs; start at most that many"):
        Processes(2, 4, local_rank=2).device("cuda")
    with pytest.raises(ConfigError, match="'cuda:1' with 2 processes; expected auto, cuda or cpu"):
        Processes(1, 2, local_rank=1).device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Slurm's --gpus-per-task=1 sets it
    assert Processes(1, 2, local_rank=1).device("cuda") == torch.device("cuda", 0)


def test_a_recorded_step_is_of_one_process_and_one_piece(data, monkeypatch):
    two = Processes(0, 2)
    monkeypatch.setattr(two, "device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("cat.training.pretraining.current", lambda: two)
    config = load_recipe(data / "pretrain.yaml", ["run.cuda_graph=true", "objective.regularisation_weight=0"])
    with pytest.raises(ConfigError, match=r"here there are 2 processes and 2 pieces .*; use run.cuda_graph=false"):
        Pretraining(config, load_manifest(data / "train"))
