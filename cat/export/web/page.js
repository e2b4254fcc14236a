// The page: loads the parts, takes a file or the microphone, shows what the worker hears.
"use strict";

const config = JSON.parse(document.getElementById("config").textContent);
const $ = (id) => document.getElementById(id);
const MOST_ROWS = 500, MOST_BEHIND = 10;
const PIECE = 1 << 20; // samples of a file that are handed over at once

let worker;
let sound = null; // that is heard: id, name, live, seconds, events, ...
let sounds = 0;

// ---------------------------------------------------------------- the parts

// Each is a script that calls `part`: what is opened as a file may load scripts, but may not read files.
const arrived = [];
globalThis.part = (text) => arrived.push(text);

async function load() {
  const files = Object.values(config.parts).flat();
  const parts = {};
  let done = 0;
  for (const [name, scripts] of Object.entries(config.parts)) {
    const pieces = [];
    for (const script of scripts) {
      say(`Loading ${++done} of ${files.length} …`);
      await loaded(script);
      pieces.push(await unpacked(arrived.pop()));
    }
    parts[name] = await new Blob(pieces).arrayBuffer();
  }
  say("Starting …");
  const code = [parts.runtime, ...["resampler", "windows", "events-of-rows", "worker"].map((id) => `${$(id).textContent}\n`)];
  worker = new Worker(URL.createObjectURL(new Blob(code, { type: "text/javascript" })));
  worker.onmessage = ({ data }) => data.id === undefined || data.id === sound?.id ? MESSAGES[data.kind](data) : null;
  worker.onerror = (event) => fail(event.message ?? "the worker could not start");
  delete parts.runtime;
  worker.postMessage({ kind: "load", parts, about: config }, Object.values(parts));
}

function loaded(script) {
  return new Promise((resolve, reject) => {
    const element = make("script");
    element.src = script;
    element.onload = () => {
      element.remove();
      resolve();
    };
    element.onerror = () => reject(new Error(`${script} is missing beside this page; copy the whole folder`));
    document.head.append(element);
  });
}

// base64 of gzip
async function unpacked(text) {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).blob();
}

// ---------------------------------------------------------------- what the worker says

const MESSAGES = {
  ready() {
    say("Ready. Drop a sound, or listen.");
    document.body.dataset.state = "ready";
    for (const id of ["file", "listen"]) $(id).disabled = false;
  },

  window(data) {
    sound.picture.add(data);
    bars(data.clip);
    data.events.forEach(tell);
    sound.seconds = data.seconds;
    if (sound.live) {
      say(`Listening: ${clock(data.seconds)}, real-time factor ${factor(data)}`);
      if (data.behind > MOST_BEHIND) {
        halt();
        fail("this computer hears this model more slowly than sound goes by; it can hear files");
      }
    } else {
      say(`${sound.name}: ${clock(data.seconds)} of ${clock(sound.span)}`);
    }
    document.dispatchEvent(new CustomEvent("heard", { detail: data }));
  },

  done(data) {
    sound.seconds = data.seconds;
    bars(data.scores);
    data.events.forEach(tell);
    say(`${sound.name}: heard ${clock(data.seconds)} in ${clock(data.busy)}, real-time factor ${factor(data)}`);
    keep(data.scores);
    document.body.dataset.state = "done";
  },

  error(data) {
    halt();
    fail(data.text);
  },
};

function factor(data) {
  return (data.busy / Math.max(data.seconds, 1e-9)).toFixed(2);
}

// ---------------------------------------------------------------- what a person does

function begin(name, live, span, rate) {
  halt();
  sound = { id: ++sounds, name, live, span, seconds: 0, events: new Map(), picture: new Picture(config, span, live) };
  document.body.dataset.state = "hearing";
  $("results").hidden = false;
  $("events").replaceChildren();
  $("none").hidden = false;
  $("none").textContent = "none";
  $("table").hidden = true;
  $("save").hidden = true;
  $("cursor").hidden = true;
  $("player").hidden = live;
  worker.postMessage({ kind: "begin", id: sound.id, rate, live });
}

async function hear(file) {
  try {
    say(`${file.name}: decoding …`);
    const { wave, rate } = await decoded(file);
    begin(file.name, false, wave.length / rate, rate);
    URL.revokeObjectURL($("player").src);
    $("player").src = URL.createObjectURL(file);
    for (let at = 0; at < wave.length; at += PIECE) {
      worker.postMessage({ kind: "feed", id: sound.id, wave: wave.slice(at, at + PIECE) });
    }
    worker.postMessage({ kind: "finish", id: sound.id });
  } catch (error) {
    fail(error.message);
  }
}

