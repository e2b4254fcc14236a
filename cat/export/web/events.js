// Events out of rows of scores, each told once when its onset is certain and once when it has ended: `EventFinder` of
// cat/prediction/events.py.
"use strict";

class EventFinder {
  // settings: one a class: threshold, low, median, gap, shortest. timing: step, the seconds from row to row, and lead,
  // those that every row but the first begins later.
  constructor(settings, timing) {
    this.timing = timing;
    this.found = 0;
    this.classes = settings.map((one, column) => new ClassEvents(column, one, timing.step));
    const widths = [...new Set(settings.map((one) => one.median))].sort((a, b) => a - b);
    this.filters = widths.map(
      (width) => new Median(width, [...settings.keys()].filter((column) => settings[column].median === width)),
    );
  }

  // rows: an array of scores of all classes each.
  feed(rows) {
    return this.told(this.filters.flatMap((one) => this.follow(one, one.feed(rows))));
  }

  finish(duration) {
    const said = this.filters.flatMap((one) => this.follow(one, one.finish()));
    for (const one of this.filters) {
      for (const column of one.columns) said.push(...this.classes[column].finish(one.next, one.next + one.half));
    }
    return this.told(said, duration);
  }

  follow(one, rows) {
    const said = [], first = one.next;
    one.next += rows.length;
    one.columns.forEach((column, k) => {
      rows.forEach((row, i) => said.push(...this.classes[column].step(first + i, row[k], first + i + one.half)));
    });
    return said;
  }

  told(said, duration = Infinity) {
    const ended = (one) => Number(one.end !== null);
    said.sort((a, b) => a.heard - b.heard || a.column - b.column || ended(a) - ended(b));
    return said.map((one) => {
      if (one.end === null) one.run.number = ++this.found;
      let offset = null;
      if (one.end !== null) {
        offset = duration < Infinity && one.end === one.last ? duration : Math.min(this.time(one.end), duration);
      }
      const { number, start } = one.run;
      return { number, column: one.column, onset: this.time(start), offset, score: one.peak };
    });
  }

  time(row) {
    return row ? row * this.timing.step + this.timing.lead : 0;
  }
}

// The open events of one class: the run of rows that goes on, and the one before it while the gap may still close.
class ClassEvents {
  constructor(column, settings, step) {
    this.column = column;
    this.threshold = settings.threshold;
    this.lowest = settings.low ?? settings.threshold;
    this.gap = Math.floor(settings.gap / step + 1e-6);
    this.shortest = Math.ceil(settings.shortest / step - 1e-6);
    this.run = this.before = null;
  }

  *step(row, score, heard) {
    if (score >= this.lowest) {
      let run = (this.run ??= { start: row, peak: score, sure: false, told: false, number: 0 });
      run.peak = Math.max(run.peak, score);
      if (score >= this.threshold && !run.sure) run = this.run = this.joined(run);
      if (run.sure && !run.told && row + 1 - run.start >= this.shortest) {
        run.told = true;
        yield this.say(heard, run, null, null);
      }
      return;
    }
    this.close(row);
    if (this.before !== null && row + 1 - this.before.end > this.gap) yield* this.end(heard, null);
  }

  *finish(rows, heard) {
    this.close(rows);
    yield* this.end(heard, rows);
  }

  joined(run) {
    run.sure = true;
    if (this.before === null) return run;
    const before = this.before.run;
    this.before = null;
    before.peak = Math.max(before.peak, run.peak);
    return before;
  }

  close(row) {
    if (this.run !== null && this.run.sure) this.before = { run: this.run, end: row };
    this.run = null;
  }

  *end(heard, last) {
    if (this.before !== null && this.before.run.told) yield this.say(heard, this.before.run, this.before.end, last);
    this.before = null;
  }

  say(heard, run, end, last) {
    return { heard, column: this.column, run, peak: run.peak, end, last };
  }
}

// A median filter over the rows of some columns; the first and the last row go on beyond the ends.
class Median {
  constructor(width, columns) {
    this.width = width;
    this.half = (width - 1) / 2;
    this.columns = columns;
    this.next = 0;
    this.held = null;
  }

  feed(rows) {
    return this.filtered(rows.map((row) => this.columns.map((column) => row[column])));
  }

  finish() {
    return this.held === null ? [] : this.filtered(Array(this.half).fill(this.held.at(-1)));
  }

  filtered(rows) {
    if (this.width === 1 || rows.length === 0) return rows;
    const held = [...(this.held ?? Array(this.half).fill(rows[0])), ...rows];
    this.held = held.slice(Math.max(0, held.length - this.width + 1));
    const found = [];
    for (let i = this.width; i <= held.length; i++) found.push(this.middle(held.slice(i - this.width, i)));
    return found;
  }

  middle(rows) {
    return this.columns.map((_, k) => rows.map((row) => row[k]).sort((a, b) => a - b)[this.half]);
  }
}
