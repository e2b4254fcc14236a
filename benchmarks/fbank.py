"""Log-mel features: the extension against what else makes them, and their share of a pre-training step.

    python -m benchmarks.fbank            # 16 clips of ten seconds on a CPU, 96 on a GPU
    python -m benchmarks.fbank --check    # on a CPU fails below 3x torchaudio's file, clip by clip on the same threads

Two results: "log-mel" is what all candidates make. "model input" is also padded to 1024 frames and normalised with
AudioSet's statistics; kaldi-native-fbank and librosa have no part in it. Precisions are those of the result.

Shapes: B clips, n samples, T frames, F mel bins.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, others
from benchmarks.results import Key, Parity, Results
from benchmarks.runner import DTYPES, Settings, arguments, finish, reason, release, say, speedup_line
from benchmarks.step_time import StepProvider
from benchmarks.timing import interleaved, overhead_us
from cat_kernels import backends, fbank
from cat_kernels.mel.reference import FbankSettings, fbank_reference
from cat_kernels.mel.spec import AUDIOSET

CPU_GOAL = 3.0  # log-mel in fp32, against torchaudio's file
GPU_GOAL_MS = 0.080  # 96 clips of ten seconds
BASELINE = "torchaudio"
GRAPH = "native, CUDA graph"
STEP_CLIPS = 2  # of the step that features are a share of

# Allowed on log-mel energies of noise: within 12 nats of the clip's largest, at the 99.9th percentile, and anywhere.
NEAR, PERCENTILE, ANYWHERE = 1e-3, 3e-4, 3e-3

Call = Callable[[], Any]


# ---------------------------------------------------------------- candidates


def waveforms(clips: int, frames: int, device: torch.device) -> Tensor:
    """(B, n) noise; ``frames`` is that of the model's input, 1024 for ten seconds."""
    generator = torch.Generator().manual_seed(1)
    return (0.1 * torch.randn(clips, frames * 160_000 // 1024, generator=generator)).to(device)


def options_of(mode: str, frames: int) -> dict[str, Any]:
    return {**AUDIOSET, "target_length": frames} if mode == "model input" else {}


def candidates(mode: str, dtype: str, wave_BN: Tensor, s: Settings) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Name and maker of every candidate there is on this device; the baseline first."""
    options, out, cuda = options_of(mode, s.frames), DTYPES[dtype], s.device.type == "cuda"
    yield BASELINE, lambda: lambda: torchaudio_clips(wave_BN, out, **options)
    yield "torch", lambda: lambda: fbank(wave_BN, dtype=out, backend="torch", **options)
    if s.compiled:
        yield "torch compiled", lambda: compiled(wave_BN, out, s.compiler, **options)
    if not cuda and (mode, dtype) == ("log-mel", "fp32"):
        yield "kaldi-native-fbank", lambda: kaldi_clips(wave_BN)
        yield "librosa", lambda: librosa_clips(wave_BN)
    yield "native", lambda: lambda: fbank(wave_BN, dtype=out, backend="native", **options)
    if cuda:
        yield GRAPH, lambda: graphed(lambda: fbank(wave_BN, dtype=out, backend="native", **options))


def why_not(name: str, device: torch.device) -> str | None:
    """Why a candidate is left out here, which is no failure."""
    if name in ("torchaudio", "kaldi-native-fbank", "librosa"):
        return others.why_not(name)
    return backends.why_not("fbank", name.split(",")[0], device.type) if name.startswith("native") else None


def torchaudio_clips(
    wave_BN: Tensor,
    dtype: torch.dtype,
    target_length: int | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> list[Tensor] | Tensor:
    """Clip by clip, as data pipelines call it; log-mel energies stay a list."""
    specs = [others.torchaudio_fbank(wave_N) for wave_N in wave_BN]
    if target_length is None or mean is None or std is None:
        return [spec_TF.to(dtype) for spec_TF in specs]
    pad = torch.nn.functional.pad
    spec_BTF = torch.stack([pad(spec, (0, 0, 0, target_length - len(spec))) for spec in specs])
    return ((spec_BTF - mean) / (2 * std)).to(dtype)


def kaldi_clips(wave_BN: Tensor) -> Call:
    samples = wave_BN.tolist()
    return lambda: [others.kaldi_fbank(clip, low_freq=25.0) for clip in samples]


def librosa_clips(wave_BN: Tensor) -> Call:
    samples = wave_BN.numpy()
    return lambda: others.librosa_log_mel(samples)


def compiled(wave_BN: Tensor, dtype: torch.dtype, compiler: str, **options: Any) -> Call:
    """The formula, which a compiler can look into; the operator would be a black box to it."""
    formula = torch.compile(
        lambda wave: fbank_reference(wave, None, FbankSettings(), **options).to(dtype),
        dynamic=False,
        backend=compiler,
    )
    return lambda: formula(wave_BN)


def graphed(call: Call) -> Call:
    """A call that replays a CUDA graph of ``call``: its time is the device's, whatever a launch costs the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # tables are made and copied before the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# ---------------------------------------------------------------- parity


def expected(name: str, mode: str, wave_BN: Tensor, frames: int) -> Tensor:
    """(B, T, F) float64: the formula; librosa's own, which is another, for librosa."""
    if name == "librosa":
        return others.librosa_formula(wave_BN.double())
    settings = FbankSettings(low_freq=25.0) if name == "kaldi-native-fbank" else FbankSettings()
    return fbank_reference(wave_BN.double(), None, settings, **options_of(mode, frames))


def parity(result: Any, expected_BTF: Tensor, std: float | None = None) -> Parity:
    """The worst of the three errors as a multiple of what is allowed; half a rounding of the result's type is free.

    std: of normalised features, whose errors count as those of the log-mel energies they came from.
    """
    spec_BTF = torch.stack(list(result)) if isinstance(result, list) else torch.as_tensor(result)
    if spec_BTF.shape != expected_BTF.shape:
        raise ValueError(f"shape {tuple(spec_BTF.shape)}, expected {tuple(expected_BTF.shape)}")
    nats = 2 * std if std else 1.0
    free_BTF = expected_BTF.abs() * (0 if spec_BTF.dtype == torch.float32 else torch.finfo(spec_BTF.dtype).eps / 2)
    error_BTF = ((spec_BTF.double() - expected_BTF).abs() - free_BTF).clamp(min=0) * nats
    loud_BTF = expected_BTF > expected_BTF.amax(dim=(1, 2), keepdim=True) - 12 / nats
    percentile = error_BTF.flatten().kthvalue(max(1, int(0.999 * error_BTF.numel()))).values
    worst = torch.stack([error_BTF[loud_BTF].max() / NEAR, percentile / PERCENTILE, error_BTF.max() / ANYWHERE])
    return Parity(float(worst.max()), 1.0)


# ---------------------------------------------------------------- timing


def prepare(mode: str, dtype: str, wave_BN: Tensor, key: Key, s: Settings, results: Results) -> dict[str, Any]:
    """The calls of all candidates that can run and whose result is right, with parity and peak memory."""
    ready: dict[str, Any] = {}
    for name, make in candidates(mode, dtype, wave_BN, s):
        missing = why_not(name, s.device)
        if missing:
            results.notes.append(f"fbank: {name} not measured: {missing}")
            continue
        say(f"  fbank {mode} {dtype} {name}")
        try:
            call = make()
            result = call()
            checked = parity(result, expected(name, mode, wave_BN, s.frames), options_of(mode, s.frames).get("std"))
            del result
            peak = memory.peak_cuda(call, s.device) if s.device.type == "cuda" and name != GRAPH else None
        except Exception as error:  # the others go on
            results.reject(key, name, reason(error))
            continue
        if checked.passed:
            ready[name] = call, checked, peak
        else:
            results.add(key, name, [], checked)
        release()
    return ready


def measure(mode: str, dtype: str, s: Settings, results: Results) -> None:
    """Rows of one result in one precision."""
    wave_BN = waveforms(s.clips, s.frames, s.device)
    key = Key(benchmark="fbank", mode=mode, dtype=dtype, shape={"clips": s.clips, "samples": wave_BN.shape[1]})
    ready = prepare(mode, dtype, wave_BN, key, s, results)
    if not ready:
        return
    calls = {name: call for name, (call, _, _) in ready.items()}
    peaks = {name: peak for name, (_, _, peak) in ready.items()}
    rounds = 200 if s.device.type == "cuda" else 50
    times = interleaved(calls, s.device, warmup=2, min_rounds=s.min_rounds, max_rounds=rounds, budget_s=s.budget_s)
    work = least_work(mode, dtype, wave_BN, s)
    for name, (_, checked, peak) in ready.items():
        results.add(key, name, times[name], checked, peak_MiB=peak, work=work)
    baseline = BASELINE if BASELINE in ready else "torch"
    for name in ready:
        if name != baseline:
            results.compare(key, baseline, name, times, peaks)


def least_work(mode: str, dtype: str, wave_BN: Tensor, s: Settings) -> dict[str, Any]:
    """Bytes of waveforms and result, and the time to move them at copy bandwidth."""
    spec_BTF = fbank(wave_BN.to("meta"), dtype=DTYPES[dtype], **options_of(mode, s.frames))
    moved, bandwidth = wave_BN.nbytes + spec_BTF.nbytes, s.ceilings.get("copy_GBps")
    return {"bytes": moved, "floor_ms": moved / (bandwidth * 1e9) * 1e3 if bandwidth else None}


def host_cost(s: Settings, results: Results) -> None:
    wave_BN = waveforms(1, 64, s.device)
    costs = {
        name: overhead_us(lambda name=name: fbank(wave_BN, backend=name), s.device)
        for name in ("native", "torch")
        if why_not(name, s.device) is None
    }
    told = ", ".join(f"{name} {cost:.0f} us" for name, cost in costs.items())
    results.notes.append(f"fbank: a call on one short clip takes on the host: {told}")


# ---------------------------------------------------------------- share of a step


def measure_share(s: Settings, results: Results) -> None:
    """Features of a batch, in turn with a pre-training step on that batch."""
    shape = {"preset": s.preset, "clips": STEP_CLIPS, "masks": s.masks, "frames": s.frames}
    key = Key(benchmark="features", mode="model input", dtype="fp32", shape=shape)
    wave_BN = waveforms(STEP_CLIPS, s.frames, s.device)
    only = {name: make for name, make in candidates("model input", "fp32", wave_BN, s) if "compiled" not in name}
    calls = {name: make() for name, make in only.items() if why_not(name, s.device) is None}
    target, std = expected(BASELINE, "model input", wave_BN, s.frames), AUDIOSET["std"]
    checked = {name: parity(call(), target, std) for name, call in calls.items()}
    step = StepProvider("visible", shape, "fp32", s.device)
    times = interleaved({**calls, "step": step.call}, s.device, min_rounds=s.min_rounds, budget_s=s.budget_s)
    step_ms = statistics.median(times["step"])
    for name in calls:
        share = statistics.median(times[name]) / step_ms
        results.add(key, name, times[name], checked[name], work={"step_ms": step_ms, "share_of_step": share})


# ---------------------------------------------------------------- command line


def run(s: Settings) -> Results:
    results = Results()
    with torch.no_grad():
        for dtype in s.dtypes:
            for mode in ("log-mel", "model input"):
                measure(mode, dtype, s, results)
                s.saver(results)()
                release()
        host_cost(s, results)
    if s.device.type == "cpu":
        measure_share(s, results)
    results.notes[:] = dict.fromkeys([*results.notes, *versions(), *device_time(results)])
    return results


def versions() -> list[str]:
    found = {name: others.version(name) for name in ("torchaudio", "kaldi-native-fbank", "librosa")}
    told = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return [f"fbank: compared with {told}"] if told else []


def device_time(results: Results) -> list[str]:
    """On a GPU: what the kernel takes without its launch, against the goal and what it cannot go below."""
    lines = []
    for r in results.rows:
        if r["provider"] == GRAPH:
            floor = f", its memory traffic {1e3 * r['floor_ms']:.0f} us" if r.get("floor_ms") else ""
            issue = " and its instructions 44 to 50 us (counted for an H200)" if r["shape"]["clips"] == 96 else ""
            lines.append(
                f"fbank {r['mode']} {r['dtype']}: {1e3 * r['median_ms']:.1f} us of device time for "
                f"{r['shape']['clips']} clips, goal {1e3 * GPU_GOAL_MS:.0f} us{floor}{issue}"
            )
    return lines


def missed(results: Results, s: Settings) -> list[str]:
    """Goals that only a CPU is held to: which GPU this is, nobody knows."""
    if s.device.type != "cpu" or "fp32" not in s.dtypes:
        return []
    found = results.speedup("fbank", "log-mel", "fp32", BASELINE, "native") or 0.0
    if found >= CPU_GOAL:
        return []
    return [f"log-mel features, native against torchaudio's file: {found:.2f}x, goal {CPU_GOAL:g}x"]


def share_line(r: Mapping[str, Any]) -> str:
    return (
        f"features of {r['shape']['clips']} clips by {r['provider']}: {r['median_ms']:.1f} ms, "
        f"{100 * r['share_of_step']:.3f} % of a step of {r['step_ms']:.0f} ms"
    )


def main() -> int:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    s = Settings.of(options, clips_cpu=16, clips_cuda=96, budget_cpu=10, budget_cuda=1)
    results = run(s)
    for c in results.comparisons:
        say(speedup_line(c))
    for r in results.rows:
        if r["benchmark"] == "features":
            say(share_line(r))
    return finish(results, s, missed(results, s))


if __name__ == "__main__":
    sys.exit(main())
