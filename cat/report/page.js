"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const state = { hidden: new Set(), smoothing: 0.02, log: false };
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 54, right: 10, top: 8, bottom: 22 };

function make(parent, tag, attributes = {}, text) {
  const svg = parent instanceof SVGElement || tag === "svg";
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const colour = (run) => `var(--c${run % 8})`;

function told(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  return size >= 1e6 || size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

// ------------------------------------------------------------ curves

// Means over the points around each, a share of the curve; never over a gap of the curve's ends.
function smoothed(points, share) {
  const reach = Math.floor((share * points.length) / 2);
  if (!reach) return points.map((p) => [p[0], p[1]]);
  const sums = [0];
  for (const p of points) sums.push(sums[sums.length - 1] + p[1]);
  return points.map((p, i) => {
    const first = Math.max(0, i - reach), last = Math.min(points.length, i + reach + 1);
    return [p[0], (sums[last] - sums[first]) / (last - first)];
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(+at.toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const digit of [1, 2, 5]) {
      const at = digit * 10 ** power;
      if (at >= low && at <= high) found.push(at);
    }
  return found.length > 8 ? found.filter((at) => Math.log10(at) % 1 === 0) : found;
}

function draw(card) {
  const { chart, svg, tip } = card;
  svg.replaceChildren();
  const width = svg.clientWidth, height = svg.clientHeight;
  const curves = chart.series
    .filter((s) => !state.hidden.has(s.run))
    .map((s) => ({ ...s, line: smoothed(s.points, state.smoothing) }));
  const xs = curves.flatMap((c) => [c.points[0][0], c.points[c.points.length - 1][0]]);
  if (!xs.length || !width) return;
  const left = Math.min(...xs), right = Math.max(...xs);
  const log = state.log && curves.every((c) => c.line.every((p) => p[1] > 0));
  let low = Infinity, high = -Infinity;
  for (const c of curves) for (const p of c.line) { low = Math.min(low, p[1]); high = Math.max(high, p[1]); }
  const slack = log ? 0 : (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  [low, high] = log ? [low / 1.05, high * 1.05] : [low - slack, high + slack];
  const scale = (value) => (log ? Math.log(value) : value);
  const x = (step) => MARGIN.left + ((step - left) / (right - left || 1)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) =>
    height - MARGIN.bottom -
    ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (height - MARGIN.top - MARGIN.bottom);

  const axis = make(svg, "g", { class: "axis" });
  for (const at of log ? logTicks(low, high) : ticks(low, high, 4)) {
    make(axis, "line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(at), y2: y(at) });
    make(axis, "text", { x: MARGIN.left - 6, y: y(at) + 4, "text-anchor": "end" }, told(at));
  }
  for (const at of ticks(left, right, Math.max(2, width / 130)))
    make(axis, "text", { x: x(at), y: height - 6, "text-anchor": "middle" }, at.toLocaleString("en"));

  const inside = `inside${card.number}`;
  const clip = make(make(svg, "defs"), "clipPath", { id: inside });
  make(clip, "rect", { x: MARGIN.left, y: 0, width: Math.max(0, width - MARGIN.left - MARGIN.right), height });
  const body = make(svg, "g", { "clip-path": `url(#${inside})`, fill: "none" });
  const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
  for (const c of curves) {
    const second = c.name && c.name !== chart.series[0].name;
    if (!second && c.points.some((p) => p[2] !== p[3] || state.smoothing > 0)) {
      const floor = log ? low : -Infinity;
      const band = [...c.points.map((p) => [p[0], Math.max(p[3], floor)]),
        ...c.points.slice().reverse().map((p) => [p[0], Math.max(p[2], floor)])];
      const flat = c.points.every((p) => p[2] === p[3]);
      make(body, "path", flat
        ? { d: path(c.points), stroke: colour(c.run), "stroke-opacity": 0.25 }
        : { d: path(band) + "Z", fill: colour(c.run), "fill-opacity": 0.14 });
    }
    make(body, "path", {
      d: path(c.line), stroke: colour(c.run), "stroke-width": 1.8, "stroke-linejoin": "round",
      "stroke-dasharray": second ? "5 4" : "none", class: "curve",
    });
    if (c.line.length < 40)
      for (const p of c.line) make(body, "circle", { cx: x(p[0]), cy: y(p[1]), r: 2.5, fill: colour(c.run) });
  }
  for (const mark of chart.marks)
    if (!state.hidden.has(mark.run))
      for (const step of mark.steps) {
        const d = `M${x(step)} ${height - MARGIN.bottom - 8}l5 8h-10z`;
        make(make(body, "path", { d, fill: "var(--alarm)", class: "skipped" }), "title", {}, `step ${step} was skipped`);
      }

  const cursor = make(svg, "line", { y1: 0, y2: height - MARGIN.bottom, stroke: "var(--quiet)", visibility: "hidden" });
  svg.onpointermove = (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const step = left + ((at - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (right - left);
    tip.replaceChildren();
    let shown = null;
    for (const c of curves) {
      const near = c.line.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      if (shown === null) {
        shown = near[0];
        make(tip, "div", {}, `step ${near[0].toLocaleString("en")}`);
      }
      const line = make(tip, "div");
      make(line, "span", { class: `chip c${c.run % 8}` });
      line.append(`${data.runs[c.run]}${c.name ? ` ${c.name}` : ""}: ${told(near[1])} ${chart.unit}`);
    }
    tip.hidden = false;
    tip.style.left = at > width / 2 ? "auto" : `${at + 24}px`;
    tip.style.right = at > width / 2 ? `${width - at + 24}px` : "auto";
    for (const [name, value] of [["x1", x(shown)], ["x2", x(shown)], ["visibility", "visible"]])
      cursor.setAttribute(name, value);
  };
  svg.onpointerleave = () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };
}

function drawCharts() {
  const cards = [];
  const place = document.getElementById("charts");
  for (const group of new Set(data.charts.map((chart) => chart.group))) {
    make(place, "h3", {}, group);
    const grid = make(place, "div", { class: "grid" });
    for (const chart of data.charts.filter((c) => c.group === group)) {
      const element = make(grid, "div", { class: "card" });
      make(element, "h4", {}, chart.unit ? `${chart.title} (${chart.unit})` : chart.title);
      const svg = make(element, "svg", { role: "img", "aria-label": chart.title });
      const names = [...new Set(chart.series.map((s) => s.name).filter(Boolean))];
      if (names.length > 1) make(element, "p", { class: "legend" }, `line: ${names[0]}, dashes: ${names.slice(1).join(", ")}`);
      if (chart.marks.length) make(element, "p", { class: "legend" }, "red: updates that were skipped, not finite");
      const tip = make(element, "div", { class: "tip" });
      tip.hidden = true;
      cards.push({ chart, svg, tip, number: cards.length });
    }
  }
  const all = () => cards.forEach(draw);
  const controls = document.getElementById("controls");
  data.runs.forEach((name, run) => {
    const label = make(controls, "label");
    const box = make(label, "input", { type: "checkbox" });
    box.checked = true;
    box.onchange = () => {
      if (box.checked) state.hidden.delete(run);
      else state.hidden.add(run);
      all();
    };
    make(label, "span", { class: `chip c${run % 8}` });
    label.append(name);
  });
  const smoothing = make(controls, "label");
  smoothing.append("smooth");
  const slider = make(smoothing, "input", { type: "range", min: 0, max: 0.2, step: 0.01, value: state.smoothing });
  slider.oninput = () => { state.smoothing = Number(slider.value); all(); };
  const logarithmic = make(controls, "label");
  const box = make(logarithmic, "input", { type: "checkbox" });
  box.onchange = () => { state.log = box.checked; all(); };
  logarithmic.append("logarithmic");
  let last = place.clientWidth;
  all();
  new ResizeObserver(() => {
    if (place.clientWidth !== last) { last = place.clientWidth; all(); }
  }).observe(place);
}

// ------------------------------------------------------------ samples

const MAGMA = [[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100], [251, 135, 97],
  [254, 194, 135], [252, 253, 191]];

function magma(value) {
  const at = (value / 255) * (MAGMA.length - 1), low = Math.min(Math.floor(at), MAGMA.length - 2), rest = at - low;
  return MAGMA[low].map((part, i) => part + rest * (MAGMA[low + 1][i] - part));
}

function paint(canvas, sample, mask) {
  const { frames, bins, patch } = sample, columns = Math.floor(bins / patch);
  const bytes = Uint8Array.from(atob(sample.spectrogram), (c) => c.charCodeAt(0));
  const visible = mask < 0 ? null : new Set(sample.visible[mask]);
  [canvas.width, canvas.height] = [frames, bins];
  const context = canvas.getContext("2d"), image = context.createImageData(frames, bins);
  for (let t = 0; t < frames; t++)
    for (let f = 0; f < bins; f++) {
      const hidden = visible && !visible.has(Math.floor(t / patch) * columns + Math.floor(f / patch));
      const [r, g, b] = hidden ? [150, 150, 155] : magma(bytes[t * bins + f]);
      image.data.set([r, g, b, 255], ((bins - 1 - f) * frames + t) * 4);
    }
  context.putImageData(image, 0, 0);
}

function drawSamples() {
  const place = document.getElementById("samples");
  if (!place) return;
  for (const run of new Set(data.samples.map((s) => s.run))) {
    if (data.runs.length > 1) make(place, "h3", {}, data.runs[run]);
    const grid = make(place, "div", { class: "grid" });
    for (const sample of data.samples.filter((s) => s.run === run)) {
      const card = make(grid, "div", { class: "card" });
      make(card, "h4", {}, [sample.name, ...sample.labels].join(" · "));
      const picture = make(card, "div", { class: "picture" });
      const canvas = make(picture, "canvas", { role: "img", "aria-label": `spectrogram of ${sample.name}` });
      const cursor = make(picture, "i");
      cursor.hidden = true;
      paint(canvas, sample, -1);
      const views = sample.visible.map((patches, m) => [m, `mask ${m + 1}`]);
      const buttons = (views.length ? [[-1, "all"], ...views] : []).map(([mask, name]) => {
        const button = make(card, "button", { type: "button", "aria-pressed": mask < 0 }, name);
        button.onclick = () => {
          paint(canvas, sample, mask);
          for (const other of buttons) other.setAttribute("aria-pressed", other === button);
        };
        return button;
      });
      if (views.length) {
        const patches = Math.floor(sample.frames / sample.patch) * Math.floor(sample.bins / sample.patch);
        const seen = sample.visible[0].length;
        make(card, "p", { class: "legend" },
          `under a mask the student sees ${seen} of ${patches} patches (${Math.round((100 * seen) / patches)} %)`);
      }
      const audio = make(card, "audio", { controls: "", preload: "metadata", src: sample.audio });
      audio.ontimeupdate = () => {
        cursor.hidden = audio.paused && !audio.currentTime;
        cursor.style.left = `${(100 * audio.currentTime) / sample.shown_seconds}%`;
      };
    }
  }
}

drawCharts();
drawSamples();
document.documentElement.dataset.ready = "yes";
