"""Training as a user starts it, in one process and in several: updates a second, waiting, memory, start.

    python -m benchmarks.scaling                  # CPU: the tiny model in 1 and 2 processes, 16 clips an update
    python -m benchmarks.scaling --device cuda    # base model, 96 clips a GPU, on 1, 2, 4 and 8 where they are

Each row is a run of `cat-audio pretrain` in processes of its own (torchrun where there are several), on synthesised
FLAC files of ten seconds; on a GPU on shards of them too, with data workers. Time, waiting for data and the share of
the matrix rate are from the run's metrics.jsonl, without its first updates; memory is the most that one of the
processes had, of the GPU where there is one; the start ends with the first update of the last process. What the
exchange of gradients takes is found in a run that exchanges them in every other update only, from pairs of neighbours.
Parity: on the CPU the losses of one process; on a GPU finite losses and no clip that could not be read.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader import write_clips
from benchmarks.memory import MIB
from benchmarks.pieces import SKIPPED
from benchmarks.results import Key, Parity, Results
from benchmarks.runner import Settings, arguments, finish, reason, say
from benchmarks.timing import ratio
from cat.data.shards.writing import write_shards
from cat.provenance import ROOT
from cat.training.records import read_rows
from cat.training.watching import STARVED, peak_memory

NEEDED = ("soundfile", "soxr", "yaml")  # to write, read and describe the data
AGREE = 1e-3  # relative difference of losses: rounding, which training makes larger
WORKERS = 12  # data workers of a process at most, as in recipes/base.yaml
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"preset": "tiny", "frames": 128, "updates": 12, "min_rounds": 3},
    "cuda": {"preset": "base", "frames": 1024, "updates": 80, "min_rounds": 1},
}


@dataclass(frozen=True)
class Case:
    """One way to train. ``clips`` an update, of all processes."""

    processes: int
    threads: int
    reads: str
    clips: int
    workers: int

    @property
    def name(self) -> str:
        one = self.processes == 1
        threads = f", {self.threads} threads" if self.threads > 1 and self.workers == 0 else ""
        return f"{self.processes} process{'' if one else 'es'}{threads}"


@dataclass
class Found:
    """Of the runs of a case: ms of every update, the records of the speed, losses, what each process said."""

    times: list[float] = field(default_factory=list)
    speeds: list[dict[str, float]] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    failed: int = 0
    memory: int = 0
    starts: list[float] = field(default_factory=list)
    exchange: list[float] = field(default_factory=list)


def cases(s: Settings, processes: list[int]) -> list[Case]:
    """On the CPU all have the same batch, and one process also as many threads as there are processes; GPUs have a
    batch each."""
    if s.device.type == "cpu":
        wanted = [(1, 1), *((n, 1) for n in processes if n > 1)]
        wanted += [(1, max(processes))] if max(processes) > 1 else []
        return [Case(n, threads, "files", s.clips, 0) for n, threads in wanted]
    cores = len(os.sched_getaffinity(0))
    workers = {n: max(1, min(WORKERS, cores // n)) for n in processes}
    return [Case(n, 1, reads, n * s.clips, workers[n]) for n in processes for reads in ("files", "shards")]


# ---------------------------------------------------------------- one run


def child(settings: Mapping[str, Any]) -> int:
    """In each process: train, and write down when the first update was done and how much memory it took."""
    from cat.commands import main as command
    from cat.training import loop, step
    from cat.training.parallel import gathering

    update = loop.Trainer._update
    found: dict[str, Any] = {}

    def first(self: loop.Trainer, pieces: Any) -> None:
        update(self, pieces)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found.update(start_s=time.time() - settings["began"], device=self.device)
        loop.Trainer._update = update  # type: ignore[method-assign]

    loop.Trainer._update = first  # type: ignore[method-assign]
    if settings["every_other"]:
        updates = iter(range(sys.maxsize))
        step.gathering = lambda module, *, last: gathering(module, last=last and next(updates) % 2 == 0)
    code = command(settings["argv"])
    if not code:
        device = found.pop("device")
        said = {**found, "memory": peak_memory(device)}
        Path(settings["said"], f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(said))
    return code


def start(case: Case, argv: list[str], said: Path, *, every_other: bool = False) -> list[dict[str, Any]]:
    """One run; what each of its processes said. Raises RuntimeError with its error."""
    said.mkdir()
    settings = {"argv": argv, "said": str(said), "every_other": every_other, "began": time.time()}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(case.processes), "--rdzv-backend", "c10d",
              "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    command = [sys.executable, *(launch if case.processes > 1 else []), "-m", "benchmarks.scaling"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(
        [*command, "--child", json.dumps(settings)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(next((line for line in lines if "error:" in line), lines[-1]))
    return [json.loads(path.read_text()) for path in sorted(said.iterdir())]


def recipe(s: Settings, case: Case, train: Path, updates: int, every: int) -> str:
    own = case.clips // case.processes
    return f"""