let opening = false;

async function listenOrStop() {
  if (sound?.stop) {
    worker.postMessage({ kind: "finish", id: sound.id });
    quiet();
    return;
  }
  if (opening) return;
  opening = true;
  try {
    const before = sounds;
    const stop = await listen((wave, rate) => {
      if (sounds === before) {
        begin("microphone", true, LIVE_SECONDS, rate);
        sound.stop = stop;
        $("listen").textContent = "Stop listening";
      }
      if (sounds === before + 1 && sound.stop) worker.postMessage({ kind: "feed", id: sound.id, wave }, [wave.buffer]);
      else stop();
    });
  } catch (error) {
    fail(error.message);
  }
  opening = false;
}

// No more from the microphone; what was heard goes on to be shown.
function quiet() {
  sound?.stop?.();
  if (sound) sound.stop = null;
  $("listen").textContent = "Listen to the microphone";
}

// Nothing more of this sound.
function halt() {
  quiet();
  if (sound) worker.postMessage({ kind: "stop", id: sound.id });
}

// ---------------------------------------------------------------- what is shown

function say(text) {
  $("status").textContent = text;
  $("status").className = "";
}

function fail(text) {
  $("status").textContent = `Error: ${text}`;
  $("status").className = "warning";
  document.body.dataset.state = "error";
}

function bars(scores) {
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b).slice(0, 5);
  $("bars").replaceChildren(
    ...order.map((c) => {
      const bar = make("div", "bar", make("i"), make("span", "name", config.names[c]), make("span", "", percent(scores[c])));
      bar.firstChild.style.width = `${100 * scores[c]}%`;
      return bar;
    }),
  );
}

// An event has a row from the moment it is certain, which is completed when it has ended. What goes on has the newest at the
// top, and forgets the oldest; of a file the first are shown.
function tell(event) {
  const { live, events } = sound, list = $("events"), id = `event-${event.number}`, known = events.has(event.number);
  events.set(event.number, event);
  $("none").hidden = events.size > 0 && (live || events.size <= MOST_ROWS);
  $("none").textContent = events.size ? `${MOST_ROWS} of ${events.size}; Save as JSON has all` : "none";
  $("table").hidden = false;
  let row = $(id);
  if (row === null) {
    if (known || (!live && events.size > MOST_ROWS)) return;
    row = make("tr");
    row.id = id;
    if (live) list.prepend(row);
    else list.append(row);
    if (list.childElementCount > MOST_ROWS) list.lastChild.remove();
  }
  const end = event.offset === null ? "…" : clock(event.offset);
  const cells = [clock(event.onset), end, config.names[event.column], percent(event.score)];
  row.replaceChildren(...cells.map((text) => make("td", "", text)));
}

// As `cat-audio predict --json` writes it, with the events.
function row(scores) {
  const rounded = (value, digits) => Number(value.toFixed(digits));
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  const named = (c, score) => ({ label: config.classes[c], name: config.names[c], score: rounded(score, 6) });
  const events = [...sound.events.values()].sort((a, b) => a.onset - b.onset || a.offset - b.offset || a.column - b.column);
  return {
    path: sound.name,
    seconds: rounded(sound.seconds, 3),
    scores: order.map((c) => named(c, scores[c])),
    events: events.map((event) => ({
      onset: rounded(event.onset, 3),
      offset: rounded(event.offset, 3),
      ...named(event.column, event.score),
    })),
  };
}

function keep(scores) {
  const text = `${JSON.stringify(row(scores))}\n`;
  URL.revokeObjectURL($("save").href);
  $("save").href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  $("save").download = `${sound.name}.json`;
  $("save").hidden = false;
  $("save").dataset.row = text;
}

// ---------------------------------------------------------------- wiring

$("file").onchange = () => {
  if ($("file").files.length) hear($("file").files[0]);
  $("file").value = "";
};
$("listen").onclick = listenOrStop;
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
}
addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (worker && !$("file").disabled && event.dataTransfer.files.length) hear(event.dataTransfer.files[0]);
});

function follow() {
  if (!sound || sound.live) return;
  $("cursor").hidden = false;
  $("cursor").style.left = `${Math.min(100, (100 * $("player").currentTime) / sound.span)}%`;
  if (!$("player").paused) requestAnimationFrame(follow);
}
for (const name of ["play", "seeked"]) $("player").addEventListener(name, follow);
$("plot").onclick = (event) => {
  if (!sound || sound.live) return;
  const place = $("plot").getBoundingClientRect();
  $("player").currentTime = ((event.clientX - place.left) / place.width) * sound.span;
};

load().catch((error) => fail(error.message));
