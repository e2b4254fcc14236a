"""What the benchmark scripts share: precisions, the candidates' interface, the parity check, one case from start to rows."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.results import Key, Parity, Results, cpu_flags, load
from benchmarks.timing import interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Parity: distance to the float32 reference <= 2 * that of the plain dense candidate in the same precision + this floor.
# The floor of fp32 is a tenth of what golden tensors are held to; the others are four roundings.
FLOOR = {"fp32": 2e-5, "bf16": 4 * 2.0**-7, "fp16": 4 * 2.0**-10}

Groups = dict[str, list[Tensor]]  # what is compared, e.g. {"tokens": [...], "gradients": [...]}


class Provider(Protocol):
    """One candidate of a case."""

    def call(self) -> object:
        """The work that is timed: the same every time."""

    def check(self) -> Groups:
        """The same work's results, for the parity check; leaves the candidate as it was."""

    def persistent_bytes(self) -> int:
        """Weights, optimiser state: what stays between calls."""


@dataclass
class Case:
    """Candidates that are compared with each other."""

    key: Key
    providers: dict[str, Callable[[], Provider]]
    baseline: str  # comparisons are against this one, and parity allows twice its error
    reference: Callable[[], Groups]
    work: dict[str, dict[str, Any]] = field(default_factory=dict)  # provider -> multiply_adds, floor_ms, ...
    peak: Callable[[str], float] | None = None  # peak MiB of a provider where the allocator does not tell it


def setup(device: torch.device, threads: int | None) -> None:
    """The same arithmetic for all: float32 means float32, in convolutions too (PyTorch's default there is TF32)."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")


def default_dtypes(device: torch.device) -> list[str]:
    """All three on a GPU; low precision only where the processor has matrix units for it."""
    if device.type == "cuda":
        return ["bf16", "fp16", "fp32"]
    return ["fp32", "bf16"] if cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"} else ["fp32"]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- parity


def distance(actual: Groups, reference: Groups) -> float:
    """Largest relative L2 distance of a group of tensors, all its tensors taken as one vector."""
    worst = 0.0
    for name, expected in reference.items():
        difference = norm = 0.0
        for a, e in zip(actual[name], expected, strict=True):
            if a.shape != e.shape:
                raise ValueError(f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}")
            wide = torch.promote_types(e.dtype, torch.float32)
            difference += float((a.to(wide) - e.to(wide)).square().sum(dtype=torch.float64))
            norm += float(e.to(wide).square().sum(dtype=torch.float64))
        error = (difference**0.5) / max(norm**0.5, 1e-30)
        worst = error if not error <= worst else worst  # NaN stays
    return worst


# ---------------------------------------------------------------- one case


def run_case(
    case: Case,
    results: Results,
    device: torch.device,
    *,
    budget_s: float,
    min_rounds: int = 3,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Build, check and time the candidates of a case; what cannot run is rejected with its reason, the others go on."""
    dtype = case.key.dtype
    reference = case.reference()
    alive: dict[str, Provider] = {}
    parity: dict[str, Parity] = {}
    peaks: dict[str, float | None] = {}
    baseline_error = 0.0
    for name in sorted(case.providers, key=lambda n: n != case.baseline):  # the baseline's error comes first
        began = time.perf_counter()
        try:
            provider = case.providers[name]()
            error = distance(provider.check(), reference)
            if name == case.baseline:
                # Its own error is the yardstick; it must still be small, or both could be wrong alike.
                parity[name] = Parity(error, 8 * FLOOR[dtype])
                baseline_error = error if parity[name].passed else 0.0
            else:
                parity[name] = Parity(error, 2 * baseline_error + FLOOR[dtype])
            provider.call()  # warm-up: what is allocated once is there before memory is counted
            if case.peak is None:
                peaks[name] = memory.peak_cuda(provider.call, device) if device.type == "cuda" else None
            alive[name] = provider
        except Exception as error_:  # the others go on, and the reason is in the results
            results.reject(case.key, name, reason(error_))
        provider = None
        if name not in alive:
            release()  # not before: the exception's frames hold the candidate's tensors
        synchronize(device)
        say(f"  {case.key.benchmark} {case.key.mode} {dtype} {name}: ready in {time.perf_counter() - began:.1f} s")
    del reference
    calls = {name: provider.call for name, provider in alive.items() if parity[name].passed}
    for name in alive:
        if name not in calls:
            results.add(case.key, name, [], parity[name])
    times = _timed(case, results, calls, device, budget_s, min_rounds)
    persistent = {name: provider.persistent_bytes() / memory.MIB for name, provider in alive.items()}
    del calls
    alive.clear()
    release()
    if case.peak is not None:
        for name in times:
            try:
                peaks[name] = case.peak(name)
            except Exception as error_:
                results.notes.append(reason(error_))
    for name in times:
        results.add(
            case.key,
            name,
            times[name],
            parity[name],
            peak_MiB=peaks.get(name),
            persistent_MiB=persistent[name],
            work=case.work.get(name),
        )
        if name != case.baseline:
            results.compare(case.key, case.baseline, name, times, peaks)
    save()


