"""Whether an exported file gives what the model gives, at several lengths and batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cat.data.features import log_mel
from cat.export.graph import Graph, samples_of
from cat.export.model import Exportable

# Rows of patches of the ten lengths: 0.16 s, then more and more, to the two minutes that the positions cover.
CHECK_ROWS = (1, 2, 3, 7, 16, 33, 64, 125, 300, 768)
QUICK_ROWS = (1, 3, 64)

Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Difference:
    """Between a file and the model: over all outputs, clips and lengths."""

    rows: tuple[int, ...]  # the lengths, in rows of patches
    largest: float  # infinite where one has NaN
    mean: float
    scale: float  # largest magnitude of the model's own outputs
    relative: float  # the largest, as a share of the largest magnitude of the same output


def compare(file: Path, exportable: Exportable, graph: Graph, rows: Sequence[int]) -> Difference:
    """Runs the file and the model (on its own kernels, features by `cat.data.log_mel`) on noise, from one to three
    clips at a time; a waveform ends somewhere in its last row of patches."""
    run = run_onnx(file) if file.suffix == ".onnx" else run_program(file)
    generator = torch.Generator().manual_seed(0)
    largest_O, scale_O = [0.0] * len(graph.outputs), [0.0] * len(graph.outputs)
    total, count = 0.0, 0
    for number, length in enumerate(rows):
        audio = _noise(graph, length, 1 if length > 300 else 1 + number % 3, generator)
        expected = eager(exportable, audio, spectrogram=graph.spectrogram)
        for output, (found, wanted) in enumerate(zip(run(audio), expected, strict=True)):
            if found.shape != wanted.shape:
                raise ValueError(f"{file} gives shape {tuple(found.shape)}, the model {tuple(wanted.shape)}")
            error = (found - wanted).abs()
            largest_O[output] = max(largest_O[output], float(error.max().nan_to_num(math.inf)))
            scale_O[output] = max(scale_O[output], float(wanted.abs().max()))
            total, count = total + float(error.sum()), count + error.numel()
    relative = max(largest / max(scale, 1e-30) for largest, scale in zip(largest_O, scale_O, strict=True))
    return Difference(tuple(rows), max(largest_O), total / max(count, 1), max(scale_O), relative)


def _noise(graph: Graph, rows: int, clips: int, generator: torch.Generator) -> Tensor:
    size = graph.sizes(rows)
    if graph.log_mel is None:
        return 0.5 * torch.randn(clips, *size, generator=generator)
    P = graph.encoder_config.patch_size
    missing = int(torch.randint(0, P * graph.log_mel.features.frame_shift, (), generator=generator))
    longest = samples_of(graph.log_mel.features, rows * P) + graph.log_mel.features.frame_shift - 1
    return 0.1 * torch.randn(clips, max(graph.log_mel.features.frame_length, longest - missing), generator=generator)


@torch.no_grad()
def eager(exportable: Exportable, audio: Tensor, *, spectrogram: bool = False) -> tuple[Tensor, ...]:
    """What the model itself gives: waveform (B, n) or spectrogram (B, 1, T, F) in, the outputs of its `Graph`."""
    if audio.ndim == 2:
        features, P = exportable.features, exportable.about["patch_size"]
        frames = 1 + (audio.shape[1] - features.frame_length) // features.frame_shift
        frames = math.ceil(max(frames, exportable.least_frames) / P) * P
        audio = log_mel(audio, dataclasses.replace(features, frames=frames))
    return Graph(exportable.model, spectrogram=spectrogram).eval()(audio)


def run_onnx(file: Path) -> Run:
    """The file in onnxruntime, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda audio: tuple(torch.from_numpy(x) for x in session.run(None, {name: audio.numpy()}))


def run_program(file: Path) -> Run:
    """The file in PyTorch."""
    module = torch.export.load(str(file)).module()

    def run(audio: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(module(audio))

    return run
