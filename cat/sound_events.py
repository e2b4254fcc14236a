"""The sounds of `cat-audio synth`: one function a class, (rng, n, rate) -> n samples, in numpy.

Classes differ in how energy moves over time and frequency. Pitch, timbre, tempo and number of events are drawn over
ranges that the classes share, so that neither the level nor the average spectrum gives the class away.

Names: n samples, rate in Hz, times and durations in seconds, frequencies in Hz. Nothing here knows about files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Samples = np.ndarray  # (n,) float64
Rng = np.random.Generator

TOP = 0.45  # highest frequency of a tone, as a share of the sample rate


# --- building blocks -------------------------------------------------------------------------------------------------


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
    """The next length that is at most 1/8 longer and a small factor times a power of two: a prime one takes ten times longer."""
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


# --- tones that move -------------------------------------------------------------------------------------------------


def _sweeps(rng: Rng, n: int, rate: int, up: bool) -> Samples:
    out = np.zeros(n)
    duration = log_uniform(rng, 0.12, 0.9)
    low = log_uniform(rng, 180, 900)
    high = min(low * rng.uniform(1.8, 4.5), TOP * rate)
    bend = rng.uniform(0.6, 1.7)
    amplitudes = rng.uniform(0.3, 1.0) ** np.arange(rng.integers(1, 6))
    for start in onsets(rng, n, rate, 1 / (duration * rng.uniform(1.05, 2.0)), 0.1):
        length = max(int(duration * rng.uniform(0.9, 1.1) * rate), 32)
        course = np.linspace(0, 1, length) ** bend
        pitch = low * (high / low) ** (course if up else 1 - course) * rng.uniform(0.95, 1.05)
        add_at(out, start, harmonic(pitch, amplitudes, rate) * fade(length, rate, 0.02, 0.04))
    return out


def chirp_up(rng: Rng, n: int, rate: int) -> Samples:
    """Repeated sweeps from low to high."""
    return _sweeps(rng, n, rate, up=True)


def chirp_down(rng: Rng, n: int, rate: int) -> Samples:
    """Repeated sweeps from high to low."""
    return _sweeps(rng, n, rate, up=False)


def siren(rng: Rng, n: int, rate: int) -> Samples:
    """One tone that swings between two pitches without a pause: wail, yelp or two-tone."""
    swing = np.mod(np.arange(n) / rate * log_uniform(rng, 0.35, 3.0) + rng.uniform(), 1.0)
    kind = rng.integers(3)
    if kind == 0:
        course = 0.5 - 0.5 * np.cos(2 * np.pi * swing)
    elif kind == 1:
        course = 1 - np.abs(2 * swing - 1)
    else:
        course = 1 / (1 + np.exp(-np.clip(np.sin(2 * np.pi * swing) * 12, -30, 30)))
    low = log_uniform(rng, 250, 900)
    high = min(low * rng.uniform(1.3, 2.6), TOP * rate)
    amplitudes = rng.uniform(0.35, 0.9) ** np.arange(10)
    return harmonic(low * (high / low) ** course, amplitudes, rate, rng)


def alarm(rng: Rng, n: int, rate: int) -> Samples:
    """Beeps of one pitch (sometimes two in turn) in groups."""
    out = np.zeros(n)
    length = max(int(log_uniform(rng, 0.04, 0.22) * rate), 32)
    pitches = log_uniform(rng, 300, 2500) * np.array([1.0, rng.choice([1.0, 1.0, 1.25, 0.8])])
    amplitudes = np.where(np.arange(9) % 2 == 0, 1.0, rng.uniform(0, 0.5)) * rng.uniform(0.3, 0.8) ** np.arange(9)
    group, position = rng.integers(1, 5), int(rng.uniform(0, 0.4) * rate)
    pause, rest = rng.uniform(0.4, 1.2) * length, rng.uniform(0.1, 0.7) * rate
    beep = 0
    while position < n:
        pitch = np.full(length, min(pitches[beep % 2], TOP * rate))
        add_at(out, position, harmonic(pitch, amplitudes, rate) * fade(length, rate, 0.004, 0.008))
        beep += 1
        position += int(length + pause + (rest if beep % group == 0 else 0))
    return out


def dial_tone(rng: Rng, n: int, rate: int) -> Samples:
    """Telephone keys: a new pair of steady tones for every digit."""
    out = np.zeros(n)
    low, high = np.array([697, 770, 852, 941]), np.array([1209, 1336, 1477, 1633])
    detune = rng.uniform(0.7, 1.3)
    duration, twist = log_uniform(rng, 0.06, 0.25), rng.uniform(0.5, 2.0)
    t = np.arange(int(duration * rate)) / rate
    for start in onsets(rng, n, rate, 1 / (duration * rng.uniform(1.2, 2.2)), 0.08):
        pair = 2 * np.pi * detune * np.array([rng.choice(low), rng.choice(high)])
        tone = np.sin(pair[0] * t) + twist * np.sin(pair[1] * t)
        add_at(out, start, tone * fade(len(t), rate, 0.005, 0.005))
    return out


def bird(rng: Rng, n: int, rate: int) -> Samples:
    """Whistled phrases: syllables with fast trills and glides of either direction."""
    out = np.zeros(n)
    center = min(log_uniform(rng, 900, 4000), 0.3 * rate)
    for start in onsets(rng, n, rate, log_uniform(rng, 2, 8), 0.5):
        length = max(int(log_uniform(rng, 0.05, 0.25) * rate), 32)
        t = np.arange(length) / rate
        trill = rng.uniform(0.02, 0.2) * np.sin(2 * np.pi * rng.uniform(12, 45) * t + rng.uniform(0, 6.3))
        glide = rng.uniform(-0.35, 0.35) * np.linspace(-1, 1, length)
        pitch = np.minimum(center * rng.uniform(0.8, 1.25) * np.exp(trill + glide), TOP * rate)
        add_at(out, start, harmonic(pitch, np.array([1.0, rng.uniform(0, 0.2)]), rate) * fade(length, rate, 0.015, 0.03))
    return out


# --- tones with an attack --------------------------------------------------------------------------------------------

_BELL_RATIOS = (
    np.array([0.5, 1.0, 1.183, 1.506, 2.0, 2.514, 2.662, 3.011, 4.166]),  # church bell
    np.array([1.0, 2.756, 5.404, 8.933]),  # bar, free at both ends
    np.array([1.0, 1.594, 2.136, 2.296, 2.653, 2.918, 3.156, 3.5]),  # membrane
    np.array([1.0, 1.41, 1.97, 2.72, 3.19, 4.3, 5.1]),  # plate
)


def bell(rng: Rng, n: int, rate: int) -> Samples:
    """Strikes with inharmonic partials, the high ones dying first, slightly beating."""
    ratios = _BELL_RATIOS[rng.integers(len(_BELL_RATIOS))]
    ratios = ratios * rng.normal(1, 0.02, len(ratios))
    fundamental = log_uniform(rng, 180, 1200)
    weights = rng.uniform(0.3, 1.0, len(ratios)) * ratios ** -rng.uniform(0.0, 0.8)
    sustain, damping = log_uniform(rng, 0.25, 1.8), rng.uniform(0.3, 0.9)
    length = min(n, int(4 * sustain * rate))
    t = np.arange(length) / rate
    strike = np.zeros(length)
    for ratio, weight in zip(ratios, weights, strict=True):
        frequency = fundamental * ratio
        if frequency < TOP * rate:
            beat = 1 + rng.uniform(0, 0.4) * np.cos(2 * np.pi * rng.uniform(0.5, 5) * t)
            strike += weight * beat * np.sin(2 * np.pi * frequency * t) * decay(length, rate, sustain * ratio**-damping)
    strike *= fade(length, rate, 0.002, 0.01)
    out = np.zeros(n)
    for start in onsets(rng, n, rate, log_uniform(rng, 0.5, 3), 0.3):
        add_at(out, start, strike * rng.uniform(0.4, 1.0))
    return out


def plucked_string(rng: Rng, n: int, rate: int) -> Samples:
    """Karplus-Strong notes of a scale, one a beat."""
    out = np.zeros(n)
    root = log_uniform(rng, 90, 420)
    scale = np.array([0, 2, 4, 7, 9, 12]) if rng.uniform() < 0.5 else np.array([0, 3, 5, 7, 10, 12])
    loss, brightness = rng.uniform(0.985, 0.999), rng.uniform(0.5, 0.95)
    for start in onsets(rng, n, rate, log_uniform(rng, 1.5, 6), 0.15):
        period = max(int(rate / (root * 2 ** (rng.choice(scale) / 12))), 4)
        add_at(out, start, _string(rng, min(n - start, int(1.2 * rate)), period, loss, brightness) * rng.uniform(0.5, 1.0))
    return out


def _string(rng: Rng, n: int, period: int, loss: float, brightness: float) -> Samples:
    """y[k] = loss (b y[k - period] + (1 - b) y[k - period - 1]), a whole period at a time."""
    rounds = n // period + 1
    y = np.zeros((rounds, period))
    y[0] = rng.uniform(-1, 1, period)
    y[0] -= y[0].mean()
    last = 0.0
    for k in range(1, rounds):
        previous = y[k - 1]
        y[k, 1:] = loss * (brightness * previous[1:] + (1 - brightness) * previous[:-1])
        y[k, 0] = loss * (brightness * previous[0] + (1 - brightness) * last)
        last = previous[-1]
    return y.reshape(-1)[:n]


def water_drops(rng: Rng, n: int, rate: int) -> Samples:
    """Bubbles: short damped tones whose pitch rises."""
    out = np.zeros(n)
    center, spread = log_uniform(rng, 350, 1600), rng.uniform(0.1, 0.6)
    for start in onsets(rng, n, rate, log_uniform(rng, 2, 14), 0.9):
        time = log_uniform(rng, 0.01, 0.05)
        length = int(6 * time * rate)
        rise = 1 + rng.uniform(0.3, 1.6) * np.linspace(0, 1, length)
        pitch = np.minimum(center * np.exp(spread * rng.standard_normal()) * rise, TOP * rate)
        tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate) * decay(length, rate, time)
        add_at(out, start, tone * fade(length, rate, 0.001, 0.002) * log_uniform(rng, 0.25, 1.0))
    return out


# --- machines and voices ---------------------------------------------------------------------------------------------


def engine(rng: Rng, n: int, rate: int) -> Samples:
    """A low harmonic tone through a resonant exhaust; speed wobbles and drifts, firing is uneven."""
    drift = rng.uniform(-0.5, 0.5) * np.linspace(-0.5, 0.5, n) + 0.02 * slow_curve(rng, n, rate, rng.uniform(3, 12))
    pitch = log_uniform(rng, 22, 110) * np.exp(drift)
    h = np.arange(1, 60)
    resonances = sum(np.exp(-(((h * pitch.mean() - log_uniform(rng, 80, 1800)) / 150) ** 2)) for _ in range(4))
    amplitudes = (0.25 + resonances) * h ** -rng.uniform(0.3, 1.1) * rng.uniform(0.4, 1.0, len(h))
    tone = harmonic(pitch, amplitudes, rate, rng)
    beat = 1 + rng.uniform(0.1, 0.6) * np.sin(np.pi * np.cumsum(pitch) / rate)
    hiss = noise(rng, n, rate, band(log_uniform(rng, 400, 2500), 1.0)) * np.maximum(beat, 0) * rng.uniform(0.05, 0.4)
    return beat * tone / (tone.std() + 1e-12) + hiss


_VOWELS = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410], [440, 1020, 2240]])


def voice(rng: Rng, n: int, rate: int) -> Samples:
    """Syllables: harmonics under moving formants, gliding pitch with vibrato, noise for consonants."""
    out = np.zeros(n)
    base, tract = log_uniform(rng, 90, 380), rng.uniform(0.85, 1.25)
    h = np.arange(1, 60)
    vibrato, vibrato_rate = rng.uniform(0, 0.04), rng.uniform(4, 7)
    for start in onsets(rng, n, rate, log_uniform(rng, 1.5, 6), 0.35):
        length = max(int(log_uniform(rng, 0.1, 0.45) * rate), 64)
        t = np.arange(length) / rate
        contour = np.cumsum(rng.normal(0, 0.1, 2))[:, None] * np.stack([np.ones(length), np.linspace(-1, 1, length)])
        pitch = base * np.exp(contour.sum(0) + vibrato * np.sin(2 * np.pi * vibrato_rate * t))
        ends = [tract * _VOWELS[rng.integers(len(_VOWELS))] for _ in range(2)]
        tones = []
        for formants in ends:
            gains = sum(g / (1 + ((h * pitch.mean() - f) / 90) ** 2) for f, g in zip(formants, (1.0, 0.6, 0.3), strict=True))
            tones.append(harmonic(pitch, (gains + 0.01) * h**-0.3, rate))
        course = np.linspace(0, 1, length)
        syllable = (tones[0] * (1 - course) + tones[1] * course) * fade(length, rate, 0.03, 0.06)
        if rng.uniform() < 0.5:
            hiss_length = int(rng.uniform(0.03, 0.09) * rate) + 16
            hiss = noise(rng, hiss_length, rate, band(min(log_uniform(rng, 1800, 6000), 0.4 * rate), 0.5))
            add_at(out, max(start - hiss_length // 2, 0), hiss * fade(hiss_length, rate, 0.01, 0.02) * rng.uniform(0.02, 0.15))
        add_at(out, start, syllable / (np.abs(syllable).max() + 1e-12) * rng.uniform(0.5, 1.0))
    return out


# --- strokes and clicks ----------------------------------------------------------------------------------------------


def drums(rng: Rng, n: int, rate: int) -> Samples:
    """Kick, snare and hat on the sixteenths of a bar that repeats."""
    out = np.zeros(n)
    length = int(0.25 * rate)
    t = np.arange(length) / rate
    bottom = rng.uniform(40, 70)
    drop = bottom + rng.uniform(60, 200) * np.exp(-t / rng.uniform(0.01, 0.04))
    kick = np.sin(2 * np.pi * np.cumsum(drop) / rate) * decay(length, rate, rng.uniform(0.05, 0.12))
    snare = noise(rng, length, rate, band(min(log_uniform(rng, 900, 4000), 0.4 * rate), 1.0)) * 0.4
    snare = (snare + 0.5 * np.sin(2 * np.pi * rng.uniform(150, 260) * t)) * decay(length, rate, rng.uniform(0.03, 0.09))
    hat = noise(rng, length, rate, lambda f: (f > 0.25 * rate) * 1.0) * decay(length, rate, rng.uniform(0.008, 0.04)) * 0.3
    sixteenth = 15 / rng.uniform(80, 170)
    bar = rng.uniform(size=(3, 16)) < np.array([[0.25], [0.12], [0.5]])
    bar[0, [0, 8]], bar[1, [4, 12]] = True, True
    begin = rng.integers(16)
    for step in range(int(n / rate / sixteenth) + 1):
        start = int(step * sixteenth * rate)
        for sound, beats in zip((kick, snare, hat), bar, strict=True):
            if beats[(begin + step) % 16]:
                add_at(out, start, sound * rng.uniform(0.6, 1.0))
    return out * fade(n, rate, 0.001, 0.001)


def clicks(rng: Rng, n: int, rate: int) -> Samples:
    """Ticks of one knock: a clock, a metronome, a bouncing ball."""
    length = max(int(log_uniform(rng, 0.01, 0.05) * rate), 16)
    t = np.arange(length) / rate
    resonance = min(log_uniform(rng, 350, 3500), TOP * rate)
    knock = np.sin(2 * np.pi * resonance * t) + rng.uniform(0, 0.8) * rng.standard_normal(length)
    knock *= decay(length, rate, log_uniform(rng, 0.001, 0.008))
    if rng.uniform() < 0.3:  # a ball: gaps shrink by the same factor
        gaps = rng.uniform(0.25, 0.6) * rng.uniform(0.75, 0.9) ** np.arange(40)
        starts = (np.cumsum(gaps[gaps > 0.02]) * rate).astype(int) - int(gaps[0] * rate * rng.uniform(0.5, 1))
        loudness = rng.uniform(0.85, 0.95) ** np.arange(len(starts))
    else:
        starts = onsets(rng, n, rate, log_uniform(rng, 1.5, 10), rng.choice([0.0, 0.05, 0.3]))
        loudness = np.where(np.arange(len(starts)) % 2 == 0, 1.0, rng.uniform(0.4, 1.0))
    out = np.zeros(n)
    for start, gain in zip(starts, loudness, strict=True):
        add_at(out, start, knock * gain)
    return out


# --- textures --------------------------------------------------------------------------------------------------------


def _spray(rng: Rng, n: int, rate: int, per_second: float, heavy: float, kernel: Samples) -> Samples:
    """A Poisson shower of one short sound with log-normal loudness (`heavy` its deviation)."""
    impulses = np.zeros(n)
    places = rng.integers(0, n, rng.poisson(per_second * n / rate) + 1)
    np.add.at(impulses, places, np.exp(heavy * rng.standard_normal(len(places))) * rng.choice([-1.0, 1.0], len(places)))
    sound = convolve(impulses, kernel)
    return sound / (sound.std() + 1e-12)


def rain(rng: Rng, n: int, rate: int) -> Samples:
    """Dense drops, each a short ring, over broad steady noise."""
    length = int(0.02 * rate)
    ring = np.sin(2 * np.pi * min(log_uniform(rng, 700, 5000), TOP * rate) * np.arange(length) / rate)
    ring = (ring + 0.5 * rng.standard_normal(length)) * decay(length, rate, log_uniform(rng, 0.0006, 0.004))
    drops = _spray(rng, n, rate, log_uniform(rng, 60, 600), 0.8, ring)
    tilt = rng.uniform(0.0, 0.7)
    bed = noise(rng, n, rate, lambda f: np.maximum(f, 150.0) ** -tilt)
    return drops + rng.uniform(0.3, 1.2) * bed


def crackle(rng: Rng, n: int, rate: int) -> Samples:
    """A fire: few sharp cracks of very different loudness in bursts, over a soft rumble."""
    length = int(0.03 * rate)
    snap = rng.standard_normal(length) * decay(length, rate, log_uniform(rng, 0.001, 0.006))
    cracks = _spray(rng, n, rate, log_uniform(rng, 6, 40), 1.3, snap)
    bursts = np.exp(0.7 * slow_curve(rng, n, rate, rng.uniform(2, 6)))
    tilt = rng.uniform(0.5, 1.2)
    rumble = noise(rng, n, rate, lambda f: np.maximum(f, 60.0) ** -tilt)
    return cracks * bursts + rng.uniform(0.1, 0.5) * rumble * (1 + 0.3 * slow_curve(rng, n, rate, 8))


def wind(rng: Rng, n: int, rate: int) -> Samples:
    """Noise in a few bands whose strength and, now and then, whistle comes and goes with the gusts."""
    gusts = slow_curve(rng, n, rate, rng.uniform(0.8, 2.5))
    out = np.zeros(n)
    for _ in range(rng.integers(2, 5)):
        sound = noise(rng, n, rate, band(min(log_uniform(rng, 120, 2500), 0.3 * rate), rng.uniform(0.3, 1.2)))
        out += sound * np.exp(rng.uniform(0.5, 1.0) * gusts + 0.4 * slow_curve(rng, n, rate, 2))
    return out


def insects(rng: Rng, n: int, rate: int) -> Samples:
    """A narrow band of noise or a tone, chopped into pulses: crickets in groups, cicadas without end."""
    center = min(log_uniform(rng, 1200, 5500), 0.4 * rate)
    t = np.arange(n) / rate
    carrier = noise(rng, n, rate, band(center, rng.uniform(0.02, 0.3)))
    pulse = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(18, 70) * t)
    out = carrier * pulse ** rng.uniform(0.7, 2.5)
    if rng.uniform() < 0.6:
        group = np.mod(t * log_uniform(rng, 1.2, 5) + rng.uniform(), 1.0) < rng.uniform(0.3, 0.7)
        out *= np.convolve(group, np.ones(64) / 64, mode="same")
    return out


CLASSES: dict[str, Callable[[Rng, int, int], Samples]] = {
    sound.__name__: sound
    for sound in (
        alarm, bell, bird, chirp_down, chirp_up, clicks, crackle, dial_tone, drums, engine, insects, plucked_string, rain,
        siren, voice, water_drops, wind,
    )
}  # fmt: skip


# --- what happens to every sound -------------------------------------------------------------------------------------


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
    tilt, pivot = rng.uniform(-0.35, 0.35), 1000.0
    peaks = [(band(log_uniform(rng, 150, 4000), rng.uniform(0.3, 1.0)), rng.uniform(-1.0, 1.0)) for _ in range(2)]

    size = fft_length(len(sound) + int(0.3 * rate))
    f = np.fft.rfftfreq(size, 1 / rate)
    spectrum = np.fft.rfft(sound, size) * (np.clip(f, 60.0, 8000.0) / pivot) ** tilt
    spectrum *= np.exp(sum(gain * shape(f) for shape, gain in peaks))
    if rng.uniform() < 0.5:
        length = int(rng.uniform(0.05, 0.3) * rate)
        tail = rng.standard_normal(length) * decay(length, rate, length / rate / 4)
        tail *= log_uniform(rng, 0.05, 0.6) / np.sqrt((tail**2).sum())
        tail[0] += 1.0
        spectrum *= np.fft.rfft(tail, size)
    return np.fft.irfft(spectrum, size)[: len(sound)]


def make_clip(rng: Rng, label: str, seconds: tuple[float, float], snr_db: tuple[float, float]) -> tuple[np.ndarray, int]:
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
