"""Every operator against its reference and against what PyTorch users write (`benchmarks.usual`), eager and compiled.

    python -m benchmarks.operators

For each: time and peak memory at base width (2 clips on a CPU, 96 on a GPU), the share of its time that moving its
least bytes at copy bandwidth takes, and what an eager call costs on the host. Stem and fbank have benchmarks of their
own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks import memory
from benchmarks.results import Key, Parity, Results
from benchmarks.runner import DTYPES, Settings, arguments, finish, reason, release, say, skipped_dtypes
from benchmarks.timing import interleaved, overhead_us
from benchmarks.usual import USUAL, comparable
from cat_kernels import spec as specification
from cat_kernels.spec import OperatorSpec, Sample
from cat_kernels.specs import specs

OWN_BENCHMARK = {"MultiResConv": "stem", "fbank": "fbank"}
PROVIDERS = ("reference", "operator")
COMPILED = " compiled"
# Relative distance of what users write to the reference: roundings in another order, or of other intermediates.
LIMIT = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}


def spec_named(name: str) -> OperatorSpec:
    return next(spec for spec in specs() if spec.name == name)


class OperatorProvider:
    """The operator, its reference or what users write, on the specification's benchmark inputs."""

    def __init__(self, spec: OperatorSpec, sample: Sample, name: str, mode: str, compiler: str = "inductor") -> None:
        usual = USUAL.get(spec.name, {}).get(name.removesuffix(COMPILED))
        self.function = getattr(spec, name) if usual is None else usual
        if name.endswith(COMPILED):
            self.function = torch.compile(self.function, dynamic=False, backend=compiler)
        backward = mode != "forward"
        self.inputs = specification.fresh(sample, requires_grad=backward)
        self.leaves = specification.floats([self.inputs[n] for n in sample.differentiable]) if backward else []
        self.incoming: list[torch.Tensor] | None = None

    def call(self) -> object:
        if not self.leaves:
            with torch.no_grad():
                return self.function(**self.inputs)
        outputs = specification.floats(self.function(**self.inputs))
        if self.incoming is None:
            # Of a loss: 1, as it comes from loss.backward().
            self.incoming = [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outputs]
        return specification.gradients(outputs, self.leaves, self.incoming)

    def persistent_bytes(self) -> int:
        tensors = [t for t in pytree.tree_leaves(self.inputs) if isinstance(t, torch.Tensor)]
        return specification.nbytes(*tensors)


def make_provider(name: str, operator: str, clips: int, dtype: str, mode: str) -> OperatorProvider:
    """For the process that measures memory on a CPU."""
    spec = spec_named(operator)
    torch.manual_seed(0)
    return OperatorProvider(spec, spec.benchmark(torch.device("cpu"), DTYPES[dtype], clips), name, mode)


def least_bytes(spec: OperatorSpec, inputs: Mapping[str, Any], mode: str) -> int | None:
    if spec.bytes_forward is None or (mode != "forward" and spec.bytes_backward is None):
        return None
    return spec.bytes_forward(inputs) + (spec.bytes_backward(inputs) if mode != "forward" else 0)


def host_overhead(spec: OperatorSpec, name: str, device: torch.device) -> float:
    """Microseconds of one call on the smallest sample."""
    sample = next(iter(spec.samples(device, torch.float32)))
    inputs = specification.clone_tensors(dict(specification.fresh(sample, requires_grad=False)))
    with torch.no_grad():
        return overhead_us(lambda: getattr(spec, name)(**inputs), device)


def usual_names(spec: OperatorSpec, s: Settings) -> list[str]:
    names = list(USUAL.get(spec.name, {}))
    return names + ([name + COMPILED for name in names] if s.compiled else [])


