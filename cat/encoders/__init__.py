"""Waveform in, embedding out: checkpoints of ours, CLAP, files of other networks, encoders that never learned."""

from cat.checkpoints.hub import POOLINGS
from cat.encoders.audio import CATEncoder, EncoderOutput, Layer
from cat.encoders.build import build_encoder
from cat.encoders.checkpoint import CatEncoder
from cat.encoders.clap import ClapEncoder
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.modelfile import FileConfig, FileEncoder
from cat.encoders.statistics import LogMelStatistics, RandomProjection

__all__ = [
    "POOLINGS",
    "CATEncoder",
    "CatEncoder",
    "ClapEncoder",
    "EncoderOutput",
    "FileConfig",
    "FileEncoder",
    "FrozenEncoder",
    "Layer",
    "LogMelStatistics",
    "RandomProjection",
    "build_encoder",
]
