"""Embedding of ten-second clips, waveform in: this package, transformers' AST at the same width and depth, ONNX.

    python -m benchmarks.inference                          # one clip and 16, base model
    python -m benchmarks.inference --preset small --batches 1 16 --out inference.json

"auto" is what a user gets, "dense" and "visible" the two formulations of the stem. "AST" is transformers' model as
published, patches overlapping (stride 10); "AST, stride 16" has as many patches as this package's. "onnx" is what
`cat-audio export --waveform` writes, "onnx int8" with `--quantise`, both in onnxruntime, on a CPU. All get the same
waveforms, all but the ONNX files, which hold their own, the same features.

Shapes: B clips, n samples, T frames, F mel bins, L patches, D width.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, others
from benchmarks.fbank import waveforms
from benchmarks.results import Key, Parity, Results
from benchmarks.runner import (
    FLOOR,
    Settings,
    arguments,
    autocast,
    distance,
    finish,
    reason,
    release,
    say,
    speedup_line,
    unsearched,
)
from benchmarks.stem import eager
from benchmarks.timing import interleaved
from cat.data.features import FeatureConfig, log_mel
from cat.model import PRESETS, Encoder

BATCHES = (1, 16)
BASELINE = "dense"
KERNELS = {"auto": "auto", "triton": "auto", "dense": "dense", "visible": "reference"}
AST = {"AST": 10, "AST, stride 16": 16}  # strides of its patches, in frequency and in time
ONNX = {"onnx": False, "onnx int8": True}
INT8_LIMIT = 0.05  # relative distance that eight bits may cost; measured with random weights: 0.003


Call = Callable[[], Tensor]


# ---------------------------------------------------------------- candidates


def features_of(wave_BN: Tensor) -> FeatureConfig:
    """As many frames as the waveform has, in whole patches of 16."""
    frames = 1 + (wave_BN.shape[1] - FeatureConfig().frame_length) // FeatureConfig().frame_shift
    return dataclasses.replace(FeatureConfig(), frames=-(-frames // 16) * 16)


def build_encoder(preset: str, kernels: str) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(dataclasses.replace(PRESETS[preset], kernels=kernels)).eval()


class Ours:
    """Features, encoder, mean of the patches."""

    def __init__(self, name: str, shape: dict[str, Any], dtype: str, device: torch.device) -> None:
        self.wave_BN, self.dtype, self.device = inputs(shape, device), dtype, device
        self.features = features_of(self.wave_BN)
        self.model = build_encoder(shape["preset"], KERNELS[name]).to(device)

    @torch.inference_mode()
    def call(self) -> Tensor:
        spec_B1TF = log_mel(self.wave_BN, self.features)
        with autocast(self.dtype, self.device):
            return self.model(spec_B1TF)[:, 1:].float().mean(1)

    def persistent_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))


class Ast:
    """transformers' Audio Spectrogram Transformer with our features and our pooling; random weights."""

    def __init__(
        self, name: str, shape: dict[str, Any], dtype: str, device: torch.device, attention: str = "sdpa"
    ) -> None:
        from transformers import ASTConfig, ASTModel

        self.wave_BN, self.dtype, self.device = inputs(shape, device), dtype, device
        self.features, c = features_of(self.wave_BN), PRESETS[shape["preset"]]
        config = ASTConfig(
            hidden_size=c.embed_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            intermediate_size=int(c.embed_dim * c.mlp_ratio),
            frequency_stride=AST[name],
            time_stride=AST[name],
            max_length=self.features.frames,
            num_mel_bins=c.mel_bins,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = ASTModel._from_config(config, attn_implementation=attention).to(device).eval()

    @torch.inference_mode()
    def call(self) -> Tensor:
        spec_BTF = log_mel(self.wave_BN, self.features).squeeze(1)
        with autocast(self.dtype, self.device):
            return self.model(spec_BTF).last_hidden_state[:, 2:].float().mean(1)

    def persistent_bytes(self) -> int:
        return sum(t.nbytes for t in self.model.parameters())


class Onnx:
    """An exported file in onnxruntime."""

    def __init__(self, file: Path, shape: dict[str, Any]) -> None:
        from cat.export.check import run_onnx

        self.wave_BN, self.file, self.run = inputs(shape, torch.device("cpu")), file, run_onnx(file)

    def call(self) -> Tensor:
        return self.run(self.wave_BN)[0]

    def persistent_bytes(self) -> int:
        return self.file.stat().st_size


def inputs(shape: dict[str, Any], device: torch.device) -> Tensor:
    return waveforms(shape["clips"], shape["frames"], device)


def ours(device: torch.device) -> tuple[str, ...]:
    """On a GPU "auto" is "triton"."""
    return eager(device) if device.type == "cuda" else (*eager(device), "auto")


def other_models(device: torch.device) -> list[str]:
    """What is compared besides, where it is installed."""
    found = list(AST) if importlib.util.find_spec("transformers") else []
    modules = ("onnx", "onnxscript", "onnxruntime")
    if device.type == "cpu" and all(importlib.util.find_spec(module) for module in modules):
        found += list(ONNX)
    return found


def missing(device: torch.device, found: Sequence[str]) -> list[str]:
    """Notes on what is not installed."""
    wanted = {"AST": "transformers is not installed; pip install 'cat-kernels[clap]'"}
    if device.type == "cpu":
        wanted["onnx"] = "onnx, onnxscript or onnxruntime is not installed; pip install 'cat-kernels[export]'"
    return [f"inference: {name} not measured: {why}" for name, why in wanted.items() if name not in found]


def make_provider(name: str, shape: dict[str, Any], dtype: str, folder: str, device: str = "cpu") -> Ours | Ast | Onnx:
    """A candidate; also for the process that measures memory on a CPU. folder: where the ONNX files are."""
    if name in ONNX:
        return Onnx(Path(folder) / f"{name}.onnx", shape)
    return (Ast if name in AST else Ours)(name, shape, dtype, torch.device(device))


def write_onnx(preset: str, folder: Path) -> None:
    """The encoder of all candidates of ours as the files that a user would get."""
    from cat.checkpoints import save_tensors
    from cat.config import to_mapping
    from cat.export import export, load_exportable

    encoder, checkpoint = build_encoder(preset, "auto"), folder / "encoder.safetensors"
    config = {"model": to_mapping(encoder.config), "features": to_mapping(FeatureConfig())}
    save_tensors(checkpoint, encoder.state_dict(), config=config)
    for name, quantise in ONNX.items():
        export(load_exportable(checkpoint), folder / f"{name}.onnx", waveform=True, quantise=quantise, rows=(4,))


# ---------------------------------------------------------------- parity


def parity(name: str, call: Call, target_BD: Tensor, dtype: str, yardstick: Parity | None) -> Parity:
    """Relative distance. AST is a yardstick of its own, the others are held to twice that of the dense formula."""
    error, floor = distance({"clips": [call()]}, {"clips": [target_BD]}), FLOOR[dtype]
    if name == "onnx int8":
        return Parity(error, INT8_LIMIT)
    return Parity(error, 2 * yardstick.error + floor if yardstick and name not in AST else 8 * floor)


def expected(name: str, shape: dict[str, Any], device: torch.device) -> Tensor:
    """(B, D) in fp32, a few clips at a time: ours as in `stem.reference`, AST by its plain attention."""
    found = Ast(name, shape, "fp32", device, "eager") if name in AST else Ours("visible", shape, "fp32", device)
    waves, parts = found.wave_BN, []
    with unsearched():
        for clips in waves.split(2):
            found.wave_BN = clips
            parts.append(found.call())
    return torch.cat(parts)


# ---------------------------------------------------------------- timing


def measure(clips: int, dtype: str, s: Settings, folder: Path, names: Sequence[str], results: Results) -> None:
    """Rows of one batch in one precision."""
    shape = {"preset": s.preset, "clips": clips, "frames": s.frames}
    key = Key(benchmark="inference", mode="embedding", dtype=dtype, shape=shape)
    ready: dict[str, Ours | Ast | Onnx] = {}
    checked: dict[str, Parity] = {}
    peaks: dict[str, float | None] = {}
    for name in names:
        if name in ONNX and dtype != "fp32":
            continue
        try:
            provider = make_provider(name, shape, dtype, str(folder), s.device.type)
            target_BD = expected(name, shape, s.device)
            checked[name] = parity(name, provider.call, target_BD, dtype, checked.get(BASELINE))
            peaks[name] = peak(name, provider, shape, dtype, s, folder)
            if checked[name].passed:
                ready[name] = provider
            else:
                results.add(key, name, [], checked[name])
        except Exception as error:  # the others go on
            results.reject(key, name, reason(error))
        say(f"  inference, {clips} clips, {dtype}: {name} is ready")
    calls = {name: provider.call for name, provider in ready.items()}
    times = interleaved(calls, s.device, min_rounds=s.min_rounds, budget_s=s.budget_s) if calls else {}
    for name, provider in ready.items():
        results.add(
            key,
            name,
            times[name],
            checked[name],
            peak_MiB=peaks[name],
            persistent_MiB=provider.persistent_bytes() / memory.MIB,
            work={"audio_s": inputs(shape, torch.device("cpu")).numel() / FeatureConfig().sample_rate},
        )
    for name in ready:
        if name != BASELINE:
            results.compare(key, BASELINE, name, times, peaks)


def peak(name: str, provider: Any, shape: dict[str, Any], dtype: str, s: Settings, folder: Path) -> float | None:
    if s.device.type == "cuda":
        return memory.peak_cuda(provider.call, s.device)
    if not s.memory:
        return None
    settings = {"name": name, "shape": shape, "dtype": dtype, "folder": str(folder)}
    return memory.peak_in_fresh_process("inference", settings, threads=s.threads)


# ---------------------------------------------------------------- command line


def run(s: Settings, batches: Sequence[int] = BATCHES) -> Results:
    results = Results()
    found = other_models(s.device)
    results.notes += missing(s.device, found)
    with tempfile.TemporaryDirectory() as temporary:
        if "onnx" in found:
            write_onnx(s.preset, Path(temporary))
        for dtype in s.dtypes:
            for clips in batches:
                measure(clips, dtype, s, Path(temporary), (*ours(s.device), *found), results)
                s.saver(results)()
                release()
    told = {name: others.version(name) for name in ("transformers", "onnxruntime")}
    versions = ", ".join(f"{name} {version}" for name, version in told.items() if version)
    results.notes += [f"inference: compared with {versions}"] if found else []
    return results


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="clips a call (default: 1 16)")
    options = parser.parse_args()
    s = Settings.of(options, clips_cpu=1, clips_cuda=1, budget_cpu=20, budget_cuda=2)
    results = run(s, options.batches)
    for c in results.comparisons:
        say(speedup_line(c))
    return finish(results, s, [])


if __name__ == "__main__":
    sys.exit(main())