def apart(spec: OperatorSpec, sample: Sample, name: str) -> float:
    """Largest relative distance of a usual formulation's results to the reference's."""
    found = []
    for function in (USUAL[spec.name][name.removesuffix(COMPILED)], spec.reference):
        inputs = specification.clone_tensors(dict(sample.inputs))
        outputs = function(**inputs)
        results = specification.floats(outputs)
        found.append(
            comparable(spec.name, inputs, results[: len(inputs[spec.mutates[0]])] if spec.mutates else results)
        )
    distances = [
        float((a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
        for a, e in zip(*found, strict=True)
    ]
    return max(distances)


def measure(spec: OperatorSpec, dtype: str, s: Settings, results: Results) -> None:
    """Rows of one operator in one dtype: forward, and forward + backward where it has one."""
    torch.manual_seed(0)
    sample = spec.benchmark(s.device, DTYPES[dtype], s.clips)
    modes = ["forward"] + (["forward+backward"] if sample.differentiable else [])
    overhead = {name: host_overhead(spec, name, s.device) for name in PROVIDERS}
    keys = {mode: Key(benchmark=spec.name, mode=mode, dtype=dtype, shape={"clips": s.clips}) for mode in modes}
    try:
        specification.check_parity(spec, sample)
    except AssertionError as error:
        for key in keys.values():
            results.reject(key, "operator", f"parity: {error}")
        return
    usual = usual_names(spec, s)
    parity = {name: Parity(apart(spec, sample, name), LIMIT[dtype]) for name in usual}
    for mode, key in keys.items():
        names = [*PROVIDERS, *(name for name in usual if parity[name].passed)]
        for name in set(usual) - set(names):
            results.add(key, name, [], parity[name])  # among the rejected
        providers = {name: OperatorProvider(spec, sample, name, mode, s.compiler) for name in names}
        calls = {name: provider.call for name, provider in providers.items()}
        peaks = {name: peak(spec, name, providers[name], dtype, mode, s, results) for name in names}
        times = interleaved(calls, s.device, warmup=2, min_rounds=s.min_rounds, budget_s=s.budget_s)
        bytes_moved = least_bytes(spec, sample.inputs, mode)
        bandwidth = s.ceilings.get("copy_GBps")
        floor = bytes_moved / (bandwidth * 1e9) * 1e3 if bytes_moved and bandwidth else None
        for name in names:
            work = {"bytes": bytes_moved, "floor_ms": floor, "overhead_us": overhead.get(name)}
            results.add(
                key,
                name,
                times[name],
                parity.get(name),
                peak_MiB=peaks[name],
                persistent_MiB=providers[name].persistent_bytes() / memory.MIB,
                work=work,
            )
        for name in ("reference", *names[len(PROVIDERS) :]):
            results.compare(key, name, "operator", times, peaks)
        del providers, calls
        release()


def peak(
    spec: OperatorSpec, name: str, provider: OperatorProvider, dtype: str, mode: str, s: Settings, results: Results
) -> float | None:
    provider.call()
    if s.device.type == "cuda":
        return memory.peak_cuda(provider.call, s.device)
    if not s.memory:
        return None
    try:
        settings = {"name": name, "operator": spec.name, "clips": s.clips, "dtype": dtype, "mode": mode}
        return memory.peak_in_fresh_process("operators", settings, threads=s.threads)
    except Exception as error:
        results.notes.append(reason(error))
        return None


def run(s: Settings, only: Sequence[str] | None = None) -> Results:
    results = Results()
    skipped_dtypes(s, results)
    unknown = set(only or ()) - {spec.name for spec in specs()}
    if unknown:
        raise SystemExit(f"--only: unknown operator {sorted(unknown)[0]!r}; known: {_names()}")
    for spec in specs():
        if only is not None and spec.name not in only:
            continue
        for dtype in s.dtypes:
            if DTYPES[dtype] not in spec.dtypes:
                continue
            guarded(functools.partial(one, spec, dtype, s, results), spec, dtype, s, results)
            s.saver(results)()
            release()
    return results


def _names() -> str:
    return ", ".join(spec.name for spec in specs())


def one(spec: OperatorSpec, dtype: str, s: Settings, results: Results) -> None:
    if spec.name in OWN_BENCHMARK or spec.benchmark is None:
        cost = host_overhead(spec, "operator", s.device)
        where = f"; its times are those of benchmarks.{OWN_BENCHMARK[spec.name]}" if spec.name in OWN_BENCHMARK else ""
        results.notes.append(f"{spec.name}: a call takes {cost:.0f} us on the host{where}")
        return
    measure(spec, dtype, s, results)


def guarded(call: Callable[[], None], spec: OperatorSpec, dtype: str, s: Settings, results: Results) -> None:
    """An operator that fails is reported; the others go on."""
    say(f"  {spec.name} {dtype}")
    try:
        call()
    except Exception as error:
        key = Key(benchmark=spec.name, mode="forward", dtype=dtype, shape={"clips": s.clips})
        results.reject(key, "operator", reason(error))


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", help="comma-separated names of operators (default: all)")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else None
    s = Settings.of(options, clips_cpu=2, clips_cuda=96, budget_cpu=2, budget_cuda=0.5)
    results = run(s, only)
    for r in results.rows:
        share = f"{100 * r['share_of_floor']:.1f} % of the copy bandwidth" if r.get("share_of_floor") else ""
        cost = f"{r['overhead_us']:.0f} us a call" if r["mode"] == "forward" and r["overhead_us"] else ""
        say(f"{r['benchmark']} {r['mode']} {r['dtype']} {r['provider']}: {r['median_ms']:.3f} ms {share} {cost}")
    return finish(results, s, [])


if __name__ == "__main__":
    sys.exit(main())
