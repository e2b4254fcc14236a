"""`fbank`: public function, checks and registration. Its implementations are the extension and the reference."""

# Shapes: B clips, n samples, T frames, F mel bins.

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device
from .._library import register
from ..backends import BackendError
from .native import fbank_native, why_not_native
from .reference import WINDOWS, FbankSettings, fbank_backward_reference, fbank_reference

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.float64)
OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fbank(
    waveform: Tensor,
    lengths: Tensor | None = None,
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
    target_length: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Kaldi-compatible log-mel filter bank energies, as torchaudio's ``compliance.kaldi.fbank`` gives them with
    ``htk_compat=True, use_energy=False, dither=0``.

    Args:
        waveform: (B, n) or (n,), in [-1, 1]: float32, float16, bfloat16 (all computed in float32), float64 (in
            float64), or int16, which is scaled by 2^-15. The clip's mean is not removed here.
        lengths: (B,) int64, samples of each clip of a ragged batch; what lies behind them is not read. None: all n.
        sample_rate: Hz.
        num_mel_bins: F.
        frame_length_ms, frame_shift_ms: frames of 400 samples every 160 at 16 kHz; only whole frames count, so that
            T = 1 + (n - 400) // 160 (Kaldi's snip-edges).
        low_freq, high_freq: the filter bank's band in Hz; ``high_freq`` of 0 or less counts from the Nyquist frequency.
        window: "hanning", "povey" or "hamming".
        preemphasis: y[i] = x[i] - preemphasis * x[i - 1], and y[0] = (1 - preemphasis) * x[0], in each frame.
        remove_dc: subtract each frame's mean.
        target_length: frames of the result; missing ones are 0 *before* the normalisation, further ones are cut off.
        mean, std: normalise to ``(x - mean) / (2 std)``; both or neither.
        scale: factor on the waveform (2^15 for models trained on integer samples).
        dtype: of the result: float32 (the default, float64 for float64 input), float16, bfloat16 or float64.
        backend: "native" (the C++/CUDA extension, float32 arithmetic), "torch", or "auto": native where it can run.

    Returns:
        (B, T, F), or (T, F) for a waveform (n,). Pad frames of a ragged batch are 0 before the normalisation. The floor
        is log(2^-23) = -15.942385. NaN in a frame makes that frame NaN.

    Differentiable once with respect to a floating-point waveform, in forward mode and by `torch.func` any number of
    times. The backward is PyTorch's on every backend, and computes the spectra again. On a GPU nothing waits, and the
    call can be captured in a CUDA graph once it has been made before with the same settings.

    Raises:
        ValueError: fewer samples than one frame takes, wrong rank, settings that contradict each other.
        TypeError: dtypes other than those above.
        BackendError: a backend asked for by name that cannot run here, or cannot compute this.
    """
    settings = FbankSettings(
        sample_rate,
        num_mel_bins,
        float(frame_length_ms),
        float(frame_shift_ms),
        float(low_freq),
        float(high_freq),
        window,
    )
    _check_settings(settings, target_length, mean, std, dtype)
    _check_waveform(waveform, lengths, settings)
    dtype = _output_dtype(waveform.dtype) if dtype is None else dtype
    reason = why_not_native(settings, waveform, dtype)
    if backend == "native" and reason is not None:
        raise BackendError(f"backend='native' cannot run fbank: {reason}")
    wave_BN = waveform.unsqueeze(0) if waveform.ndim == 1 else waveform
    spec_BTF = _fbank(
        wave_BN,
        lengths,
        settings.sample_rate,
        settings.num_mel_bins,
        settings.frame_length_ms,
        settings.frame_shift_ms,
        settings.low_freq,
        settings.high_freq,
        window,
        preemphasis,
        remove_dc,
        target_length,
        mean,
        std,
        scale,
        dtype,
        backend=backend,
    )
    return spec_BTF.squeeze(0) if waveform.ndim == 1 else spec_BTF


# --- implementation --------------------------------------------------------------------------------------------------

_SETTINGS = (
    "int sample_rate, int num_mel_bins, float frame_length_ms, float frame_shift_ms, float low_freq, float high_freq, "
    "str window, float preemphasis, bool remove_dc, SymInt? target_length, float? mean, float? std, float scale"
)
_NUM_SETTINGS = _SETTINGS.count(",") + 1


def _fbank_native(waveform: Tensor, lengths: Tensor | None, *arguments: Any) -> Tensor:
    *settings, dtype = arguments
    table, rest = _unpack(settings)
    if why_not_native(table, waveform, dtype) is not None:
        return _fbank_torch(waveform, lengths, *arguments)
    _check_lengths(lengths, waveform.shape[1], table)
    target_length = rest.pop("target_length")
    frames = _frames(waveform.shape[1], table) if target_length is None else target_length
    return fbank_native(waveform, lengths, table, frames, dtype, **rest)


def _fbank_torch(waveform: Tensor, lengths: Tensor | None, *arguments: Any) -> Tensor:
    *settings, dtype = arguments
    table, rest = _unpack(settings)
    _check_lengths(lengths, waveform.shape[1], table)
    return fbank_reference(waveform, lengths, table, **rest).to(dtype).contiguous()


def _fbank_backward_torch(grad_BTF: Tensor, waveform: Tensor, lengths: Tensor | None, *settings: Any) -> Tensor:
    table, rest = _unpack(settings)
    return fbank_backward_reference(grad_BTF, waveform, lengths, table, **rest)


def _frames(samples: int, settings: FbankSettings) -> int:
    return 1 + (samples - settings.frame_length) // settings.frame_shift


def _unpack(arguments: Sequence[Any]) -> tuple[FbankSettings, dict[str, Any]]:
    names = ("preemphasis", "remove_dc", "target_length", "mean", "std", "scale")
    return FbankSettings(*arguments[:7]), dict(zip(names, arguments[7:], strict=True))


def _fbank_fake(waveform: Tensor, lengths: Tensor | None, *arguments: Any) -> Tensor:
    *settings, dtype = arguments
    table, rest = _unpack(settings)
    target_length = rest["target_length"]
    frames = _frames(waveform.shape[1], table) if target_length is None else target_length
    return waveform.new_empty((waveform.shape[0], frames, table.num_mel_bins), dtype=dtype)


def _fbank_backward_fake(grad_BTF: Tensor, waveform: Tensor, lengths: Tensor | None, *settings: Any) -> Tensor:
    return torch.empty_like(waveform, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    waveform, lengths, *arguments = inputs
    ctx.save_for_backward(waveform, lengths)
    ctx.settings = arguments[:-1]


def _backward(ctx: Any, grad_BTF: Tensor) -> tuple[Tensor | None, ...]:
    waveform, lengths = ctx.saved_tensors
    grad_BN = _fbank_backward(grad_BTF, waveform, lengths, *ctx.settings, backend=ctx.backend)
    return grad_BN, *([None] * (_NUM_SETTINGS + 2))


_fbank_backward = register(
    "fbank",
    f'fbank_backward(Tensor grad, Tensor waveform, Tensor? lengths, {_SETTINGS}, *, str backend="auto") -> Tensor',
    {"native": _fbank_backward_torch, "torch": _fbank_backward_torch},
    fake=_fbank_backward_fake,
)
_fbank = register(
    "fbank",
    f'fbank(Tensor waveform, Tensor? lengths, {_SETTINGS}, ScalarType dtype, *, str backend="auto") -> Tensor',
    {"native": _fbank_native, "torch": _fbank_torch},
    fake=_fbank_fake,
    setup_context=_save_for_backward,
    backward=_backward,
    composite=_fbank_torch,
)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_options(**options: Any) -> None:
    """Raises what `fbank` would raise for these keyword arguments, whatever the waveform."""
    try:
        bound = inspect.signature(fbank).bind(None, None, **options)
    except TypeError as error:
        raise TypeError(f"fbank: {error}; see help(cat_kernels.fbank) for its options") from None
    bound.apply_defaults()
    given = bound.arguments
    settings = FbankSettings(**{f.name: given[f.name] for f in dataclasses.fields(FbankSettings)})
    _check_settings(settings, given["target_length"], given["mean"], given["std"], given["dtype"])


def _output_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_waveform(waveform: Tensor, lengths: Tensor | None, settings: FbankSettings) -> None:
    if not isinstance(waveform, Tensor):
        raise TypeError(f"fbank: waveform must be a tensor (B, n) or (n,), got {type(waveform).__name__}")
    if waveform.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"fbank: waveform is {waveform.dtype}; expected floating point in [-1, 1] or int16, convert it first"
        )
    if waveform.ndim not in (1, 2):
        raise ValueError(
            f"fbank: waveform must be (B, n) or (n,), got shape {tuple(waveform.shape)}; "
            "average the channels and leave one row a clip"
        )
    samples, needed = waveform.shape[-1], settings.frame_length
    if samples < needed:
        hint = "pad the clip or leave it out"
        if waveform.ndim == 2 and samples <= 8 and waveform.shape[0] >= needed:
            hint = f"this looks like (samples, channels), pass waveform.T.mean(0) of the {waveform.shape[0]} samples"
        raise ValueError(
            f"fbank: a frame of {settings.frame_length_ms:g} ms at {settings.sample_rate} Hz needs {needed} samples, "
            f"the waveform of shape {tuple(waveform.shape)} has {samples}; {hint}"
        )
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"fbank: lengths must be an int64 tensor (B,), got {got}")
    batch = waveform.shape[:-1].numel()
    if lengths.shape != (batch,):
        raise ValueError(f"fbank: lengths has shape {tuple(lengths.shape)}; expected ({batch},), one number a clip")
    check_device("fbank", "lengths", lengths, "waveform", waveform)


def _check_lengths(lengths: Tensor | None, samples: int, settings: FbankSettings) -> None:
    """Reads values, so on the CPU only: on a GPU every call would wait. There, a clip shorter than a frame has none."""
    if lengths is None or lengths.device.type != "cpu" or lengths.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(lengths))
    if low < settings.frame_length:
        raise ValueError(
            f"fbank: lengths[{int(lengths.argmin())}] = {low}, a frame of {settings.frame_length_ms:g} ms at "
            f"{settings.sample_rate} Hz needs {settings.frame_length} samples; pad the clip or leave it out"
        )
    if high > samples:
        raise ValueError(f"fbank: lengths[{int(lengths.argmax())}] = {high}, but the waveform has {samples} samples")


def _check_settings(
    settings: FbankSettings, target_length: int | None, mean: float | None, std: float | None, dtype: torch.dtype | None
) -> None:
    if settings.window not in WINDOWS:
        raise ValueError(f"fbank: window={settings.window!r}; expected one of {', '.join(map(repr, WINDOWS))}")
    if settings.sample_rate < 1 or settings.num_mel_bins < 1:
        raise ValueError(
            f"fbank: sample_rate={settings.sample_rate} and num_mel_bins={settings.num_mel_bins} must be at least 1"
        )
    if settings.frame_length < 2 or settings.frame_shift < 1:
        raise ValueError(
            f"fbank: frame_length_ms={settings.frame_length_ms} and frame_shift_ms={settings.frame_shift_ms} are "
            f"{settings.frame_length} and {settings.frame_shift} samples at {settings.sample_rate} Hz; "
            "at least 2 and 1 are needed"
        )
    low, high = settings.band
    if not 0 <= low < high <= settings.sample_rate / 2:
        raise ValueError(
            f"fbank: low_freq={settings.low_freq} and high_freq={settings.high_freq} give a band from {low:g} to "
            f"{high:g} Hz; it must lie within 0 and {settings.sample_rate / 2:g} Hz, half the sample rate"
        )
    if target_length is not None and target_length < 1:
        raise ValueError(f"fbank: target_length={target_length}; expected at least 1 frame, or None for all there are")
    if (mean is None) != (std is None):
        raise ValueError(f"fbank: mean={mean} and std={std}; give both, or neither for unnormalised energies")
    if std is not None and not std > 0:
        raise ValueError(f"fbank: std={std}; expected a positive number")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise TypeError(f"fbank: dtype={dtype}; expected float32, float16, bfloat16 or float64")
