"""Building blocks of synthetic sounds: tones, noise, envelopes, pulses.

Names: n samples, rate in Hz, times and durations in seconds, frequencies in Hz.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Samples = np.ndarray  # (n,) float64
Rng = np.random.Generator

TOP = 0.45  # highest frequency of a tone, as a share of the sample rate


def log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def harmonic(frequency: np.ndarray, amplitudes: np.ndarray, rate: int, rng: Rng | None = None) -> Samples:
    """A periodic tone along `frequency` (n,): harmonic h has amplitudes[h - 1]; those above TOP are left out.

    Read from one period in a table: no more work for thirty harmonics than for one.
    """
    kept = int(np.clip(TOP * rate / max(float(frequency.max()), 1.0), 1, len(amplitudes)))
    spectrum = np.zeros(1025, dtype=complex)
    angles = -np.pi / 2 * np.ones(kept) if rng is None else rng.uniform(0, 2 * np.pi, kept)
    spectrum[1 : kept + 1] = amplitudes[:kept] * np.exp(1j * angles)
    table = np.fft.irfft(spectrum) * 1024
    table = np.append(table, table[0])
    position = np.mod(np.cumsum(frequency) / rate, 1.0) * (len(table) - 1)
    return np.interp(position, np.arange(len(table)), table)


def fade(n: int, rate: int, attack: float, release: float) -> Samples:
    """Raised-cosine attack and release, flat between; shortened to fit into n samples."""
    envelope = np.ones(n)
    for width, side in ((attack, slice(None)), (release, slice(None, None, -1))):
        edge = min(max(int(width * rate), 1), max(n // 2, 1))
        envelope[side][:edge] *= 0.5 - 0.5 * np.cos(np.pi * (np.arange(edge) + 0.5) / edge)
    return envelope


def decay(n: int, rate: int, time: float) -> Samples:
    """Exponential decay to 1/e in `time`."""
    return np.exp(-np.arange(n) / (time * rate))


def fft_length(n: int) -> int:
    """The next length that is at most 1/8 longer and 2^k times a small number: a prime one takes ten times as long."""
    step = 1 << max((n - 1).bit_length() - 4, 0)
    return -(-n // step) * step


def noise(rng: Rng, n: int, rate: int, gain: Callable[[np.ndarray], np.ndarray]) -> Samples:
    """Gaussian noise with the amplitude response `gain(frequencies)`, standard deviation 1."""
    size = fft_length(n)
    spectrum = np.fft.rfft(rng.standard_normal(size)) * gain(np.fft.rfftfreq(size, 1 / rate))
    shaped = np.fft.irfft(spectrum, size)[:n]
    return shaped / (shaped.std() + 1e-12)


def band(center: float, octaves: float) -> Callable[[np.ndarray], np.ndarray]:
    """A Gaussian band on the log-frequency axis; `octaves` is its standard deviation."""
    return lambda f: np.exp(-0.5 * (np.log2(np.maximum(f, 1.0) / center) / octaves) ** 2)


def slow_curve(rng: Rng, n: int, rate: int, per_second: float) -> Samples:
    """A smooth random curve of mean 0 and deviation about 1, with `per_second` independent values a second."""
    knots = max(int(n / rate * per_second) + 3, 4)
    values = rng.standard_normal(knots)
    position = np.linspace(0, knots - 1.001, n)
    left, share = position.astype(int), position % 1.0
    share = share * share * (3 - 2 * share)
    return values[left] * (1 - share) + values[np.minimum(left + 1, knots - 1)] * share


def add_at(out: Samples, start: int, event: Samples) -> None:
    """Add `event` into `out` from sample `start`; what reaches past the end is cut."""
    if 0 <= start < len(out):
        length = min(len(event), len(out) - start)
        out[start : start + length] += event[:length]


def convolve(signal: Samples, kernel: Samples) -> Samples:
    """The first len(signal) samples of the convolution."""
    size = fft_length(len(signal) + len(kernel) - 1)
    return np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(kernel, size), size)[: len(signal)]


def onsets(rng: Rng, n: int, rate: int, per_second: float, jitter: float) -> np.ndarray:
    """Start samples of a pulse with `per_second` beats: regular at jitter 0, a Poisson process at jitter 1."""
    count = int(n / rate * per_second * 2) + 8
    gaps = (1 - jitter + jitter * rng.exponential(size=count)) / per_second
    times = np.cumsum(gaps) - gaps[0] * rng.uniform(0, 1)
    starts = (times * rate).astype(int)
    return starts[starts < n]
