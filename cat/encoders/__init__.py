"""Waveform in, embedding out: checkpoints of ours, other people's encoders, and encoders that never learned."""

from cat.checkpoints.hub import POOLINGS
from cat.encoders.ast import AstEncoder
from cat.encoders.audio import CATEncoder, EncoderOutput, Layer
from cat.encoders.audiomae import AudioMAEEncoder
from cat.encoders.beats import BEATsEncoder
from cat.encoders.build import USAGE, build_encoder, twin_of
from cat.encoders.checkpoint import CatEncoder
from cat.encoders.clap import ClapEncoder
from cat.encoders.dasheng import DashengEncoder
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.laion_package import LaionClapEncoder
from cat.encoders.modelfile import FileConfig, FileEncoder
from cat.encoders.statistics import LogMelStatistics, RandomProjection

__all__ = [
    "POOLINGS",
    "USAGE",
    "AstEncoder",
    "AudioMAEEncoder",
    "BEATsEncoder",
    "CATEncoder",
    "CatEncoder",
    "ClapEncoder",
    "DashengEncoder",
    "EncoderOutput",
    "FileConfig",
    "FileEncoder",
    "FrozenEncoder",
    "LaionClapEncoder",
    "Layer",
    "LogMelStatistics",
    "RandomProjection",
    "build_encoder",
    "twin_of",
]
