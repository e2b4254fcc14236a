"""The kernels under NVIDIA's compute-sanitizer, as a piece of the GPU suite.

    python -m benchmarks.sanitize --tool memcheck     # reads and writes outside of what was allocated, misaligned ones
    python -m benchmarks.sanitize --tool initcheck    # reads of memory that nothing has written
    python -m benchmarks.sanitize --tool racecheck    # races in shared memory, of the extension's kernels
    python -m benchmarks.sanitize --tool synccheck    # barriers that not all threads reach, of the extension's kernels

The first two look at every operator, a small stem among them, forward and backward; what they report of kernels that
are not ours (PyTorch's, the vendor's) is counted and no error.

Exit code 0: no error. 1: errors, or a wrong result. 77: it cannot run here, the last line says why.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.ahead import modules
from benchmarks.pieces import ROOT, SKIPPED
from benchmarks.results import Results
from benchmarks.runner import say
from cat_kernels import backends, fbank
from cat_kernels import spec as specification
from cat_kernels.specs import specs

ERRORS = 9  # exit code of the tool when it found some
OURS_ALONE = ("racecheck", "synccheck")  # tools that look at the extension's kernels only
TOOLS = ("memcheck", "initcheck", *OURS_ALONE)


def find() -> str | None:
    """compute-sanitizer: on the path, of the CUDA toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    toolkits = [Path(folder) / "bin" for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    packages = [Path(sysconfig.get_path(name)) / "nvidia" for name in ("purelib", "platlib")]
    wheels = [folder for package in packages for folder in sorted(package.glob("*/bin"))]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, (*toolkits, *wheels))])
    return shutil.which("compute-sanitizer", path=path)


def why_not(tool: str) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible to PyTorch here"
    if tool in OURS_ALONE and backends.why_not("fbank", "native", "cuda"):
        return f"no CUDA kernels: {backends.why_not('fbank', 'native', 'cuda')}"
    if find() is None:
        return "compute-sanitizer was not found; the CUDA toolkit has it, and the package nvidia-cuda-sanitizer-api"
    return None


# ---------------------------------------------------------------- what is checked


