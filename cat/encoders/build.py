"""The one way to get a frozen encoder: by name.

===================  ==================================================================================================
``clap``             CLAP's audio tower with its projection, from the hub (laion/clap-htsat-fused)
``clap:NAME``        the same from a local directory or another hub name
``audiomae:PATH``    Audio-MAE from its released file (16 kHz, 768; not for commercial use)
``beats:PATH``       BEATs from one of its released files (16 kHz, 768)
``dasheng:PATH``     Dasheng from one of its released files (16 kHz, 768, 1280 or 1536)
``random``           control: a fixed random projection of log-mel statistics (``random:SEED`` for another one)
``logmel``           those statistics themselves: mean and deviation over time of every mel bin
anything else        a CAT run directory, checkpoint directory or ``.safetensors`` file
===================  ==================================================================================================
"""

from __future__ import annotations

from pathlib import Path

import torch

from cat.encoders.audiomae import AudioMAEEncoder
from cat.encoders.beats import BEATsEncoder
from cat.encoders.checkpoint import CatEncoder
from cat.encoders.clap import DEFAULT_CLAP, ClapEncoder
from cat.encoders.dasheng import DashengEncoder
from cat.encoders.frozen import FrozenEncoder
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
    if kind == "audiomae":
        return AudioMAEEncoder(rest, device=device)
    if kind == "beats":
        return BEATsEncoder(rest, device=device)
    if kind == "dasheng":
        return DashengEncoder(rest, device=device)
    if kind == "random":
        if rest and not rest.isdecimal():
            raise ValueError(f"encoder {spec!r}: the seed after 'random:' must be a whole number, got {rest!r}.")
        return RandomProjection(seed=int(rest or 0), device=device)
    if spec == "logmel":
        return LogMelStatistics(device=device)
    if not Path(spec).exists():
        raise FileNotFoundError(
            f"encoder {spec!r} is neither 'clap', 'clap:PATH_OR_HUB_NAME', 'audiomae:PATH', 'beats:PATH', "
            "'dasheng:PATH', 'random', 'random:SEED', 'logmel' "
            "nor an existing run directory, checkpoint directory or .safetensors file."
        )
    return CatEncoder.from_checkpoint(spec, weights=weights, pooling=pooling, device=device)
