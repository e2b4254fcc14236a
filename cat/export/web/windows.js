// Long audio in overlapping windows: `Windower` of cat/prediction/windows.py, for steps of a row of patches.
"use strict";

// plan: samples of a window and of a row, rows from window to window and of a window, and the rows that a row's window
// has heard behind it.
class Windower {
  constructor(plan) {
    this.plan = plan;
    this.samples = 0;
    this.start = this.begin = 0; // rows: of the next window, and of the sound that are done
    this.origin = this.kept = 0; // the first sample that is held, and how many are
    this.held = new Float32Array(2 * (plan.samples + plan.hop * plan.row));
  }

  // The windows that are whole with the next samples.
  *feed(wave) {
    const plan = this.plan;
    for (let done = 0; done < wave.length; ) {
      if (this.kept === this.held.length) this.forget();
      const piece = wave.subarray(done, done + this.held.length - this.kept);
      this.held.set(piece, this.kept);
      this.kept += piece.length;
      this.samples += piece.length;
      done += piece.length;
      while (this.samples >= this.start * plan.row + plan.samples) {
        yield this.window(this.start, this.start + plan.rows - plan.lookahead);
      }
    }
  }

  // What is left when nothing follows; the last window is moved back so that it is whole.
  *finish() {
    const total = this.samples ? this.total() : 0, last = Math.max(0, total - this.plan.rows);
    if (this.begin < total) yield this.window(Math.min(this.start, last), total);
  }

  window(start, end) {
    const first = start * this.plan.row - this.origin;
    const wave = this.held.slice(first, Math.min(first + this.plan.samples, this.kept));
    const window = { wave, start, begin: this.begin, end };
    this.begin = end;
    this.start += this.plan.hop;
    return window;
  }

  // Rows of a sound of so many samples: those that hear something and begin before it ends.
  total() {
    const { frameLength, frameShift, patch, row } = this.plan;
    const frames = 1 + Math.floor((this.samples - frameLength) / frameShift);
    const heard = frames >= 1 ? Math.ceil(frames / patch) : 0;
    return Math.max(1, Math.min(heard, Math.ceil(this.samples / row)));
  }

  // Samples before the last whole window: the sound may end here, and its last window then begins behind it.
  forget() {
    const first = Math.max(0, this.start - this.plan.hop) * this.plan.row - this.origin;
    this.held.copyWithin(0, first, this.kept);
    this.origin += first;
    this.kept -= first;
  }
}