def calls() -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Small batches and settings that meet every branch: dtypes, ragged clips, frames left over, other transforms."""
    generator = torch.Generator().manual_seed(0)

    def wave(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    normalised = {"mean": -4.268, "std": 4.569}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield wave(3, 6001).to(dtype), {"dtype": dtype}  # rows that begin at odd addresses
    yield (wave(2, 5680) * 32768).to(torch.int16), {}
    ragged = {"lengths": torch.tensor([400, 6000, 1999])}
    yield wave(3, 6000), {**ragged, "target_length": 64, **normalised, "dtype": torch.bfloat16}
    yield wave(3, 6000), {**ragged, "target_length": 7, **normalised}
    yield wave(1, 400), {}  # one frame
    yield wave(2, 400 + 31 * 160), {}  # 32 frames
    yield wave(2, 400 + 32 * 160), {"window": "hamming", "preemphasis": 0.0, "remove_dc": False}
    yield wave(2, 5000), {"window": "povey", "scale": 32768.0, "low_freq": 0.0, "high_freq": -400.0}
    for rate, bins in ((8000, 23), (22050, 40), (44100, 80), (48000, 128)):
        yield wave(2, rate // 10 + 1), {"sample_rate": rate, "num_mel_bins": bins}
    yield wave(2, 4000), {"frame_length_ms": 32.0, "frame_shift_ms": 5.0, "num_mel_bins": 1}


def run_operators() -> int:
    """Every operator with Triton kernels on its first sample, forward and backward. Returns how many there were."""
    count, device = 0, torch.device("cuda")
    for spec in specs():
        if "triton" not in backends.OPERATORS[spec.name] or backends.why_not(spec.name, "triton", "cuda"):
            continue
        other = spec.with_backend("triton")
        for dtype in (torch.bfloat16, torch.float32):
            sample = next(other.samples(device, dtype))
            outputs = specification.run(other, other.operator, sample).outputs
            if sample.differentiable:
                specification.run(other, other.operator, sample, specification.incoming_gradients(outputs))
            count += 1
    torch.cuda.synchronize()
    return count


def run_calls() -> int:
    """fbank under the tool: every call on a tensor of its own and on a view of a larger one, held to the CPU's result.

    Returns how many there were.
    """
    if backends.why_not("fbank", "native", "cuda"):
        return 0
    count = 0
    for wave, options in calls():
        on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        expected = fbank(wave, backend="torch", **options)
        view = torch.nn.functional.pad(wave, (1, 2)).cuda()[:, 1:-2]
        for waveform in (wave.cuda(), view):
            found = fbank(waveform, backend="native", **on_gpu).cpu()
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(expected.dtype).eps, atol=5e-3)
            count += 1
    return count


# ---------------------------------------------------------------- the tool


def command(tool: str, executable: str) -> list[str]:
    """What PyTorch probes for, and fails to find, counts as errors unless told. initcheck must see all kernels: what
    those that it does not look at write would count as never written."""
    options = ["--tool", tool]
    if tool in OURS_ALONE:
        options += ["--error-exitcode", str(ERRORS), "--kernel-name", "kernel_substring=fbank"]
    else:
        options += ["--print-limit", "10000"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    return [executable, *options, sys.executable, "-m", "benchmarks.sanitize", "--tool", tool, "--calls"]


def our_names() -> set[str]:
    """Of the kernels: Triton's functions, and a word that all of the extension's have."""
    found = {"fbank"}
    if not backends.why_not("MultiResConv", "triton", "cuda"):
        for module in modules():
            found |= {a.kernel.__name__ for a in importlib.import_module(module).ahead("bf16", 90)}
    return found


REPORT = re.compile(r"=========\s+(?P<what>\S.*)\n=========\s+at (?P<where>.*)")


def verdict(tool: str, code: int, printed: str, names: set[str]) -> tuple[bool, str]:
    """Whether all is well, and a line that says it. Warnings of racecheck leave the exit code at 0.

    names: parts of the names of our kernels; reports of others are no error.
    """
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", printed)
    made = re.findall(r"(\d+) calls", printed)
    if tool not in OURS_ALONE:
        reports = list(REPORT.finditer(printed))
        ours = [r for r in reports if any(name in r["where"] for name in names)]
        told = f"compute-sanitizer {tool}: {len(ours)} errors of our kernels, {len(reports) - len(ours)} of others"
        if ours:
            return False, f"{told}; the first: {ours[0]['what']} at {ours[0]['where']}"
        if code or not made or not summary:
            return False, f"{told}; exit code {code}, {summary[-1] if summary else 'without a summary'}"
        return True, f"{told}, in {made[-1]} calls"
    clean = code == 0 and bool(made) and bool(summary) and all(re.match(r"0 (errors|hazards)", s) for s in summary)
    if clean:
        return True, f"compute-sanitizer {tool}: {summary[-1]} in {made[-1]} calls of fbank"
    return False, f"compute-sanitizer {tool}: exit code {code}, {summary[-1] if summary else 'without a summary'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, default="memcheck")
    parser.add_argument("--calls", action="store_true", help="only make the calls, without the tool")
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--ceilings", type=Path, help="not used; every piece of the suite is given it")
    options = parser.parse_args()
    if options.calls:
        count = run_calls() + (0 if options.tool in OURS_ALONE else run_operators())
        say(f"{count} calls")
        return 0
    reason = why_not(options.tool)
    if reason:
        say(reason)
        return SKIPPED
    # The caching allocator would hand out pieces of one large block, and what lies behind a tensor would be legal.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = command(options.tool, str(find()))
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    say(done.stdout + done.stderr)
    clean, told = verdict(options.tool, done.returncode, done.stdout, our_names())
    say(told)
    if options.out:
        Results(notes=[told]).write(options.out, torch.device("cuda"))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
