"""What the benchmark scripts share: precisions, the candidates' interface, parity, a case from start to rows."""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.results import Key, Parity, Results, load
from benchmarks.timing import interleaved
from cat.provenance import cpu_flags

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Parity: distance to the float32 reference <= 2 * that of the plain dense candidate in the same precision + this floor.
# The floor of fp32 is half of what golden tensors are held to; the others are four roundings.
FLOOR = {"fp32": 1e-4, "bf16": 4 * 2.0**-7, "fp16": 4 * 2.0**-10}

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
    checked: Callable[[str], Provider] | None = None  # what is held to the reference, where that is of fewer clips


def setup(device: torch.device, threads: int | None) -> None:
    """The same arithmetic for all: float32 means float32, in convolutions too (PyTorch's default there is TF32); cuDNN
    searches for its fastest algorithm, as in pre-training."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # "cuda" alone is an error there
        torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def unsearched() -> Iterator[None]:
    """For what is computed once, for a check: cuDNN does not time its algorithms, which takes seconds a shape."""
    searches, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searches


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
    errors = [0.0]
    for name, expected in reference.items():
        difference = norm = 0.0
        for a, e in zip(actual[name], expected, strict=True):
            if a.shape != e.shape:
                raise ValueError(f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}")
            wide = torch.promote_types(e.dtype, torch.float32)
            difference += float((a.to(wide) - e.to(wide)).square().sum(dtype=torch.float64))
            norm += float(e.to(wide).square().sum(dtype=torch.float64))
        errors.append(difference**0.5 / max(norm**0.5, 1e-30))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


# ---------------------------------------------------------------- one case

PRODUCT = "matrix product"  # PyTorch's own, among the candidates of a round: the rate that the others are held to
PRODUCT_SIDE = 1024


def square_product(dtype: str) -> Callable[[], object]:
    a, b = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(DTYPES[dtype]) for _ in range(2))
    return lambda: a @ b


class CaseRun:
    """The candidates of a case, built, checked and timed stage by stage."""

    def __init__(self, case: Case, results: Results, device: torch.device) -> None:
        self.case, self.results, self.device = case, results, device
        began = time.perf_counter()
        with unsearched():
            self.reference = case.reference()
        key = case.key
        say(f"  {key.benchmark} {key.mode} {key.dtype} reference: ready in {time.perf_counter() - began:.1f} s")
        self.alive: dict[str, Provider] = {}
        self.parity: dict[str, Parity] = {}
        self.peaks: dict[str, float | None] = {}

    def prepare(self, name: str) -> None:
        """Build and check one candidate; one that cannot run is rejected with its reason."""
        began = time.perf_counter()
        try:
            provider = self.case.providers[name]()
            checked = self.case.checked(name) if self.case.checked else provider
            parity = self._parity(name, distance(checked.check(), self.reference))
            if parity.passed:
                if self.device.type == "cuda":
                    provider.call()  # what is allocated once is there before memory is counted
                    self.peaks[name] = memory.peak_cuda(provider.call, self.device)
                self.alive[name], self.parity[name] = provider, parity
            else:
                self.results.add(self.case.key, name, [], parity)
        except Exception as error:  # the others go on
            self.results.reject(self.case.key, name, reason(error))
        provider = None
        if name not in self.alive:
            release()  # not before: the exception's frames hold the candidate's tensors
        key = self.case.key
        say(f"  {key.benchmark} {key.mode} {key.dtype} {name}: ready in {time.perf_counter() - began:.1f} s")

    def _parity(self, name: str, error: float) -> Parity:
        floor = FLOOR[self.case.key.dtype]
        if name == self.case.baseline:  # the yardstick must be small itself, or both could be wrong alike
            return Parity(error, 8 * floor)
        yardstick = self.parity.get(self.case.baseline)
        return Parity(error, 2 * yardstick.error + floor if yardstick else floor)

    def measure(self, *, budget_s: float, min_rounds: int) -> None:
        """Time all that are ready, in turn, and write their rows in place of earlier ones."""
        if not self.alive:
            return
        key, calls = self.case.key, {name: provider.call for name, provider in self.alive.items()}
        timed = [work for work in self.case.work.values() if "multiply_adds" in work and "bytes" not in work]
        if by_product := self.device.type == "cpu" and bool(timed):
            calls[PRODUCT] = square_product(key.dtype)
        try:
            times = interleaved(calls, self.device, min_rounds=min_rounds, budget_s=budget_s)
        except RuntimeError as error:  # e.g. together they need more than each alone
            for name in calls:
                self.results.reject(key, name, reason(error))
            return
        self.results.forget(key)
        if by_product:  # the floors at the rate of these very rounds: a CPU's does not stay what it was
            product_ms = statistics.median(times.pop(PRODUCT))
            for work in timed:
                work["floor_ms"] = work["multiply_adds"] / PRODUCT_SIDE**3 * product_ms
        for name, provider in self.alive.items():
            self.results.add(
                key,
                name,
                times[name],
                self.parity[name],
                peak_MiB=self._peak(name),
                persistent_MiB=provider.persistent_bytes() / memory.MIB,
                work=self.case.work.get(name),
            )
        for name in self.alive:
            if name != self.case.baseline:
                self.results.compare(key, self.case.baseline, name, times, self.peaks)

    def _peak(self, name: str) -> float | None:
        if name not in self.peaks and self.case.peak is not None:
            try:
                self.peaks[name] = self.case.peak(name)
            except Exception as error:
                self.peaks[name] = None
                self.results.notes.append(reason(error))
        return self.peaks.get(name)


def run_case(
    case: Case, results: Results, settings: Settings, *, stages: Sequence[Sequence[str]] | None = None
) -> None:
    """Build, check and time the candidates of a case.

    stages: names, the baseline among the first; after each stage all candidates so far are timed and the results
        written, so that one that takes too long to compile costs only its own row. Default: one stage.
    """
    try:
        running = CaseRun(case, results, settings.device)
        for stage in stages or [list(case.providers)]:
            for name in sorted(stage, key=lambda n: n != case.baseline):
                running.prepare(name)
            running.measure(budget_s=settings.budget_s, min_rounds=settings.min_rounds)
            settings.saver(results)()
    except Exception as error:  # e.g. no memory for the reference
        results.reject(case.key, "all", reason(error))
    running = None
    release()


def speedup_line(c: Mapping[str, Any]) -> str:
    """A comparison in words."""
    saved = f", peak memory {c['peak_memory_ratio']:.2f} of its" if c["peak_memory_ratio"] else ""
    resolutions = f", resolutions {c['shape']['resolutions']}" if "resolutions" in c["shape"] else ""
    return (
        f"{c['benchmark']} {c['mode']} {c['dtype']} {c['shape']['clips']} clips{resolutions}: {c['provider']} is "
        f"{c['speedup']:.2f}x {c['baseline']} ({c['speedup_p20']:.2f} to {c['speedup_p80']:.2f}){saved}"
    )


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
    add("--compiler", default="inductor", help="backend of torch.compile (default inductor)")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory, on a CPU too (default)")
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
    compiler: str
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
            compiler=options.compiler,
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
