// A waveform from one sampling rate to another, piece by piece: a windowed sinc, as soxr's high quality has it (what
// the other commands resample with): flat to 0.91 of the lower Nyquist frequency, 125 dB down from that frequency on.
"use strict";

const PASS = 0.913, ATTENUATION = 125, MOST_RESAMPLING = 256;

class Resampler {
  constructor(from, to) {
    if (Math.max(from, to) > MOST_RESAMPLING * Math.min(from, to)) {
      throw new Error(`sample rate ${from} Hz: too far from ${to} Hz to resample`);
    }
    const divisor = greatestDivisor(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    const low = Math.min(1, to / from); // the lower Nyquist frequency, of the input's
    this.cutoff = ((1 + PASS) / 2) * low;
    this.half = Math.ceil((ATTENUATION - 7.95) / (2.285 * Math.PI * (1 - PASS) * low) / 2);
    this.beta = 0.1102 * (ATTENUATION - 8.7);
    this.phases = new Map();
    this.held = new Float32Array(0); // the input from sample `origin` on
    this.origin = this.taken = this.given = 0;
  }

  // Float32Array in, the samples out that are certain.
  feed(wave) {
    if (this.up === this.down) return wave;
    const held = new Float32Array(this.held.length + wave.length);
    held.set(this.held);
    held.set(wave, this.held.length);
    this.held = held;
    this.taken += wave.length;
    return this.filtered(Math.floor(((this.taken - this.half - 1) * this.up) / this.down) + 1);
  }

  // What is left when silence follows: taken * to / from samples in all, rounded down.
  finish() {
    if (this.up === this.down) return new Float32Array(0);
    const all = Math.floor((this.taken * this.up) / this.down);
    const padded = new Float32Array(this.held.length + this.half + 1);
    padded.set(this.held);
    this.held = padded;
    return this.filtered(all);
  }

  filtered(until) {
    const out = new Float32Array(Math.max(0, until - this.given));
    for (let i = 0; i < out.length; i++, this.given++) {
      const place = this.given * this.down, phase = place % this.up;
      const first = (place - phase) / this.up - this.half + 1 - this.origin;
      const taps = this.taps(phase);
      let sum = 0;
      for (let k = Math.max(0, -first); k < taps.length; k++) sum += taps[k] * this.held[first + k];
      out[i] = sum;
    }
    const next = Math.floor((this.given * this.down) / this.up) - this.half + 1;
    if (next > this.origin) {
      this.held = this.held.slice(next - this.origin);
      this.origin = next;
    }
    return out;
  }

  // Of an output that lies phase / up samples behind an input sample.
  taps(phase) {
    let taps = this.phases.get(phase);
    if (taps === undefined) {
      taps = new Float64Array(2 * this.half);
      const share = phase / this.up, edge = bessel(this.beta);
      for (let k = 0; k < taps.length; k++) {
        const t = k - this.half + 1 - share, r = t / this.half;
        if (Math.abs(r) < 1) taps[k] = sinc(this.cutoff * t) * bessel(this.beta * Math.sqrt(1 - r * r)) / edge;
      }
      const sum = taps.reduce((a, b) => a + b);
      taps = taps.map((tap) => tap / sum);
      this.phases.set(phase, taps);
    }
    return taps;
  }
}

function greatestDivisor(a, b) {
  return b ? greatestDivisor(b, a % b) : a;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

// The modified Bessel function of the first kind and order zero.
function bessel(x) {
  let sum = 1, term = 1;
  for (let k = 1; term > 1e-17 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}
