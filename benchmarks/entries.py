"""How long a run on a manifest of two million clips takes to its first batch, and what that costs in memory.

    python -m benchmarks.entries                # writes a manifest of 250 MB into the temporary folder; two minutes
    python -m benchmarks.entries --clips 100000

Each start is a process of its own, with two data workers: CPU time of the main process from its first import to the
first batch, whoever else uses the machine; its peak of resident memory, which the mapped pages that all processes share
are a part of; and what is a worker's own. "first" reads the manifest, "next" finds what the first one kept. Two million
entries name a hundred files: what is measured is the list. Parity: the fingerprint of the paths that were written, of
the labels, and the first clips of every start.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Key, Parity, Results
from benchmarks.runner import Settings, arguments, finish, say
from cat.provenance import ROOT

CLIPS = 2_000_000
FILES, CLASSES = 100, 527
GOAL_S, GOAL_MiB = 20.0, 1000.0
TASKS = ("pre-training", "fine-tuning")


def write(folder: Path, clips: int) -> tuple[Path, str]:
    """A manifest, and the SHA-256 of its paths."""
    import soundfile

    names = [f"unbalanced_train/{number:03d}/Y{number:011d}.wav" for number in range(FILES)]
    for name in names:
        (folder / name).parent.mkdir(parents=True)
        soundfile.write(folder / name, np.random.default_rng(0).standard_normal(8000) * 0.1, 16000)
    random, digest = np.random.default_rng(0), hashlib.sha256()
    labels = [f"/m/{number:06x}" for number in range(CLASSES)]
    several = random.zipf(1.5, (clips, 3)) % CLASSES
    with open(folder / "train.jsonl", "w") as file:
        for number, (first, *others) in enumerate(several.tolist()):
            clip = {"path": names[number % FILES], "samples": 8000, "sample_rate": 16000}
            file.write(json.dumps({**clip, "labels": [labels[i] for i in {first, *others[: number % 3]}]}) + "\n")
            digest.update(names[number % FILES].encode() + b"\n")
    return folder / "train.jsonl", digest.hexdigest()


def child(path: str, task: str) -> dict[str, Any]:
    """In a process of its own."""
    from cat.data import DataConfig, FeatureConfig, load_manifest, pretrain_batches
    from cat.data.augment import AugmentConfig
    from cat.data.finetuning import FinetuneDataConfig, finetune_batches
    from cat.data.labels import labels_of
    from cat.data.masks import MaskConfig
    from cat.training.identity import data_identity

    imported = time.process_time()
    manifest, features, taught = load_manifest(path), FeatureConfig(frames=32), None
    read = time.process_time()
    identity = data_identity(manifest, None, None)
    common: dict[str, Any] = {"patch_size": 16, "seed": 0, "num_steps": 8, "manifest": manifest}
    if task == "pre-training":
        batches = pretrain_batches(DataConfig(num_workers=2), features, MaskConfig(num_masks=2), **common)
    else:
        labels = labels_of(manifest)
        common["manifest"], taught = labels.select(manifest), labels.fingerprint(manifest)
        data = FinetuneDataConfig(sampler="weighted", epoch_clips=len(manifest) // 10, num_workers=2)
        batches = finetune_batches(labels=labels, data=data, augment=AugmentConfig(), features=features, **common)
    first = next(batches)
    ended = time.process_time()
    for _ in range(6):
        next(batches)
    return {
        "import_s": imported, "read_s": read - imported, "rest_s": ended - read,
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "worker_MiB": max(private_MiB(process.pid) for process in multiprocessing.active_children()),
        "fingerprint": identity["fingerprint"], "clips": first.clips.tolist(), "taught": taught,
    }  # fmt: skip


def private_MiB(pid: int | None) -> float:
    """Of a process's memory what no other has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def start(path: Path, task: str, cache: Path) -> dict[str, Any]:
    """One start. Raises RuntimeError with the process's last words."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.entries", "--child", str(path), task]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run(s: Settings) -> Results:
    """First and next starts of both tasks, and one on a thousand clips beside them."""
    results = Results()
    for clips in (1000, s.clips):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            path, expected = write(folder, clips)
            for task in TASKS:
                starts = [start(path, task, folder / task) for _ in range(1 if clips == 1000 else 2)]
                for which, found in zip(("first", "next"), starts, strict=False):
                    same = all(found[name] == starts[0][name] for name in ("clips", "taught"))
                    wrong = float(not same or found["fingerprint"] != expected)
                    seconds = found["import_s"] + found["read_s"] + found["rest_s"]
                    results.add(
                        Key(benchmark="entries", mode=task, dtype="fp32", shape={"clips": clips}),
                        which,
                        [1000 * seconds],
                        Parity(wrong, 0.0),
                        peak_MiB=found["peak_MiB"],
                        work={name: found[name] for name in ("import_s", "read_s", "rest_s", "worker_MiB")},
                    )
                    say(f"{clips} clips, {task}, {which}: {seconds:.1f} s, {found['peak_MiB']:.0f} MiB")
                    if seconds > GOAL_S or found["peak_MiB"] > GOAL_MiB:
                        results.notes.append(f"goal missed: {task} on {clips} clips, {which} start")
                    s.saver(results)()
    return results


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return 0
    s = Settings.of(arguments(__doc__.splitlines()[0]).parse_args(), clips_cpu=CLIPS, clips_cuda=CLIPS)
    return finish(run(s), s, [])


if __name__ == "__main__":
    sys.exit(main())
