"""The classes of sound: one function each, (rng, n, rate) -> n samples.

Classes differ in how energy moves over time and frequency. Pitch, timbre, tempo and number of events are drawn over
ranges that the classes share, so that neither the level nor the average spectrum gives the class away.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cat.sounds.signals import (
    TOP,
    Rng,
    Samples,
    add_at,
    band,
    convolve,
    decay,
    fade,
    harmonic,
    log_uniform,
    noise,
    onsets,
    slow_curve,
)

# --- tones that move -------------------------------------------------------------------------------------------------


def _sweeps(rng: Rng, n: int, rate: int, up: bool) -> Samples:
    out = np.zeros(n)
    duration = log_uniform(rng, 0.2, 0.54)
    low = log_uniform(rng, 270, 600)
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
    swing = np.mod(np.arange(n) / rate * log_uniform(rng, 0.6, 1.8) + rng.uniform(), 1.0)
    kind = rng.integers(3)
    if kind == 0:
        course = 0.5 - 0.5 * np.cos(2 * np.pi * swing)
    elif kind == 1:
        course = 1 - np.abs(2 * swing - 1)
    else:
        course = 1 / (1 + np.exp(-np.clip(np.sin(2 * np.pi * swing) * 12, -30, 30)))
    low = log_uniform(rng, 340, 650)
    high = min(low * rng.uniform(1.3, 2.6), TOP * rate)
    amplitudes = rng.uniform(0.35, 0.9) ** np.arange(10)
    return harmonic(low * (high / low) ** course, amplitudes, rate, rng)


def alarm(rng: Rng, n: int, rate: int) -> Samples:
    """Beeps of one pitch (sometimes two in turn) in groups."""
    out = np.zeros(n)
    length = max(int(log_uniform(rng, 0.061, 0.14) * rate), 32)
    pitches = log_uniform(rng, 510, 1500) * np.array([1.0, rng.choice([1.0, 1.0, 1.25, 0.8])])
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
    duration, twist = log_uniform(rng, 0.086, 0.17), rng.uniform(0.5, 2.0)
    t = np.arange(int(duration * rate)) / rate
    for start in onsets(rng, n, rate, 1 / (duration * rng.uniform(1.2, 2.2)), 0.08):
        pair = 2 * np.pi * detune * np.array([rng.choice(low), rng.choice(high)])
        tone = np.sin(pair[0] * t) + twist * np.sin(pair[1] * t)
        add_at(out, start, tone * fade(len(t), rate, 0.005, 0.005))
    return out


def bird(rng: Rng, n: int, rate: int) -> Samples:
    """Whistled phrases: syllables with fast trills and glides of either direction."""
    out = np.zeros(n)
    center = min(log_uniform(rng, 1300, 2800), 0.3 * rate)
    for start in onsets(rng, n, rate, log_uniform(rng, 2.8, 5.7), 0.5):
        length = max(int(log_uniform(rng, 0.075, 0.17) * rate), 32)
        t = np.arange(length) / rate
        trill = rng.uniform(0.02, 0.2) * np.sin(2 * np.pi * rng.uniform(12, 45) * t + rng.uniform(0, 6.3))
        glide = rng.uniform(-0.35, 0.35) * np.linspace(-1, 1, length)
        pitch = np.minimum(center * rng.uniform(0.8, 1.25) * np.exp(trill + glide), TOP * rate)
        add_at(
            out, start, harmonic(pitch, np.array([1.0, rng.uniform(0, 0.2)]), rate) * fade(length, rate, 0.015, 0.03)
        )
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
    fundamental = log_uniform(rng, 290, 750)
    weights = rng.uniform(0.3, 1.0, len(ratios)) * ratios ** -rng.uniform(0.0, 0.8)
    sustain, damping = log_uniform(rng, 0.41, 1.1), rng.uniform(0.3, 0.9)
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
    for start in onsets(rng, n, rate, log_uniform(rng, 0.78, 1.9), 0.3):
        add_at(out, start, strike * rng.uniform(0.4, 1.0))
    return out


def plucked_string(rng: Rng, n: int, rate: int) -> Samples:
    """Karplus-Strong notes of a scale, one a beat."""
    out = np.zeros(n)
    root = log_uniform(rng, 130, 290)
    scale = np.array([0, 2, 4, 7, 9, 12]) if rng.uniform() < 0.5 else np.array([0, 3, 5, 7, 10, 12])
    loss, brightness = rng.uniform(0.985, 0.999), rng.uniform(0.5, 0.95)
    for start in onsets(rng, n, rate, log_uniform(rng, 2.1, 4.2), 0.15):
        period = max(int(rate / (root * 2 ** (rng.choice(scale) / 12))), 4)
        add_at(
            out, start, _string(rng, min(n - start, int(1.2 * rate)), period, loss, brightness) * rng.uniform(0.5, 1.0)
        )
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
    center, spread = log_uniform(rng, 510, 1100), rng.uniform(0.1, 0.6)
    for start in onsets(rng, n, rate, log_uniform(rng, 3.3, 8.6), 0.9):
        time = log_uniform(rng, 0.015, 0.033)
        length = int(6 * time * rate)
        rise = 1 + rng.uniform(0.3, 1.6) * np.linspace(0, 1, length)
        pitch = np.minimum(center * np.exp(spread * rng.standard_normal()) * rise, TOP * rate)
        tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate) * decay(length, rate, time)
        add_at(out, start, tone * fade(length, rate, 0.001, 0.002) * log_uniform(rng, 0.35, 0.71))
    return out


# --- machines and voices ---------------------------------------------------------------------------------------------


def engine(rng: Rng, n: int, rate: int) -> Samples:
    """A low harmonic tone through a resonant exhaust; speed wobbles and drifts, firing is uneven."""
    drift = rng.uniform(-0.5, 0.5) * np.linspace(-0.5, 0.5, n) + 0.02 * slow_curve(rng, n, rate, rng.uniform(3, 12))
    pitch = log_uniform(rng, 33, 74) * np.exp(drift)
    h = np.arange(1, 60)
    resonances = sum(np.exp(-(((h * pitch.mean() - log_uniform(rng, 170, 830)) / 150) ** 2)) for _ in range(4))
    amplitudes = (0.25 + resonances) * h ** -rng.uniform(0.3, 1.1) * rng.uniform(0.4, 1.0, len(h))
    tone = harmonic(pitch, amplitudes, rate, rng)
    beat = 1 + rng.uniform(0.1, 0.6) * np.sin(np.pi * np.cumsum(pitch) / rate)
    hiss = noise(rng, n, rate, band(log_uniform(rng, 630, 1600), 1.0)) * np.maximum(beat, 0) * rng.uniform(0.05, 0.4)
    return beat * tone / (tone.std() + 1e-12) + hiss


_VOWELS = np.array(
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410], [440, 1020, 2240]]
)


def voice(rng: Rng, n: int, rate: int) -> Samples:
    """Syllables: harmonics under moving formants, gliding pitch with vibrato, noise for consonants."""
    out = np.zeros(n)
    base, tract = log_uniform(rng, 130, 270), rng.uniform(0.85, 1.25)
    h = np.arange(1, 60)
    vibrato, vibrato_rate = rng.uniform(0, 0.04), rng.uniform(4, 7)
    for start in onsets(rng, n, rate, log_uniform(rng, 2.1, 4.2), 0.35):
        length = max(int(log_uniform(rng, 0.15, 0.31) * rate), 64)
        t = np.arange(length) / rate
        contour = np.cumsum(rng.normal(0, 0.1, 2))[:, None] * np.stack([np.ones(length), np.linspace(-1, 1, length)])
        pitch = base * np.exp(contour.sum(0) + vibrato * np.sin(2 * np.pi * vibrato_rate * t))
        ends = [tract * _VOWELS[rng.integers(len(_VOWELS))] for _ in range(2)]
        tones = []
        for formants in ends:
            gains = sum(
                g / (1 + ((h * pitch.mean() - f) / 90) ** 2) for f, g in zip(formants, (1.0, 0.6, 0.3), strict=True)
            )
            tones.append(harmonic(pitch, (gains + 0.01) * h**-0.3, rate))
        course = np.linspace(0, 1, length)
        syllable = (tones[0] * (1 - course) + tones[1] * course) * fade(length, rate, 0.03, 0.06)
        if rng.uniform() < 0.5:
            hiss_length = int(rng.uniform(0.03, 0.09) * rate) + 16
            hiss = noise(rng, hiss_length, rate, band(min(log_uniform(rng, 2400, 4400), 0.4 * rate), 0.5))
            add_at(
                out,
                max(start - hiss_length // 2, 0),
                hiss * fade(hiss_length, rate, 0.01, 0.02) * rng.uniform(0.02, 0.15),
            )
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
    snare = noise(rng, length, rate, band(min(log_uniform(rng, 1300, 2800), 0.4 * rate), 1.0)) * 0.4
    snare = (snare + 0.5 * np.sin(2 * np.pi * rng.uniform(150, 260) * t)) * decay(length, rate, rng.uniform(0.03, 0.09))
    hat = (
        noise(rng, length, rate, lambda f: (f > 0.25 * rate) * 1.0)
        * decay(length, rate, rng.uniform(0.008, 0.04))
        * 0.3
    )
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
    length = max(int(log_uniform(rng, 0.015, 0.033) * rate), 16)
    t = np.arange(length) / rate
    resonance = min(log_uniform(rng, 620, 2000), TOP * rate)
    knock = np.sin(2 * np.pi * resonance * t) + rng.uniform(0, 0.8) * rng.standard_normal(length)
    knock *= decay(length, rate, log_uniform(rng, 0.0017, 0.0048))
    if rng.uniform() < 0.3:  # a ball: gaps shrink by the same factor
        gaps = rng.uniform(0.25, 0.6) * rng.uniform(0.75, 0.9) ** np.arange(40)
        starts = (np.cumsum(gaps[gaps > 0.02]) * rate).astype(int) - int(gaps[0] * rate * rng.uniform(0.5, 1))
        loudness = rng.uniform(0.85, 0.95) ** np.arange(len(starts))
    else:
        starts = onsets(rng, n, rate, log_uniform(rng, 2.4, 6.2), rng.choice([0.0, 0.05, 0.3]))
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
    ring = np.sin(2 * np.pi * min(log_uniform(rng, 1100, 3100), TOP * rate) * np.arange(length) / rate)
    ring = (ring + 0.5 * rng.standard_normal(length)) * decay(length, rate, log_uniform(rng, 0.00096, 0.0025))
    drops = _spray(rng, n, rate, log_uniform(rng, 110, 340), 0.8, ring)
    tilt = rng.uniform(0.0, 0.7)
    bed = noise(rng, n, rate, lambda f: np.maximum(f, 150.0) ** -tilt)
    return drops + rng.uniform(0.3, 1.2) * bed


def crackle(rng: Rng, n: int, rate: int) -> Samples:
    """A fire: few sharp cracks of very different loudness in bursts, over a soft rumble."""
    length = int(0.03 * rate)
    snap = rng.standard_normal(length) * decay(length, rate, log_uniform(rng, 0.0016, 0.0038))
    cracks = _spray(rng, n, rate, log_uniform(rng, 9.6, 25), 1.3, snap)
    bursts = np.exp(0.7 * slow_curve(rng, n, rate, rng.uniform(2, 6)))
    tilt = rng.uniform(0.5, 1.2)
    rumble = noise(rng, n, rate, lambda f: np.maximum(f, 60.0) ** -tilt)
    return cracks * bursts + rng.uniform(0.1, 0.5) * rumble * (1 + 0.3 * slow_curve(rng, n, rate, 8))


def wind(rng: Rng, n: int, rate: int) -> Samples:
    """Noise in a few bands whose strength and, now and then, whistle comes and goes with the gusts."""
    gusts = slow_curve(rng, n, rate, rng.uniform(0.8, 2.5))
    out = np.zeros(n)
    for _ in range(rng.integers(2, 5)):
        sound = noise(rng, n, rate, band(min(log_uniform(rng, 260, 1200), 0.3 * rate), rng.uniform(0.3, 1.2)))
        out += sound * np.exp(rng.uniform(0.5, 1.0) * gusts + 0.4 * slow_curve(rng, n, rate, 2))
    return out


def insects(rng: Rng, n: int, rate: int) -> Samples:
    """A narrow band of noise or a tone, chopped into pulses: crickets in groups, cicadas without end."""
    center = min(log_uniform(rng, 1800, 3800), 0.4 * rate)
    t = np.arange(n) / rate
    carrier = noise(rng, n, rate, band(center, rng.uniform(0.02, 0.3)))
    pulse = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(18, 70) * t)
    out = carrier * pulse ** rng.uniform(0.7, 2.5)
    if rng.uniform() < 0.6:
        group = np.mod(t * log_uniform(rng, 1.7, 3.5) + rng.uniform(), 1.0) < rng.uniform(0.3, 0.7)
        out *= np.convolve(group, np.ones(64) / 64, mode="same")
    return out


CLASSES: dict[str, Callable[[Rng, int, int], Samples]] = {
    sound.__name__: sound
    for sound in (
        alarm, bell, bird, chirp_down, chirp_up, clicks, crackle, dial_tone, drums, engine, insects, plucked_string,
        rain, siren, voice, water_drops, wind,
    )
}  # fmt: skip
