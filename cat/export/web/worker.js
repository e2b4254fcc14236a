// Hears sound beside the page: samples in, spectrogram, scores and events out.
"use strict";

let config, session;
let current = 0; // the sound that is heard; what belongs to another is dropped
let listener = null;
let work = Promise.resolve();

onmessage = ({ data }) => {
  if (data.kind === "begin") {
    current = data.id;
    listener = new Listener(data);
  }
  if (data.kind === "stop" && data.id === current) current = 0;
  const mine = listener;
  if (data.kind === "feed" && data.id === current) mine.received += data.wave.length / mine.rate;
  work = work.then(() => TASKS[data.kind](data, mine)).catch((error) => {
    if (data.id === current) current = 0;
    postMessage({ kind: "error", id: data.id, text: String(error?.message ?? error) });
  });
};

const TASKS = {
  load: (data) => load(data),
  begin: (data, listener) => listener.start(data.live),
  stop: () => {},
  feed: (data, listener) => data.id === current && listener.feed(data.wave),
  finish: (data, listener) => data.id === current && listener.finish(),
};

async function load({ parts, about }) {
  config = about;
  ort.env.wasm.numThreads = 1; // threads need headers that a plain file server, or a file, does not give
  ort.env.wasm.wasmBinary = parts.wasm;
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([parts.mjs], { type: "text/javascript" })) };
  session = await ort.InferenceSession.create(new Uint8Array(parts.model), { executionProviders: ["wasm"] });
  await run(new Float32Array(config.plan.frameLength));
  postMessage({ kind: "ready" });
}

// The windows of sound that goes on lie an eighth of one apart, or as far as computing takes, with some to spare.
async function livePlan() {
  const whole = new Float32Array(config.plan.samples);
  await run(whole); // the first run also reserves memory
  const began = performance.now();
  await run(whole);
  const seconds = (performance.now() - began) / 1000;
  const { rows, row } = config.plan, eighth = Math.max(1, Math.floor(rows / 8));
  const hop = Math.min(rows, Math.max(eighth, Math.ceil((seconds / 0.7) * (config.rate / row))));
  return { ...config.plan, hop, lookahead: config.hasFrames ? Math.min(eighth, rows - hop) : 0 };
}

async function run(wave) {
  const feeds = { waveform: new ort.Tensor("float32", wave, [1, wave.length]) };
  const found = await session.run(feeds);
  const taken = Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data.slice()]));
  for (const tensor of Object.values(found)) tensor.dispose();
  return taken;
}

class Listener {
  constructor({ id, rate }) {
    this.id = id;
    this.rate = rate;
    this.received = 0; // seconds
    this.busy = 0;
    this.count = 0;
    this.sum = new Float64Array(config.classes.length);
    this.best = new Float32Array(config.classes.length);
  }

  async start(live) {
    this.plan = live ? (config.live ??= await livePlan()) : config.plan;
    this.resampler = new Resampler(this.rate, config.rate);
    this.windower = new Windower(this.plan);
    const step = this.plan.row / config.rate;
    // A clip head has no rows: its windows stand for the middle of what they heard.
    const timing = config.hasFrames
      ? { step, lead: 0 }
      : { step: this.plan.hop * step, lead: ((this.plan.rows - this.plan.hop) * step) / 2 };
    this.finder = new EventFinder(config.settings, timing);
    this.next = 0;
  }

  async feed(wave) {
    await this.hear(this.windower.feed(this.resampler.feed(wave)));
  }

  async finish() {
    await this.hear(this.windower.feed(this.resampler.finish()));
    const seconds = this.windower.samples / config.rate;
    if (this.windower.samples < this.plan.frameLength) {
      throw new Error(`${seconds.toFixed(3)} s is too short: expected ${this.plan.frameLength / config.rate} s or more`);
    }
    await this.hear(this.windower.finish());
    if (this.id !== current) return;
    const events = this.finder.finish(seconds);
    const { id, count, busy } = this;
    const scores = config.aggregate === "mean" ? Float32Array.from(this.sum, (sum) => sum / count) : this.best;
    postMessage({ kind: "done", id, seconds, scores, events, busy });
  }

  async hear(windows) {
    for (const window of windows) {
      const began = performance.now();
      const found = await run(window.wave);
      this.busy += (performance.now() - began) / 1000;
      await new Promise((resume) => setTimeout(resume)); // a message may say that this is no longer wanted
      if (this.id !== current) return;
      this.tell(window, found);
    }
  }

  tell(window, found) {
    const classes = config.classes.length, { patch, bins } = this.plan, clip = found.scores;
    if (!clip.every(Number.isFinite)) throw new Error("the model gave scores that are not finite");
    this.count++;
    clip.forEach((score, c) => {
      this.sum[c] += score;
      this.best[c] = Math.max(this.best[c], score);
    });
    const first = window.begin - window.start, last = window.end - window.start;
    let rows = [clip], counted = rows;
    if (config.hasFrames) {
      rows = counted = [];
      for (let r = first; r < last; r++) rows.push(found.frame_scores.slice(r * classes, (r + 1) * classes));
    } else {
      // The last window of a sound is moved back, and has no place among the others.
      if (window.start !== this.next) counted = [];
      this.next = window.start + this.plan.hop;
    }
    const { samples } = this.windower, seconds = samples / config.rate, step = this.plan.row / config.rate;
    const heard = 1 + Math.floor((samples - this.plan.frameLength) / this.plan.frameShift); // frames; behind them is padding
    const frames = Math.min(last * patch, heard - window.start * patch);
    postMessage({
      kind: "window",
      id: this.id,
      begin: window.begin * step,
      end: Math.min(window.end * step, seconds),
      rows,
      clip,
      spectrogram: found.spectrogram.slice(first * patch * bins, frames * bins),
      events: this.finder.feed(counted),
      seconds,
      busy: this.busy,
      behind: this.received - seconds,
    });
  }
}
