"""Waveform in, embedding out: checkpoints of ours, CLAP, and encoders that never learned."""

from cat.encoders.build import build_encoder
from cat.encoders.checkpoint import POOLINGS, CatEncoder
from cat.encoders.clap import ClapEncoder
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.statistics import LogMelStatistics, RandomProjection

__all__ = [
    "POOLINGS",
    "CatEncoder",
    "ClapEncoder",
    "FrozenEncoder",
    "LogMelStatistics",
    "RandomProjection",
    "build_encoder",
]
