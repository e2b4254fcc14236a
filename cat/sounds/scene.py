"""From a sound to a recording of it: onset, room, microphone, background noise, level, channels."""

from __future__ import annotations

import numpy as np

from cat.sounds.events import CLASSES
from cat.sounds.signals import Rng, Samples, band, decay, fade, fft_length, harmonic, log_uniform, noise


def background(rng: Rng, n: int, rate: int) -> Samples:
    """White, pink or brown noise, or mains hum over a little of it; standard deviation 1."""
    kind = rng.integers(4)
    exponent = (0.0, 0.5, 1.0, 0.5)[kind]
    sound = noise(rng, n, rate, lambda f: np.maximum(f, 20.0) ** -exponent)
    if kind == 3:
        hum = harmonic(np.full(n, rng.choice([50.0, 60.0])), rng.uniform(0.1, 1, 12) * 0.8 ** np.arange(12), rate, rng)
        sound = 0.3 * sound + hum / hum.std()
    return sound / sound.std()


def room_and_microphone(rng: Rng, sound: Samples, rate: int) -> Samples:
    """A random spectral tilt, two broad peaks or dips, and for half of the clips a short reverberation."""
    tilt, pivot = rng.uniform(-0.2, 0.2), 1000.0
    peaks = [(band(log_uniform(rng, 340, 1800), rng.uniform(0.3, 1.0)), rng.uniform(-0.6, 0.6)) for _ in range(2)]

    size = fft_length(len(sound) + int(0.3 * rate))
    f = np.fft.rfftfreq(size, 1 / rate)
    spectrum = np.fft.rfft(sound, size) * (np.clip(f, 60.0, 8000.0) / pivot) ** tilt
    spectrum *= np.exp(sum(gain * shape(f) for shape, gain in peaks))
    if rng.uniform() < 0.5:
        length = int(rng.uniform(0.05, 0.3) * rate)
        tail = rng.standard_normal(length) * decay(length, rate, length / rate / 4)
        tail *= log_uniform(rng, 0.093, 0.32) / np.sqrt((tail**2).sum())
        tail[0] += 1.0
        spectrum *= np.fft.rfft(tail, size)
    return np.fft.irfft(spectrum, size)[: len(sound)]


def make_clip(
    rng: Rng, label: str, seconds: tuple[float, float], snr_db: tuple[float, float]
) -> tuple[np.ndarray, int]:
    """One clip of class `label`: ((channels, n) float64 within [-1, 1], sample rate).

    `seconds` and `snr_db` are the ranges that the length and the signal-to-noise ratio are drawn from.
    """
    if label not in CLASSES:
        raise ValueError(f"no sound class {label!r}; the classes are {', '.join(CLASSES)}")
    rate = int(rng.choice([8000, 11025, 16000, 16000, 22050, 32000, 44100, 48000]))
    n = max(int(rng.uniform(*seconds) * rate), 1)
    begin, end = _span(rng, n, rate)
    sound = np.zeros(n)
    sound[begin:end] = CLASSES[label](rng, end - begin, rate)
    sound[begin:end] *= fade(end - begin, rate, 0.005, 0.02)
    sound = room_and_microphone(rng, sound, rate)
    power = np.sqrt(np.mean(sound[begin:end] ** 2)) + 1e-9
    sound += power * 10 ** (-rng.uniform(*snr_db) / 20) * background(rng, n, rate)

    channels = [sound]
    if rng.uniform() < 0.2:  # two microphones: later and softer in one
        delay = int(rng.uniform(0, 0.0008) * rate)
        channels.append(np.concatenate([np.zeros(delay), sound[: n - delay]]) * rng.uniform(0.5, 1.0))
    clip = np.stack(channels)
    level_db = rng.uniform(-26.0, -1.0)
    return clip * (10 ** (level_db / 20) / (np.abs(clip).max() + 1e-12)), rate


def _span(rng: Rng, n: int, rate: int) -> tuple[int, int]:
    """Where in the clip the sound is: all of it, or from a random onset for at least 0.6 s (or the whole clip)."""
    least = min(n, int(0.6 * rate))
    length = n if rng.uniform() < 0.4 else int(rng.uniform(max(least, n // 2), n)) if n > least else n
    begin = int(rng.integers(0, n - length + 1))
    return begin, begin + length
