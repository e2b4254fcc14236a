"""Log-mel features by other packages, called with the names of `cat_kernels.fbank`: for parity tests and benchmarks.

`why_not` tells what is missing. Of torchaudio only the file `compliance/kaldi.py` is loaded: the whole cannot be
imported next to a PyTorch without CUDA, and where it is installed so, transformers, which imports what it finds, cannot
either. `make test` therefore keeps it in a folder of its own.

Shapes: B clips, n samples, T frames, F mel bins.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OTHERS = Path(sys.prefix) / "others"  # where the Makefile puts what must not be on Python's path

_MODULES = {"kaldi-native-fbank": "kaldi_native_fbank", "librosa": "librosa"}
_REMEDIES = {
    "torchaudio": f"pip install --no-deps --target {OTHERS} torchaudio",
    "kaldi-native-fbank": "pip install kaldi-native-fbank",
    "librosa": "pip install librosa",
}


def why_not(package: str) -> str | None:
    """None where ``package`` ("torchaudio", "kaldi-native-fbank", "librosa") can be used, otherwise what to install."""
    found = _kaldi_py() if package == "torchaudio" else importlib.util.find_spec(_MODULES[package])
    return None if found else f"{package} is not installed; {_REMEDIES[package]}"


def version(package: str) -> str | None:
    """Of an installed package, wherever it is kept."""
    for path in (sys.path, [str(OTHERS)]):
        for found in importlib.metadata.distributions(name=package, path=path):
            return found.version
    return None


# ---------------------------------------------------------------- torchaudio


def torchaudio_fbank(
    wave_N: Tensor,
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    frame_length_ms: float = 25.0,
    frame_shift_ms: float = 10.0,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    window: str = "hanning",
    preemphasis: float = 0.97,
    remove_dc: bool = True,
) -> Tensor:
    """(n,) -> (T, F) by torchaudio's own ``compliance.kaldi.fbank``, with the options the models are trained with."""
    return torchaudio_kaldi().fbank(
        wave_N[None],
        htk_compat=True,
        use_energy=False,
        dither=0.0,
        sample_frequency=sample_rate,
        num_mel_bins=num_mel_bins,
        frame_length=frame_length_ms,
        frame_shift=frame_shift_ms,
        low_freq=low_freq,
        high_freq=high_freq,
        window_type=window,
        preemphasis_coefficient=preemphasis,
        remove_dc_offset=remove_dc,
    )


@cache
def torchaudio_kaldi() -> types.ModuleType:
    """torchaudio's module ``compliance.kaldi``, without torchaudio. Raises ImportError where it is not installed."""
    path = _kaldi_py()
    if path is None:
        raise ImportError(why_not("torchaudio"))
    loader = importlib.machinery.SourceFileLoader("torchaudio_compliance_kaldi", str(path))
    module = types.ModuleType(loader.name)
    module.__file__ = str(path)
    before = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # it looks into the package in `mfcc` only
    try:
        loader.exec_module(module)
    finally:
        del sys.modules["torchaudio"]
        if before is not None:
            sys.modules["torchaudio"] = before
    return module


@cache
def _kaldi_py() -> Path | None:
    spec = importlib.util.find_spec("torchaudio")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    paths = [folder / "compliance" / "kaldi.py" for folder in (*folders, OTHERS / "torchaudio")]
    return next((path for path in paths if path.is_file()), None)


# ---------------------------------------------------------------- kaldi-native-fbank


def kaldi_fbank(
    samples: Sequence[float],
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    frame_length_ms: float = 25.0,
    frame_shift_ms: float = 10.0,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    window: str = "hanning",
    preemphasis: float = 0.97,
    remove_dc: bool = True,
) -> Tensor:
    """n samples -> (T, F) by kaldi-native-fbank, Kaldi's code without Kaldi.

    Raises ValueError where a mel bin holds no FFT bin, as 128 bins from 20 Hz at 16 kHz do. Takes a list: from an array
    its binding copies sample by sample, three times as slowly.
    """
    import kaldi_native_fbank
    import numpy

    options = kaldi_native_fbank.FbankOptions()
    frames, mel = options.frame_opts, options.mel_opts
    frames.dither, frames.snip_edges, frames.samp_freq = 0.0, True, sample_rate
    frames.frame_length_ms, frames.frame_shift_ms = frame_length_ms, frame_shift_ms
    frames.window_type, frames.preemph_coeff, frames.remove_dc_offset = window, preemphasis, remove_dc
    mel.num_bins, mel.low_freq, mel.high_freq = num_mel_bins, low_freq, high_freq
    options.use_energy = False
    online = kaldi_native_fbank.OnlineFbank(options)
    online.accept_waveform(sample_rate, samples)
    online.input_finished()
    return torch.from_numpy(numpy.stack([online.get_frame(t) for t in range(online.num_frames_ready)]))


# ---------------------------------------------------------------- librosa


def librosa_log_mel(wave_BN: Any, *, sample_rate: int = 16000, num_mel_bins: int = 128) -> Any:
    """(B, n) array -> (B, T, F) array: the nearest that librosa has, with numbers other than Kaldi's.

    Frames of 25 ms every 10 in an FFT of the next power of two, HTK's mel scale from 20 Hz, the logarithm of the power.
    But no pre-emphasis, no mean removed from a frame, triangles linear in Hz, a periodic window amid the FFT's zeros.
    """
    import librosa
    import numpy

    length = sample_rate * 25 // 1000
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Empty filters")  # Kaldi's definition has them as well
        power_BFT = librosa.feature.melspectrogram(
            y=wave_BN,
            sr=sample_rate,
            n_fft=fft_length(length),
            win_length=length,
            hop_length=sample_rate // 100,
            center=False,
            **_librosa_mel(sample_rate, num_mel_bins),
        )
    return numpy.log(numpy.maximum(power_BFT, 2.0**-23)).swapaxes(1, 2)


def librosa_formula(wave_BN: Tensor, *, sample_rate: int = 16000, num_mel_bins: int = 128) -> Tensor:
    """`librosa_log_mel` in PyTorch, from librosa's table of triangles: what it must give."""
    import librosa

    length = sample_rate * 25 // 1000
    points = fft_length(length)
    before = (points - length) // 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Empty filters")
        table = librosa.filters.mel(sr=sample_rate, n_fft=points, **_librosa_mel(sample_rate, num_mel_bins))
    window = torch.hann_window(length, periodic=True, dtype=wave_BN.dtype)
    window = torch.nn.functional.pad(window, (before, points - length - before))
    power_BTN = torch.fft.rfft(wave_BN.unfold(1, points, sample_rate // 100) * window).abs().square()
    return (power_BTN @ torch.as_tensor(table).to(wave_BN.dtype).T).clamp(min=2.0**-23).log()


def _librosa_mel(sample_rate: int, num_mel_bins: int) -> dict[str, Any]:
    return {"n_mels": num_mel_bins, "fmin": 20.0, "fmax": sample_rate / 2, "htk": True, "norm": None}


def fft_length(samples: int) -> int:
    """The next power of two."""
    return 1 << (samples - 1).bit_length()
