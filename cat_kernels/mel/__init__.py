"""Kaldi-compatible log-mel features."""

from .module import FBANK_PRESETS, LogMelFbank
from .op import fbank
from .reference import FbankSettings, fbank_reference

__all__ = ["FBANK_PRESETS", "FbankSettings", "LogMelFbank", "fbank", "fbank_reference"]
