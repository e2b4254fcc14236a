"""Waveforms as people have them, in memory or as a stream, to samples at an encoder's rate."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat.data.decoding import import_library

_MOST_RESAMPLING = 256  # times up or down, as for files: more is a slip of the pen, and memory without bound
_DTYPES = (torch.int16, torch.float32, torch.float64, torch.float16, torch.bfloat16)

Waveform = Tensor | np.ndarray


def as_clips(
    waveforms: Waveform | Sequence[Waveform], sample_rate: int, to_rate: int, *, min_samples: int = 1
) -> list[Tensor]:
    """The clips in ``waveforms``, one (n,) tensor each at ``to_rate`` Hz: float32, or int16 where it was so and had
    that rate. A clip has as many samples as a file of it has when it is read, n * to_rate // sample_rate.

    Args:
        waveforms: one clip (n,), clips of one length (B, n), or a list of clips (n,) of any lengths; NumPy or PyTorch,
            floating point in [-1, 1] or int16.
        sample_rate: of all of them, Hz.
        min_samples: at ``to_rate``; shorter clips are an error.

    Raises: ValueError and TypeError that name the clip, what is wrong with it and the remedy.
    """
    rate = checked_rate(sample_rate, to_rate)
    if isinstance(waveforms, Tensor | np.ndarray):
        if waveforms.ndim not in (1, 2):
            raise ValueError(
                f"waveforms has shape {tuple(waveforms.shape)}; expected one clip (samples,), clips (B, samples) or a "
                "list of clips (samples,): of several channels take the mean, as in x.mean(channels)"
            )
        clips = [waveforms] if waveforms.ndim == 1 else list(waveforms)
    elif isinstance(waveforms, list | tuple):
        clips = list(waveforms)
    else:
        raise TypeError(
            f"waveforms is of type {type(waveforms).__name__}; expected a tensor or array (samples,) or (B, samples), "
            "or a list of them (samples,)"
        )
    if not clips:
        raise ValueError("waveforms holds no clip; expected at least one")
    return [_clip(clip, f"clip {number}", rate, to_rate, min_samples) for number, clip in enumerate(clips)]


def as_chunks(chunks: Iterable[Waveform], sample_rate: int, to_rate: int) -> Iterator[Tensor]:
    """One recording that comes in pieces (n,), at ``to_rate`` Hz: the samples that `as_clips` gives of the whole, to
    the rounding of the resampler, in other pieces, float32. Memory does not grow with it. Raises as `as_clips`."""
    rate = checked_rate(sample_rate, to_rate)
    resampler: Any = None
    if rate != to_rate:
        resampler = import_library("soxr").ResampleStream(rate, to_rate, 1, dtype="float32")
    heard = given = 0
    for number, chunk in enumerate(chunks):
        wave = _float(_checked(chunk, f"chunk {number}")).cpu()
        heard += len(wave)
        if resampler is not None:
            wave = torch.from_numpy(resampler.resample_chunk(wave.numpy()))
        given += len(wave)
        yield wave
    if resampler is not None:
        rest = resampler.resample_chunk(np.empty(0, dtype=np.float32), last=True)
        yield torch.from_numpy(rest[: max(0, heard * to_rate // rate - given)])


def checked_rate(sample_rate: int, to_rate: int) -> int:
    try:
        rate = operator.index(int(sample_rate)) if sample_rate == int(sample_rate) else 0
    except (TypeError, ValueError, OverflowError):
        rate = 0
    if rate < 1 or max(rate, to_rate) > _MOST_RESAMPLING * min(rate, to_rate):
        raise ValueError(
            f"sample_rate is {sample_rate!r}; expected the waveforms' rate, a whole number of Hz that can be resampled "
            f"to {to_rate} Hz, such as 44100"
        )
    return rate


def too_short(what: str, samples: int, rate: int, least: int) -> ValueError:
    return ValueError(
        f"{what} is too short: {samples} samples at {rate} Hz ({1000 * samples / rate:.3g} ms), and a frame takes "
        f"{least} ({1000 * least / rate:.3g} ms); leave it out, or pad it with zeros to that length"
    )


def _clip(clip: Any, what: str, rate: int, to_rate: int, min_samples: int) -> Tensor:
    wave = _checked(clip, what)
    samples = len(wave) * to_rate // rate
    if samples < min_samples:
        raise too_short(what, samples, to_rate, min_samples)
    if rate == to_rate:
        return wave if wave.dtype == torch.int16 else wave.float()
    resampled = import_library("soxr").resample(_float(wave).cpu().numpy(), rate, to_rate)
    return torch.from_numpy(np.ascontiguousarray(resampled[:samples]))


def _checked(clip: Any, what: str) -> Tensor:
    """(n,) of one of `_DTYPES`, finite."""
    if isinstance(clip, np.ndarray):
        native = clip.dtype.newbyteorder("=")
        if clip.dtype.kind not in "fiu" or native.itemsize > 8:
            raise _wrong_dtype(what, clip.dtype)
        array = np.ascontiguousarray(clip, dtype=native)
        try:
            wave = torch.from_numpy(array if array.flags.writeable else array.copy())
        except TypeError:
            raise _wrong_dtype(what, clip.dtype) from None
    elif isinstance(clip, Tensor):
        wave = clip.detach()
    else:
        raise TypeError(f"{what} is of type {type(clip).__name__}; expected a tensor or an array (samples,)")
    if wave.ndim != 1:
        raise ValueError(
            f"{what} has shape {tuple(wave.shape)}; expected (samples,): of several channels take the mean, as in "
            "x.mean(channels)"
        )
    if wave.dtype not in _DTYPES:
        raise _wrong_dtype(what, wave.dtype)
    if len(wave) == 0:
        raise ValueError(f"{what} is empty; leave it out")
    if wave.is_floating_point():
        bad = len(wave) - int(wave.isfinite().sum())
        if bad:
            raise ValueError(f"{bad} of the {len(wave)} samples of {what} are NaN or infinite; leave it out or mend it")
    return wave


def _wrong_dtype(what: str, dtype: object) -> TypeError:
    return TypeError(
        f"{what} is {dtype}; expected floating point in [-1, 1] or int16: of int32 samples make x.astype('float32') / "
        "2**31, of uint8 (x.astype('float32') - 128) / 128"
    )


def _float(wave: Tensor) -> Tensor:
    return wave.float() / 32768 if wave.dtype == torch.int16 else wave.float()
