// What was heard, over time: the spectrogram, and below it a strip for each of the classes that scored highest.
"use strict";

const COLUMNS = 1200, STRIPS = 8, LIVE_SECONDS = 30;
// matplotlib's "magma", at equal distances.
const COLOURS = [[0, 0, 4], [40, 17, 89], [101, 26, 128], [158, 47, 127], [212, 72, 103], [246, 112, 92], [254, 169, 115],
  [252, 253, 191]];
const LOUDEST = 1.2; // of a normalised spectrogram, whose standard deviation is a half

class Picture {
  // span: seconds that are shown. frame: seconds of a frame.
  constructor(config, span, live) {
    this.names = config.names;
    this.bins = config.plan.bins;
    this.frame = config.plan.frameShift / config.rate;
    this.span = span;
    this.live = live;
    this.first = 0; // the second at the left edge
    this.columns = Math.max(1, Math.min(COLUMNS, Math.floor(span / this.frame))); // no more than frames
    this.loud = new Float32Array(this.columns * this.bins).fill(-Infinity);
    this.scores = new Float32Array(this.columns * this.names.length);
    this.canvas = document.getElementById("spectrogram");
    this.canvas.width = this.columns;
    this.canvas.height = this.bins;
    this.strips = new Map();
    document.getElementById("strips").replaceChildren();
    this.axis();
  }

  column(seconds) {
    const place = ((seconds - this.first) / this.span) * this.columns;
    return Math.max(0, Math.min(this.columns - 1, Math.floor(place + 1e-6)));
  }

  add({ begin, end, rows, spectrogram }) {
    if (this.live && end > this.first + this.span) this.move(end - this.span);
    for (let t = 0; t * this.bins < spectrogram.length; t++) {
      const at = this.column(begin + t * this.frame) * this.bins;
      for (let f = 0; f < this.bins; f++) {
        this.loud[at + f] = Math.max(this.loud[at + f], spectrogram[t * this.bins + f]);
      }
    }
    const classes = this.names.length, seconds = (end - begin) / rows.length;
    rows.forEach((row, r) => {
      const last = this.column(begin + (r + 1) * seconds - 1e-6);
      for (let at = this.column(begin + r * seconds); at <= last; at++) {
        row.forEach((score, c) => {
          this.scores[at * classes + c] = Math.max(this.scores[at * classes + c], score);
        });
      }
    });
    this.draw();
  }

  // By whole columns, so that nothing is drawn twice.
  move(first) {
    const columns = Math.min(this.columns, Math.ceil(((first - this.first) / this.span) * this.columns));
    this.first += (columns / this.columns) * this.span;
    for (const [values, width, empty] of [[this.loud, this.bins, -Infinity], [this.scores, this.names.length, 0]]) {
      values.copyWithin(0, columns * width);
      values.fill(empty, values.length - columns * width);
    }
    this.axis();
  }

  draw() {
    const context = this.canvas.getContext("2d"), image = context.createImageData(this.columns, this.bins);
    for (let t = 0; t < this.columns; t++) {
      for (let f = 0; f < this.bins; f++) {
        const value = this.loud[t * this.bins + f];
        if (value === -Infinity) continue;
        const at = 4 * ((this.bins - 1 - f) * this.columns + t);
        image.data.set(colour((value + LOUDEST) / (2 * LOUDEST)), at);
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    const classes = this.names.length, highest = new Float32Array(classes);
    this.scores.forEach((score, i) => (highest[i % classes] = Math.max(highest[i % classes], score)));
    const order = [...highest.keys()].sort((a, b) => highest[b] - highest[a]).slice(0, STRIPS);
    document.getElementById("strips").replaceChildren(...order.map((c) => this.strip(c, highest[c])));
  }

  strip(c, highest) {
    let strip = this.strips.get(c);
    if (strip === undefined) {
      strip = make("div", "strip", make("span", "name", this.names[c]), make("canvas"));
      this.strips.set(c, strip);
    }
    const canvas = strip.lastChild, context = canvas.getContext("2d");
    strip.title = `${this.names[c]}: up to ${percent(highest)}`;
    canvas.width = this.columns;
    canvas.height = 1;
    const [r, g, b] = getComputedStyle(document.body).getPropertyValue("--strip").split(",").map(Number);
    const image = context.createImageData(this.columns, 1);
    for (let t = 0; t < this.columns; t++) {
      image.data.set([r, g, b, Math.round(255 * Math.sqrt(this.scores[t * this.names.length + c]))], 4 * t);
    }
    context.putImageData(image, 0, 0);
    return strip;
  }

  axis() {
    const axis = document.getElementById("axis"), ticks = [];
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800].find((s) => this.span / s <= 8) ?? 3600;
    for (let n = Math.ceil(this.first / step - 1e-9); n * step <= this.first + this.span * 0.97; n++) {
      const tick = make("span", "", clock(n * step, step));
      tick.style.left = `${(100 * (n * step - this.first)) / this.span}%`;
      ticks.push(tick);
    }
    axis.replaceChildren(...ticks);
  }
}

function colour(share) {
  const place = Math.max(0, Math.min(1, share)) * (COLOURS.length - 1), low = Math.min(COLOURS.length - 2, Math.floor(place));
  return COLOURS[low].map((value, i) => value + (place - low) * (COLOURS[low + 1][i] - value));
}

// 1:05 or 0.5 s
function clock(seconds, step = 0.01) {
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  if (seconds < 60) return `${seconds.toFixed(digits)} s`;
  const rest = (seconds % 60).toFixed(digits);
  return `${Math.floor(seconds / 60)}:${rest.padStart(digits ? digits + 3 : 2, "0")}`;
}

function percent(score) {
  return `${(100 * score).toFixed(score < 0.0995 ? 1 : 0)} %`;
}

function make(name, style = "", ...children) {
  const element = document.createElement(name);
  if (style) element.className = style;
  element.append(...children);
  return element;
}
