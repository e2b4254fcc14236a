"""Encoders that are an ONNX or a TFLite file: YAMNet, BirdNET, Perch and what else takes audio and gives an embedding.

What a file does not say of itself stands in a YAML file beside it, ``birdnet.tflite.yaml`` for ``birdnet.tflite``::

    sample_rate: 48000
    output: model/GLOBAL_AVG_POOL/Mean

and may be given, or changed, behind the path: ``tflite:birdnet.tflite?sample_rate=48000&output=Identity``.

Shapes: a clip is cut into pieces of n steps, samples or frames of F mel bins; B pieces at once, D embedding width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cat.config import COMMAND_LINE, from_mapping, read_yaml
from cat.data.features import FeatureConfig, frames_in, log_mel
from cat.encoders.frozen import checked_lengths
from cat.encoders.graphs import Graph, GraphError, OnnxGraph, TfliteGraph
from cat.encoders.mel import MelConfig, mel_spectrogram
from cat.encoders.windows import Windows

_AT_ONCE = 16  # pieces, where the file leaves their number open


@dataclass(frozen=True)
class FileConfig:
    """What an ONNX or TFLite file takes and gives.

    `layout` names the axes of the input in their order: B pieces, T samples or frames, F mel bins, 1 an axis of one.
    `output_layout` those of the output: B, D the embedding, T any that the mean is taken over.
    """

    sample_rate: int  # Hz
    input: Literal["waveform", "log-mel", "fbank"] = "waveform"  # fbank: Kaldi's, as CAT's own features
    output: str | None = None  # name of a tensor; null: the file's only output
    piece: int | None = None  # samples or frames at once; null: as the file says, or else the whole clip
    hop: int | None = None  # from one piece to the next; null: a piece. The last piece ends with the clip
    short: Literal["repeat", "zeros"] = "repeat"  # a clip shorter than a piece is repeated, or padded with zeros
    scale: float = 1.0  # of the samples; 32768 for networks that were trained on 16-bit numbers
    layout: str | None = None  # null: BT, B1T, BTF or B1TF by the input's number of axes, or T and TF without a B
    output_layout: str | None = None  # null: B first (if the input has it), D last, the mean over what is between
    mel: MelConfig = field(default_factory=MelConfig)
    fbank: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        for name in ("sample_rate", "piece", "hop"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.piece and self.hop and self.hop > self.piece:
            raise ValueError(f"hop is {self.hop} and piece {self.piece}; expected no more, or some of the clip is lost")
        axes = "BT1" if self.input == "waveform" else "BTF1"
        for name, known, needed in (("layout", axes, axes.strip("B1")), ("output_layout", "BDT", "D")):
            value = getattr(self, name)
            if value is not None and (
                set(value) - set(known) or not set(needed) <= set(value) or any(value.count(a) > 1 for a in "BDF")
            ):
                raise ValueError(f"{name} is {value!r}; expected letters of {known}, {' and '.join(needed)} among them")

    @property
    def bins(self) -> int:
        return self.mel.bins if self.input == "log-mel" else self.fbank.mel_bins

    def samples(self, steps: int) -> int:
        """The fewest samples that have so many steps."""
        if self.input == "waveform":
            return steps
        if self.input == "log-mel":
            return self.mel.samples(steps)
        return dataclasses.replace(self.fbank, frames=steps).samples


class FileEncoder:
    """(B, D) float32: the mean over a clip's pieces of what the network in a file puts out for each."""

    def __init__(self, graph: Graph, config: FileConfig, *, name: str, device: torch.device | str = "cpu") -> None:
        self._graph = graph
        self.sha256, self.threads = graph.sha256, torch.get_num_threads()
        self.layout = config.layout or _usual_layout(config, len(graph.shape))
        _check_layout(self.layout, config, graph.shape)
        sizes = dict(zip(self.layout, graph.shape, strict=True))
        self.piece = config.piece or sizes["T"]
        if self.piece != (sizes["T"] or self.piece):
            raise ValueError(f"piece is {self.piece}, but the file takes {sizes['T']}; leave it out")
        self.pieces_at_once = sizes.get("B", 1)
        self.config = dataclasses.replace(
            config, fbank=dataclasses.replace(config.fbank, sample_rate=config.sample_rate)
        )
        self.sample_rate, self.device = config.sample_rate, torch.device(device)
        noise_n = 0.1 * torch.randn(self._trial(), generator=torch.Generator().manual_seed(0))
        self.dim = len(self._embed([noise_n])[0])
        what = hashlib.sha256(f"{self.sha256} {self.config}".encode()).hexdigest()
        self.name = f"{name} ({what[:8]})"  # other weights or settings are another encoder, whatever the path

    @classmethod
    def from_file(cls, kind: str, spec: str, *, device: torch.device | str = "cpu") -> FileEncoder:
        """``kind`` is "onnx" or "tflite", ``spec`` PATH or PATH?SETTING=VALUE&SETTING=VALUE.

        Raises: ConfigError for settings, FileNotFoundError, GraphError, ImportError for what the file asks for.
        """
        text, _, changes = spec.partition("?")
        path = Path(text)
        beside = path.with_name(path.name + ".yaml")
        settings, source = (read_yaml(beside), str(beside)) if beside.exists() else ({}, f"{beside}, or behind the '?'")
        overrides = changes.split("&") if changes else []
        config = from_mapping(FileConfig, settings, source=source, overrides=overrides)
        graph: Graph
        if kind == "onnx":
            graph = OnnxGraph(path, config.output, torch.device(device))
        else:
            graph = TfliteGraph(path, config.output)
        try:
            return cls(graph, config, name=f"{kind}:{spec}", device=device)
        except ValueError as error:
            where = source if beside.exists() else COMMAND_LINE
            raise GraphError(f"{path}: {error} (settings: {where})") from error

    def _trial(self) -> int:
        """Samples that any network takes: a piece, or a second."""
        if self.piece is None:
            return max(self.sample_rate, self.config.samples(1))
        return self.config.samples(self.piece)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        ends = checked_lengths(waveform, lengths).tolist()
        clips = [clip[:end].float().cpu() for clip, end in zip(waveform, ends, strict=True)]
        return torch.from_numpy(np.stack(self._embed(clips))).to(self.device)

    def _embed(self, clips: list[Tensor]) -> list[np.ndarray]:
        """(D,) a clip."""
        cut = [self._pieces(clip) for clip in clips]
        counts = [len(pieces) for pieces in cut]
        if self.piece is None:  # of any length each
            rows = iter([row for pieces in cut for row in self._run(pieces)])
        else:
            rows = iter(self._run(np.concatenate(cut)))
        return [np.mean(list(itertools.islice(rows, count)), axis=0) for count in counts]

    def _pieces(self, clip_n: Tensor) -> np.ndarray:
        """(pieces, T) or (pieces, T, F) float32."""
        needed = self.config.samples(self.piece or 1)
        if len(clip_n) < needed:
            if self.config.short == "repeat":
                clip_n = clip_n.repeat(-(-needed // len(clip_n)))[:needed]
            else:
                clip_n = torch.nn.functional.pad(clip_n, (0, needed - len(clip_n)))
        steps = self._input(clip_n)
        piece = self.piece or len(steps)
        starts = Windows(piece, piece - min(piece, self.config.hop or piece)).starts(len(steps))
        return np.stack([steps[start : start + piece] for start in starts])

    def _input(self, clip_n: Tensor) -> np.ndarray:
        """(T,) samples or (T, F) frames."""
        config = self.config
        wave_n = clip_n * config.scale
        if config.input == "waveform":
            return wave_n.numpy()
        if config.input == "log-mel":
            return mel_spectrogram(wave_n, config.mel, config.sample_rate).numpy()
        frames = int(frames_in(config.fbank, torch.tensor(len(wave_n))))
        return log_mel(wave_n, dataclasses.replace(config.fbank, frames=frames))[0, 0].numpy()

    def _run(self, pieces: np.ndarray) -> Iterator[np.ndarray]:
        """(D,) a piece."""
        at_once = self.pieces_at_once or _AT_ONCE
        for start in range(0, len(pieces), at_once):
            group = pieces[start : start + at_once]
            real = len(group)
            if self.pieces_at_once is not None and real < at_once:
                group = np.concatenate([group, np.repeat(group[-1:], at_once - real, axis=0)])
            rows_BD = self._rows(self._graph(self._laid_out(group)), at_once if self.pieces_at_once else real)
            yield from rows_BD[:real]

    def _laid_out(self, pieces: np.ndarray) -> np.ndarray:
        """The axes B, T and F in the file's order."""
        if "B" not in self.layout:
            pieces = pieces[0]
        axes = [letter for letter in "BTF" if letter in self.layout]
        moved = pieces.transpose([axes.index(letter) for letter in self.layout if letter != "1"])
        ones = tuple(place for place, letter in enumerate(self.layout) if letter == "1")
        return np.ascontiguousarray(np.expand_dims(moved, ones), dtype=np.float32)

    def _rows(self, found: np.ndarray, count: int) -> np.ndarray:
        """(B, D)."""
        batched = "B" in self.layout
        layout = self.config.output_layout or ("B" * batched + "T" * (found.ndim - 1 - batched) + "D")
        fits = len(layout) == found.ndim and batched == ("B" in layout)
        if not fits or (batched and found.shape[layout.index("B")] != count):
            raise ValueError(
                f"the output has the shape {found.shape} for {count} pieces, which is not {layout}; expected "
                "output_layout, with B for the pieces if the input has them, D for the embedding and T for every other "
                "axis, or another output"
            )
        rows = found.mean(axis=tuple(place for place, letter in enumerate(layout) if letter == "T"))
        if not batched:
            return rows[None]
        return rows if layout.index("B") < layout.index("D") else rows.T


def _usual_layout(config: FileConfig, axes: int) -> str:
    usual = ("T", "BT", "B1T") if config.input == "waveform" else ("TF", "BTF", "B1TF")
    found = [layout for layout in usual if len(layout) == axes]
    if not found:
        raise ValueError(
            f"the input has {axes} axes, and input={config.input} usually {', '.join(str(len(u)) for u in usual)}; "
            "expected layout, a letter an axis: B pieces, T samples or frames, F mel bins, 1 an axis of one"
        )
    return found[0]


def _check_layout(layout: str, config: FileConfig, shape: tuple[int | None, ...]) -> None:
    fits = len(layout) == len(shape)
    if fits:
        expected = {"1": 1, "F": config.bins}
        fits = all(size in (None, expected.get(letter, size)) for letter, size in zip(layout, shape, strict=True))
    if not fits:
        bins = "" if config.input == "waveform" else f" with {config.bins} mel bins"
        raise ValueError(
            f"the input has the shape {tuple('?' if n is None else n for n in shape)}, which is not {layout}{bins}; "
            "expected layout, a letter an axis, and the mel bins to fit"
        )
