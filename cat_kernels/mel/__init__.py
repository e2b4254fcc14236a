"""Kaldi-compatible log-mel features."""

from cat_kernels.mel.module import FBANK_PRESETS, LogMelFbank
from cat_kernels.mel.op import fbank
from cat_kernels.mel.reference import FbankSettings, fbank_reference

__all__ = ["FBANK_PRESETS", "FbankSettings", "LogMelFbank", "fbank", "fbank_reference"]