def _timed(
    case: Case,
    results: Results,
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget_s: float,
    min_rounds: int,
) -> dict[str, list[float]]:
    if not calls:
        return {}
    try:
        return interleaved(calls, device, warmup=1, min_rounds=min_rounds, budget_s=budget_s)
    except torch.OutOfMemoryError as error:  # together they need more than each alone
        for name in calls:
            results.reject(case.key, name, reason(error))
        return {}


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- command lines


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark script has."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: a GPU if there is one)",
    )
    add("--dtypes", help="comma-separated: fp32, bf16, fp16 (default: what this device has matrix units for)")
    add("--preset", default="base", help="size of the model: tiny, small, base (default), large")
    add("--clips", type=int, help="clips in the batch")
    add("--masks", type=int, default=4, help="masks a clip (default 4)")
    add("--frames", type=int, default=1024, help="frames a clip (default 1024, ten seconds)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--budget", type=float, help="seconds of timing a case")
    add("--min-rounds", type=int, default=3, help="rounds at least, whatever the budget (default 3)")
    add("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile candidates too (default: on a GPU)")
    add(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory (CPU: a process a candidate)"
    )
    add("--ceilings", type=Path, help="result file with the ceilings of this machine, for the shares of the floor")
    add("--out", type=Path, help="result file to write")
    add("--check", action="store_true", help="exit code 1 when a goal for this device is missed, or a row was rejected")
    return parser


@dataclass
class Settings:
    """Command line, made definite."""

    device: torch.device
    dtypes: list[str]
    preset: str
    clips: int
    masks: int
    frames: int
    threads: int
    budget_s: float
    min_rounds: int
    compiled: bool
    memory: bool
    ceilings: dict[str, Any]
    out: Path | None
    check: bool

    @staticmethod
    def of(
        options: argparse.Namespace,
        *,
        clips_cpu: int,
        clips_cuda: int,
        budget_cpu: float = 20.0,
        budget_cuda: float = 4.0,
    ) -> Settings:
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
        setup(device, options.threads)
        dtypes = options.dtypes.split(",") if options.dtypes else default_dtypes(device)
        unknown = [d for d in dtypes if d not in DTYPES]
        if unknown:
            raise SystemExit(f"--dtypes {options.dtypes}: unknown {unknown[0]!r}; expected some of {','.join(DTYPES)}")
        cuda = device.type == "cuda"
        return Settings(
            device=device,
            dtypes=dtypes,
            preset=options.preset,
            clips=options.clips or (clips_cuda if cuda else clips_cpu),
            masks=options.masks,
            frames=options.frames,
            threads=torch.get_num_threads(),
            budget_s=options.budget if options.budget is not None else (budget_cuda if cuda else budget_cpu),
            min_rounds=options.min_rounds,
            compiled=cuda if options.compiled is None else options.compiled,
            memory=options.memory,
            ceilings=load(options.ceilings)["ceilings"] if options.ceilings else {},
            out=options.out,
            check=options.check,
        )

    def saver(self, results: Results) -> Callable[[], None]:
        """Writes what there is so far: a run cut short keeps what it measured."""
        return lambda: results.write(self.out, self.device) if self.out else None


def skipped_dtypes(settings: Settings, results: Results) -> None:
    if settings.device.type == "cpu" and "bf16" not in settings.dtypes:
        results.notes.append(
            "bf16 not measured: this processor has no matrix units for it (--dtypes fp32,bf16 measures it all the same)"
        )


def floor_ms(multiply_adds: float, dtype: str, ceilings: Mapping[str, Any]) -> float | None:
    """Least time of that many multiply-adds at the matrix rate measured on this machine; None where it was not."""
    rate = ceilings.get(f"matmul_{dtype}_TFLOPS")
    return 2 * multiply_adds / (rate * 1e12) * 1e3 if rate else None


def finish(results: Results, settings: Settings, goals: Sequence[str]) -> int:
    """Write, tell what was rejected or missed, and give the exit code."""
    settings.saver(results)()
    for line in results.notes:
        say(f"note: {line}")
    for r in results.rejected:
        say(f"rejected: {r['benchmark']} {r['mode']} {r['dtype']} {r['provider']}: {r['reason']}")
    for goal in goals:
        say(f"missed: {goal}")
    return 1 if settings.check and (goals or results.rejected) else 0
