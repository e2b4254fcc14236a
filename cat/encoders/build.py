"""The one way to get a frozen encoder: by name.

===================  ==================================================================================================
``clap``             CLAP's audio tower with its projection, from the hub (laion/clap-htsat-fused)
``clap:NAME``        the same from a local directory or another hub name
``random``           control: a fixed random projection of log-mel statistics (``random:SEED`` for another one)
``logmel``           those statistics themselves: mean and deviation over time of every mel bin
``onnx:PATH``        a network in an ONNX file; what it takes and gives stands in ``PATH.yaml`` (`FileConfig`), or
                     behind the path: ``onnx:PATH?sample_rate=16000&output=NAME``
``tflite:PATH``      the same in a TFLite file
``MODULE:FUNCTION``  what a function of an installed module, or of a file ``path/to/file.py``, returns for a device
``untrained:SPEC``   control: the same network with random weights (``untrained:SEED:SPEC`` for others)
anything else        a CAT run directory, checkpoint directory or ``.safetensors`` file
===================  ==================================================================================================
"""

from __future__ import annotations

from pathlib import Path

import torch

from cat.encoders.checkpoint import CatEncoder
from cat.encoders.clap import DEFAULT_CLAP, ClapEncoder
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.modelfile import FileEncoder
from cat.encoders.named import is_named, named_encoder
from cat.encoders.statistics import LogMelStatistics, RandomProjection


def build_encoder(
    spec: str, *, pooling: str = "mean", weights: str = "student", device: torch.device | str = "cpu"
) -> FrozenEncoder:
    """The encoder that `spec` names (see the table above).

    `pooling` ("mean" of the patch tokens, "cls", or "both" side by side) and `weights` ("student" or "teacher")
    apply to CAT checkpoints only.
    """
    kind, _, rest = spec.partition(":")
    if kind == "clap":
        return ClapEncoder(rest or DEFAULT_CLAP, device=device)
    if kind == "random":
        if rest and not rest.isdecimal():
            raise ValueError(f"encoder {spec!r}: the seed after 'random:' must be a whole number, got {rest!r}.")
        return RandomProjection(seed=int(rest or 0), device=device)
    if spec == "logmel":
        return LogMelStatistics(device=device)
    if kind in ("onnx", "tflite"):
        return FileEncoder.from_file(kind, rest, device=device)
    if kind == "untrained":
        seed, colon, trained = rest.partition(":")
        if not (seed.isdecimal() and colon):
            seed, trained = "0", rest
        encoder = build_encoder(trained, pooling=pooling, weights=weights, device=device)
        if not hasattr(encoder, "untrained_twin"):
            raise ValueError(
                f"encoder {spec!r}: {encoder.name} has no twin with random weights; expected a network of torch, such "
                "as a CAT checkpoint"
            )
        return encoder.untrained_twin(int(seed))
    if is_named(spec) and not Path(spec).exists():
        return named_encoder(spec, device=device)
    if not Path(spec).exists():
        raise FileNotFoundError(
            f"encoder {spec!r} is neither 'clap', 'clap:PATH_OR_HUB_NAME', 'random', 'random:SEED', 'logmel', "
            "'onnx:PATH', 'tflite:PATH', 'MODULE:FUNCTION', 'FILE.py:FUNCTION', 'untrained:SPEC' "
            "nor an existing run directory, checkpoint directory or .safetensors file."
        )
    return CatEncoder.from_checkpoint(spec, weights=weights, pooling=pooling, device=device)
