"""Waveform in, embedding out: checkpoints of ours, CLAP, Audio-MAE, BEATs, Dasheng, and encoders that never learned."""

from cat.checkpoints.hub import POOLINGS
from cat.encoders.audio import CATEncoder, EncoderOutput, Layer
from cat.encoders.audiomae import AudioMAEEncoder
from cat.encoders.beats import BEATsEncoder
from cat.encoders.build import build_encoder
from cat.encoders.checkpoint import CatEncoder
from cat.encoders.clap import ClapEncoder
from cat.encoders.dasheng import DashengEncoder
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.statistics import LogMelStatistics, RandomProjection

__all__ = [
    "POOLINGS",
    "AudioMAEEncoder",
    "BEATsEncoder",
    "CATEncoder",
    "CatEncoder",
    "ClapEncoder",
    "DashengEncoder",
    "EncoderOutput",
    "FrozenEncoder",
    "Layer",
    "LogMelStatistics",
    "RandomProjection",
    "build_encoder",
]
