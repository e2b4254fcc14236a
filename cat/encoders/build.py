"""The one way to get a frozen encoder: by name.

========================  =============================================================================================
``clap``                  CLAP's audio tower with its projection, from the hub (laion/clap-htsat-fused)
``clap:NAME``             the same from a local directory, another hub name, or a file of LAION's own (``.pt``)
``laion-clap:PATH``       such a file through the package `laion-clap`
``ast:NAME``              the Audio Spectrogram Transformer, from a local directory or the hub
``audiomae:PATH``         Audio-MAE from its released file (16 kHz, 768; not for commercial use)
``beats:PATH``            BEATs from one of its released files (16 kHz, 768)
``dasheng:PATH``          Dasheng from one of its released files (16 kHz, 768, 1280 or 1536)
``random``                control: a fixed random projection of log-mel statistics (``random:SEED`` for another one)
``logmel``                those statistics themselves: mean and deviation over time of every mel bin
``onnx:PATH``             a network in an ONNX file; what it takes and gives stands in ``PATH.yaml`` (`FileConfig`), or
                          behind the path: ``onnx:PATH?sample_rate=16000&output=NAME``
``tflite:PATH``           the same in a TFLite file
``MODULE:FUNCTION``       what a function of an installed module, or of a file ``path/to/file.py``, returns for a device
``untrained:SPEC``        control: the same network with random weights (``untrained:SEED:SPEC`` for others)
anything else             a CAT run directory, checkpoint directory or ``.safetensors`` file
========================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cat.encoders.ast import AstEncoder
from cat.encoders.audiomae import AudioMAEEncoder
from cat.encoders.beats import BEATsEncoder
from cat.encoders.checkpoint import CatEncoder
from cat.encoders.clap import DEFAULT_CLAP, ClapEncoder
from cat.encoders.dasheng import DashengEncoder
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.laion_package import LaionClapEncoder
from cat.encoders.modelfile import FileEncoder
from cat.encoders.named import is_named, named_encoder
from cat.encoders.statistics import LogMelStatistics, RandomProjection

Device = torch.device | str


@dataclass(frozen=True)
class Family:
    """``usage`` as in help texts: what stands behind the name's colon in brackets may be left out. ``make`` gets it,
    "" where it was, and the device."""

    usage: str
    make: Callable[[str, Device], FrozenEncoder]


FAMILIES = {
    "clap": Family("clap[:PATH_OR_HUB_NAME]", lambda name, device: ClapEncoder(name or DEFAULT_CLAP, device=device)),
    "laion-clap": Family("laion-clap:PATH", lambda name, device: LaionClapEncoder(name, device=device)),
    "ast": Family("ast:PATH_OR_HUB_NAME", lambda name, device: AstEncoder(name, device=device)),
    "audiomae": Family("audiomae:PATH", lambda path, device: AudioMAEEncoder(path, device=device)),
    "beats": Family("beats:PATH", lambda path, device: BEATsEncoder(path, device=device)),
    "dasheng": Family("dasheng:PATH", lambda path, device: DashengEncoder(path, device=device)),
    "onnx": Family("onnx:PATH", lambda path, device: FileEncoder.from_file("onnx", path, device=device)),
    "tflite": Family("tflite:PATH", lambda path, device: FileEncoder.from_file("tflite", path, device=device)),
    "random": Family("random[:SEED]", lambda seed, device: RandomProjection(seed=_seed(seed), device=device)),
    "logmel": Family("logmel", lambda _, device: LogMelStatistics(device=device)),
}
USAGE = ", ".join(
    [*(family.usage for family in FAMILIES.values()), "untrained:[SEED:]ENCODER", "MODULE_OR_FILE.py:FUNCTION"]
)


def build_encoder(
    spec: str, *, pooling: str = "mean", weights: str = "student", device: Device = "cpu"
) -> FrozenEncoder:
    """The encoder that `spec` names (see the table above).

    `pooling` ("mean" of the patch tokens, "cls", or "both" side by side) and `weights` ("student" or "teacher")
    apply to CAT checkpoints only.
    """
    kind, colon, rest = spec.partition(":")
    if family := FAMILIES.get(kind):
        named = family.usage.removeprefix(kind)  # "", ":PATH" or "[:PATH]"
        if (rest and not named) or (not rest and (colon or named.startswith(":"))):
            raise ValueError(f"encoder {spec!r}; expected {family.usage}")
        return family.make(rest, device)
    if kind == "untrained":
        return _untrained(spec, rest, pooling, weights, device)
    if is_named(spec) and not Path(spec).exists():
        return named_encoder(spec, device=device)
    if not Path(spec).exists():
        raise FileNotFoundError(
            f"encoder {spec!r} is neither one of {USAGE}, nor an existing run directory, checkpoint directory or "
            ".safetensors file."
        )
    return CatEncoder.from_checkpoint(spec, weights=weights, pooling=pooling, device=device)


def _untrained(spec: str, rest: str, pooling: str, weights: str, device: Device) -> FrozenEncoder:
    seed, colon, trained = rest.partition(":")
    if not (seed.isdecimal() and colon):
        seed, trained = "0", rest
    encoder = build_encoder(trained, pooling=pooling, weights=weights, device=device)
    return twin_of(encoder, int(seed), f"encoder {spec!r}")


def twin_of(encoder: FrozenEncoder, seed: int, asked: str) -> FrozenEncoder:
    """The encoder's twin with random weights. Raises: ValueError where it has none, that begins with what `asked`."""
    if not hasattr(encoder, "untrained_twin"):
        raise ValueError(
            f"{asked}: {encoder.name} has no twin with random weights; expected a network of torch: a CAT checkpoint, "
            "clap (which also reads LAION's files), ast, audiomae, beats, dasheng, or a function's encoder with a "
            "method untrained_twin(seed)"
        )
    twin: FrozenEncoder = encoder.untrained_twin(seed)
    return twin


def _seed(text: str) -> int:
    if text and not text.isdecimal():
        raise ValueError(f"encoder 'random:{text}': the seed after 'random:' must be a whole number, got {text!r}.")
    return int(text or 0)
