"""What representation regularisation costs, in memory and time: without it, with cached embeddings, with a live guide.

Linux tells how much memory processes have of their own and of what they share (PSS); elsewhere that column is empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cat.data import load_manifest
from cat.encoders import build_encoder
from cat.encoders.embed import write_embeddings
from cat.experiments.verdict import Verdict
from cat.model import GuideConfig
from cat.progress import say
from cat.training.pretraining import Pretraining
from cat.training.recipe import PretrainConfig, pick_device

TOLERANCE = 1e-3  # of the losses of live and cached guides, as a share; on a GPU in bf16 twenty times that
_WARM_UP = 3  # updates besides those whose batches the workers have ready
_EVERY = 0.25  # seconds between two looks at the memory


def overhead(
    config: PretrainConfig,
    out: Path,
    *,
    encoder: str,
    weight: float = 1.0,
    steps: int = 8,
    rounds: int = 3,
    progress: bool = True,
) -> Verdict:
    """Times ``steps`` updates on ``data.train`` without a guide, with the cached embeddings of ``encoder`` (a name as
    `build_encoder` takes it), and with it live in the data workers and in the training process.

    Each is a process of its own, and they take turns, ``rounds`` times: what is compared are ratios within a round.
    Nothing is saved but the embeddings. Passes when live and cached losses are the same, up to rounding.
    """
    manifest = load_manifest(config.data.train)
    began = time.perf_counter()
    frozen = build_encoder(encoder, device=pick_device(config.run.device))
    written, _ = write_embeddings(manifest, frozen, out / "embeddings.npy", progress=progress)
    embedding_ms = 1e3 * (time.perf_counter() - began) / len(manifest)
    del frozen
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(out / "embeddings.jsonl")))
    guides = {
        "without": None,
        "cached": GuideConfig(weight, embeddings=str(out / "embeddings.jsonl")),
        "live, data workers": GuideConfig(weight, encoder=encoder, where="worker"),
        "live, training process": GuideConfig(weight, encoder=encoder, where="device"),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in guides}
    for number in range(rounds):
        for name, guide in guides.items():
            changed = dataclasses.replace(plain, guides={} if guide is None else {"measured": guide})
            found[name].append(_in_a_process(changed, steps))
            if progress:
                last = found[name][-1]
                say(f"round {number + 1} of {rounds}, {name}: {last['seconds']:.3f} s/step, {_mib(last['memory'])} MiB")
    return _verdict(found, encoder, embedding_ms, config, len(written), steps)


def _verdict(
    found: Mapping[str, list[dict[str, Any]]],
    encoder: str,
    embedding_ms: float,
    config: PretrainConfig,
    clips: int,
    timed: int,
) -> Verdict:
    rows: list[Sequence[str]] = []
    values: dict[str, dict[str, Any]] = {}
    for name, runs in found.items():
        ratios = {}
        for key in ("seconds", "cpu"):
            pairs = zip(runs, found["without"], strict=True)
            ratios[key] = _median([run[key] and run[key] / base[key] for run, base in pairs])
        memory = {key: _median([run[key] for run in runs]) for key in ("memory", "gpu_memory")}
        more = {key: _less(value, _median([run[key] for run in found["without"]])) for key, value in memory.items()}
        values[name] = {key: _median([run[key] for run in runs]) for key in ratios}
        values[name] |= {"ratio": ratios["seconds"], "cpu_ratio": ratios["cpu"], **memory}
        rows.append(
            (
                name,
                *(cell for key, ratio in ratios.items() for cell in (_number(values[name][key], 3), _number(ratio, 2))),
                *(cell for key, value in memory.items() for cell in (_mib(value), _mib(more[key]))),
                f"{runs[0]['losses'][0]:.5f}",
            )
        )
    cached = found["cached"][0]["losses"]
    gaps = {
        name: max(abs(a - b) / abs(b) for a, b in zip(runs[0]["losses"], cached, strict=True))
        for name, runs in found.items()
        if name.startswith("live")
    }
    limit = TOLERANCE * (20 if pick_device(config.run.device).type == "cuda" else 1)
    costs = ", ".join(f"{row[0]} {row[2]}" + (f" (CPU {row[4]})" if row[4] else "") for row in rows[1:])
    return Verdict(
        passed=max(gaps.values()) <= limit,
        text=f"a step takes, against one without regularisation: {costs}. Live and cached losses differ by a "
        f"share of {max(gaps.values()):.1g} at the most (needed: {limit:g})",
        columns=("guide", "s/step", "ratio", "CPU s/step", "ratio", "MiB", "more", "GPU MiB", "more", "first loss"),
        rows=rows,
        notes=[
            f"{encoder}: {embedding_ms:.1f} ms a clip to cache, once. Batches of {config.data.batch_size}, "
            f"{config.data.num_workers} data workers; medians of {len(found['without'])} rounds of {timed} updates "
            f"after {len(cached) - timed} to warm up. CPU s, MiB: of all processes; memory that "
            "they share counts once."
        ],
        values={"encoder": encoder, "clips": clips, "embedding_ms": embedding_ms, "gaps": gaps, "found": values},
    )


def _in_a_process(config: PretrainConfig, steps: int) -> dict[str, Any]:
    """Seconds a step, the losses, and the most memory (bytes) that the process and its workers took."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        with _watched(process.submit(os.getpid).result()) as most:
            result = process.submit(_train, config, steps).result()
        return {**result, "memory": max(most, default=None)}