model: {{preset: {s.preset}}}
objective: {{global_loss_reduction: mean}}
masks: {{num_masks: {s.masks}}}
features: {{frames: {s.frames}}}
data: {{train: "{train}", global_batch: {case.clips}, batch_size: {own}, num_workers: {case.workers}, crop: random}}
optim: {{lr: 1.0e-4, warmup_steps: 1, steps: {updates}}}
run: {{device: {s.device.type}, precision: {s.dtypes[0]}, threads: {case.threads}, log_every: {every},
  eval_every: 0, checkpoint_every: {updates}, tensorboard: false, figures: false}}
"""


def train(s: Settings, case: Case, data: Path, updates: int, place: Path, found: Found) -> None:
    """Run a case once, and of several processes once more with gradients exchanged in every other update; add what was
    found."""
    every = 1 if s.device.type == "cpu" else min(10, max(1, updates // 4))
    (place / "scaling.yaml").write_text(recipe(s, case, data, updates, every))
    argv = ["pretrain", str(place / "scaling.yaml"), f"run.dir={place}", "--quiet"]
    said = start(case, [*argv, "run.name=run"], place / "said")
    speeds = read_rows(place / "run" / "metrics.jsonl", "speed")
    speeds = speeds[min(2, len(speeds) - 1) :]  # at first workers start and algorithms are searched
    found.speeds += speeds
    found.times += [1e3 * row["seconds"] / every for row in speeds]
    found.losses = [row["loss"] for row in read_rows(place / "run" / "metrics.jsonl", "train")]
    failures = place / "run" / "failures.jsonl"  # there where there was one
    found.failed += len(read_rows(failures)) if failures.exists() else 0
    found.memory = max(found.memory, *(process["memory"] for process in said))
    found.starts.append(max(process["start_s"] for process in said))
    if case.processes > 1:
        own = [*argv, "run.name=every-other", "run.log_every=1"]
        start(case, own, place / "said-every-other", every_other=True)
        times = [row["seconds"] for row in read_rows(place / "every-other" / "metrics.jsonl", "speed")]
        both, alone = times[2::2], times[3::2]
        shares = ratio(alone, both[: len(alone)])
        found.exchange.append(1 - shares.median)


# ---------------------------------------------------------------- rows


def work(found: Found, case: Case) -> dict[str, Any]:
    """What a row has beside its times."""
    seconds = sum(row["seconds"] for row in found.speeds)
    made = {
        "clips_a_second": 1e3 * case.clips / statistics.median(found.times),
        "data_wait": sum(row["data_wait"] * row["seconds"] for row in found.speeds) / seconds,
        "start_s": statistics.median(found.starts),
    }
    shares = [row["matrix_share"] for row in found.speeds if "matrix_share" in row]
    made |= {"matrix_share": statistics.median(shares)} if shares else {}
    return made | ({"exchange_share": statistics.median(found.exchange)} if found.exchange else {})


def parity(s: Settings, found: Found, one: Found) -> Parity:
    if not one.losses or any(loss is None or not math.isfinite(loss) for loss in found.losses):
        return Parity(math.nan, 0.0)
    if s.device.type == "cuda":
        return Parity(float(found.failed), 0.0)
    pairs = zip(found.losses, one.losses, strict=True)
    return Parity(max(abs(a - b) / abs(b) for a, b in pairs if a is not None and b), AGREE)


def rows(s: Settings, found: Mapping[Case, Found], failed: Mapping[Case, str]) -> Results:
    """Of all that has run so far."""
    results, one = Results(), next(iter(found.values()), Found())
    for case, its in found.items():
        shape = {"preset": s.preset, "clips": case.clips, "masks": s.masks, "frames": s.frames,
                 "processes": case.processes, "threads": case.threads, "workers": case.workers}  # fmt: skip
        key = Key(benchmark="scaling", mode=case.reads, dtype=s.dtypes[0], shape=shape)
        if case in failed:
            results.reject(key, case.name, failed[case])
            continue
        made = work(its, case)
        results.add(key, case.name, its.times, parity(s, its, one), peak_MiB=its.memory / MIB, work=made)
        if s.device.type == "cuda" and made["data_wait"] > STARVED:
            waits = f"waits {100 * made['data_wait']:.0f} % of the time for data, goal {100 * STARVED:.0f} %"
            results.notes.append(f"goal missed: {case.name}, {case.reads}: it {waits} ({case.workers} data workers)")
    most, cores = max(case.processes for case in found), len(os.sched_getaffinity(0))
    if s.device.type == "cpu" and most > cores:
        results.notes.append(f"scaling: {most} processes shared {cores} core(s), so that their times say nothing")
    return results


def write_data(folder: Path, clips: int, reads: set[str]) -> dict[str, Path]:
    files = write_clips(folder / "files", clips, "flac", 16_000, 1)
    if "shards" in reads:
        write_shards(files, folder / "shards")
    return {name: folder / name for name in ("files", "shards")}


def run(s: Settings, processes: list[int], updates: int) -> Results:
    """All cases, in turn, round after round; what has run is written at once."""
    wanted, found, failed, results = cases(s, processes), dict[Case, Found](), dict[Case, str](), Results()
    with tempfile.TemporaryDirectory() as temporary:
        clips = max(2 * s.clips, *(case.clips for case in wanted))
        data = write_data(Path(temporary), clips, {case.reads for case in wanted})
        for _, case in itertools.product(range(s.min_rounds), wanted):
            its = found.setdefault(case, Found())
            if case not in failed:
                try:
                    with tempfile.TemporaryDirectory(dir=temporary) as place:
                        train(s, case, data[case.reads], updates, Path(place), its)
                    say(f"{case.name}, {case.reads}: {statistics.median(its.times):.3g} ms an update")
                except RuntimeError as error:  # the others go on
                    failed[case] = reason(error)
                results = rows(s, found, failed)
                s.saver(results)()
    return results


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(json.loads(sys.argv[2]))
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(**dict.fromkeys(DEFAULTS["cpu"]))
    parser.add_argument("--updates", type=int, help="of each run (default 12 on the CPU, 80 on a GPU)")
    parser.add_argument("--processes", help="comma-separated (default 1,2; on GPUs 1,2,4,8 as far as there are)")
    options = parser.parse_args()
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        say(f"not run: {', '.join(lacking)} not installed here, without which no audio can be read")
        return SKIPPED
    for name, value in DEFAULTS["cpu" if options.device == "cpu" else "cuda"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    s = Settings.of(options, clips_cpu=16, clips_cuda=96)
    default = [1, 2] if s.device.type == "cpu" else [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    processes = [int(n) for n in options.processes.split(",")] if options.processes else default
    return finish(run(s, processes, options.updates), s, [])


if __name__ == "__main__":
    sys.exit(main())
