"""The result file of a run: machine, versions, rows. README.md tells the format.

A row enters the table only with a parity check passed in the same run; what fails is kept apart, with its reason.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Quantiles, ratio
from cat.provenance import made

FORMAT = 1
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Parity:
    """Distance to the reference, relative, and the distance allowed; NaN does not pass."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True, kw_only=True)
class Key:
    """What was measured: rows with equal keys but for the provider can be compared."""

    # "stem", "stem sweep", "stem resolutions", "kernels" (the stem's), "step", "fbank", "features" (in a step),
    # "fine-tuning", "inference", "loader", "checkpoint", "scaling" or an operator
    benchmark: str
    # "forward", "forward+backward", "dense forward", "step", "log-mel", "model input", "embedding", a format, a kernel
    mode: str
    dtype: str  # "fp32", "bf16", "fp16"
    shape: dict[str, Any]


@dataclass
class Results:
    """Rows and everything said about them; every part of a run fills one, and they are merged."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    multiply_adds: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, Any] = field(default_factory=dict)
    pieces: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        key: Key,
        provider: str,
        times_ms: list[float],
        parity: Parity | None,
        *,
        peak_MiB: float | None = None,
        persistent_MiB: float | None = None,
        work: dict[str, Any] | None = None,
    ) -> None:
        """Take in one row, or put it among the rejected where parity failed.

        Args:
            parity: None where `cat_kernels.spec.check_parity` has passed, which raises otherwise.
            peak_MiB: worst moment of one call above ``persistent_MiB``, the weights and optimiser state that stay.
            work: multiply_adds, bytes, floor_ms, overhead_us, ... where known; share_of_floor is computed from it.
        """
        if parity is not None and not parity.passed:
            self.reject(key, provider, f"parity: error {parity.error:.3g}, allowed {parity.limit:.3g}")
            return
        times = Quantiles.of(times_ms)
        row: dict[str, Any] = {
            **asdict(key),
            "provider": provider,
            "median_ms": times.median,
            "p20_ms": times.p20,
            "p80_ms": times.p80,
            "rounds": len(times_ms),
            "peak_MiB": peak_MiB,
            "persistent_MiB": persistent_MiB,
            "parity": "pass",
            "parity_error": parity.error if parity else None,
            "parity_limit": parity.limit if parity else None,
            **(work or {}),
        }
        if row.get("floor_ms"):
            row["share_of_floor"] = row["floor_ms"] / times.median
        self.rows.append(row)

    def reject(self, key: Key, provider: str, reason: str) -> None:
        self.rejected.append({**asdict(key), "provider": provider, "reason": reason})

    def forget(self, key: Key) -> None:
        """Drop rows and comparisons of a key, whoever the provider: they are about to be measured anew."""
        for rows in (self.rows, self.comparisons):
            rows[:] = [row for row in rows if any(row[name] != value for name, value in asdict(key).items())]

    def compare(
        self, key: Key, baseline: str, provider: str, times: dict[str, list[float]], peaks: dict[str, float | None]
    ) -> None:
        """Speed-up of ``provider`` over ``baseline``, pair by pair, where both have a row."""
        if baseline not in times or provider not in times:
            return
        speedup = ratio(times[baseline], times[provider])
        b, p = peaks.get(baseline), peaks.get(provider)
        self.comparisons.append(
            {
                **asdict(key),
                "provider": provider,
                "baseline": baseline,
                "speedup": speedup.median,
                "speedup_p20": speedup.p20,
                "speedup_p80": speedup.p80,
                "peak_memory_ratio": p / b if b and p else None,
            }
        )

    def speedup(self, benchmark: str, mode: str, dtype: str, baseline: str, provider: str) -> float | None:
        for c in self.comparisons:
            if (c["benchmark"], c["mode"], c["dtype"], c["baseline"], c["provider"]) == (
                benchmark, mode, dtype, baseline, provider,
            ):  # fmt: skip
                return c["speedup"]
        return None

    def merge(self, other: dict[str, Any]) -> None:
        """Take in the rows of a part's file, in place of earlier ones of the same candidate and shape."""
        for name in ("rows", "comparisons"):
            new = other.get(name, [])
            again = [_identity(row) for row in new]
            kept = [row for row in getattr(self, name) if _identity(row) not in again]
            setattr(self, name, kept + new)
        for name in ("rejected", "notes", "pieces"):
            getattr(self, name).extend(other.get(name, []))
        for name in ("multiply_adds", "ceilings", "parts", "starts", "tests"):
            getattr(self, name).update(other.get(name, {}))

    def as_dict(self, device: torch.device) -> dict[str, Any]:
        return {"format": FORMAT, **made(device), **asdict(self)}

    def write(self, path: Path, device: torch.device) -> None:
        """As JSON, all or nothing."""
        write_atomic(path, json.dumps(_finite(self.as_dict(device)), indent=1, allow_nan=False) + "\n")


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows, or two comparisons, one measurement made twice."""
    return tuple(row.get(name) for name in (*Key.__dataclass_fields__, "provider", "baseline"))


def write_atomic(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError where it is none."""
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a result file of the benchmarks") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is no result file of format {FORMAT}; measure again with this version")
    return data


def _finite(value: Any) -> Any:
    """NaN and infinity have no JSON; null says the same."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_path(device: torch.device) -> Path:
    """Where a run's results go unless told: by machine and date."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    else:
        name = f"cpu-{torch.get_num_threads()}core"
    return RESULTS / f"{name}-{date}.json"
