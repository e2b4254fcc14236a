"""Kaldi-compatible log-mel features."""

from cat_kernels.mel.op import fbank
from cat_kernels.mel.reference import FbankSettings, fbank_reference

__all__ = ["FbankSettings", "fbank", "fbank_reference"]