def _train(config: PretrainConfig, steps: int) -> dict[str, Any]:
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    task = Pretraining(config, load_manifest(config.data.train))
    task.train_mode()
    cuda = task.device.type == "cuda"
    warm_up = _WARM_UP + config.data.prefetch * config.data.num_workers
    batches, losses, began, spent = task.batches(0, warm_up + steps, say), [], 0.0, None
    for step in range(warm_up + steps):
        if step == warm_up:
            if cuda:
                torch.cuda.synchronize(task.device)
            began, spent = time.perf_counter(), _cpu_seconds()
        losses.append(task.train(next(batches), step)[0][0].clone())
    total = float(torch.stack(losses).sum())  # which waits for the device
    seconds = (time.perf_counter() - began) / steps
    next(batches, None)  # the workers end, and what they spent is known
    cpu = None if spent is None else (_cpu_seconds() - spent) / steps  # type: ignore[operator]
    if total != total:
        raise RuntimeError("the loss is not finite; try another encoder or a lower weight")
    gpu = torch.cuda.max_memory_allocated(task.device) if cuda else None
    return {"seconds": seconds, "cpu": cpu, "losses": torch.stack(losses).tolist(), "gpu_memory": gpu}


def _cpu_seconds() -> float | None:
    """Spent by this process and those below it, ended ones too; None where living ones do not tell."""
    if not Path("/proc/self/stat").exists():
        return None
    ended, living = os.times(), 0
    for process in _below(os.getpid())[1:]:
        with contextlib.suppress(OSError):  # it has ended
            fields = process.joinpath("stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            living += int(fields[11]) + int(fields[12])
    return time.process_time() + ended.children_user + ended.children_system + living / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- memory


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """What a process and those below it have together, now and again; in bytes."""
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_EVERY):
            if (taken := _memory(pid)) is not None:
                seen.append(taken)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _memory(pid: int) -> int | None:
    total = None
    for process in _below(pid):
        with contextlib.suppress(OSError, IndexError):  # it has ended, or this is not Linux
            shares = process.joinpath("smaps_rollup").read_text(encoding="ascii").split("\nPss:")[1]
            total = (total or 0) + 1024 * int(shares.split()[0])
    return total


def _below(pid: int) -> list[Path]:
    """The folders in /proc of a process and of those that it has started, and so on."""
    found = [Path("/proc", str(pid))]
    for process in found:  # which grows
        with contextlib.suppress(OSError):
            for thread in process.joinpath("task").iterdir():
                children = thread.joinpath("children").read_text(encoding="ascii").split()
                found += [Path("/proc", child) for child in children]
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"
