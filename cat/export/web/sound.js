// Sound of a file or the microphone, at its own rate: the resampling is the page's, and the same in all browsers.
"use strict";

// {wave: the mean of the channels, rate}
async function decoded(file) {
  const bytes = await file.arrayBuffer(), view = new DataView(bytes);
  if (bytes.byteLength === 0) throw new Error(`${file.name} is empty: 0 bytes`);
  const found = wavOf(view) ?? (await decodedByBrowser(bytes, rateOf(view), file.name));
  if (!found.wave.every(Number.isFinite)) throw new Error(`${file.name}: some of its samples are NaN or infinite`);
  return found;
}

// Samples of a WAV file as they are. Browsers decode those of 16 bits with positive ones louder by 1 / 32767: an overtone
// that is 0.03 dB of a quiet band. null: another kind of file, or of WAV.
function wavOf(view) {
  if (textOf(view, 0, 4) !== "RIFF" || textOf(view, 8, 4) !== "WAVE") return null;
  let format = null;
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const kind = textOf(view, at, 4), size = view.getUint32(at + 4, true), begin = at + 8;
    if (kind === "fmt " && begin + 16 <= view.byteLength) {
      const code = view.getUint16(begin, true), extended = code === 0xfffe && size >= 26 && begin + 26 <= view.byteLength;
      format = {
        code: extended ? view.getUint16(begin + 24, true) : code,
        channels: view.getUint16(begin + 2, true),
        rate: view.getUint32(begin + 4, true),
        bytes: view.getUint16(begin + 14, true) / 8,
      };
    }
    if (kind === "data") return format && samplesOf(view, begin, Math.min(size, view.byteLength - begin), format);
    at = begin + size + (size % 2);
  }
  return null;
}

function samplesOf(view, begin, size, { code, channels, rate, bytes }) {
  const read = {
    "1-1": (at) => view.getUint8(at) / 128 - 1,
    "1-2": (at) => view.getInt16(at, true) / 32768,
    "1-3": (at) => (view.getUint16(at, true) + 65536 * view.getInt8(at + 2)) / 8388608,
    "1-4": (at) => view.getInt32(at, true) / 2147483648,
    "3-4": (at) => view.getFloat32(at, true),
    "3-8": (at) => view.getFloat64(at, true),
  }[`${code}-${bytes}`];
  if (read === undefined || !channels || !rate) return null;
  const wave = new Float32Array(Math.floor(size / (bytes * channels)));
  for (let i = 0, at = begin; i < wave.length; i++) {
    let sum = 0;
    for (let channel = 0; channel < channels; channel++, at += bytes) sum += read(at);
    wave[i] = sum / channels;
  }
  return { wave, rate };
}

async function decodedByBrowser(bytes, rate, name) {
  let context, buffer;
  try {
    context = new OfflineAudioContext(1, 1, rate);
  } catch {
    context = new OfflineAudioContext(1, 1, 48000); // a rate that this browser has not
  }
  try {
    buffer = await context.decodeAudioData(bytes);
  } catch {
    throw new Error(`${name}: this browser cannot decode it; expected a sound file, as WAV, FLAC, MP3 or Ogg`);
  }
  const wave = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    buffer.getChannelData(channel).forEach((sample, i) => (wave[i] += sample / buffer.numberOfChannels));
  }
  return { wave, rate: buffer.sampleRate };
}

// The sampling rate that a file's header tells, for a browser decodes to the rate that it is asked for; 48000 where it is
// another kind of file.
function rateOf(view) {
  if (textOf(view, 0, 4) === "fLaC" && view.byteLength > 22) return view.getUint32(18) >>> 12 || 48000;
  if (textOf(view, 0, 4) === "OggS" && textOf(view, 28, 7) === "\x01vorbis") return view.getUint32(40, true) || 48000;
  return mp3Rate(view) || 48000;
}

function mp3Rate(view) {
  let at = 0;
  if (textOf(view, 0, 3) === "ID3" && view.byteLength > 10) {
    at = 10 + [6, 7, 8, 9].reduce((size, byte) => size * 128 + view.getUint8(byte), 0);
  }
  if (at + 4 > view.byteLength || view.getUint16(at) >>> 5 !== 0x7ff) return 0;
  const version = (view.getUint8(at + 1) >> 3) & 3, rate = [44100, 48000, 32000][(view.getUint8(at + 2) >> 2) & 3];
  return rate / ({ 3: 1, 2: 2, 0: 4 }[version] ?? NaN);
}

function textOf(view, at, length) {
  return at + length > view.byteLength ? "" : String.fromCharCode(...new Uint8Array(view.buffer, at, length));
}

// What a microphone gives: hear(samples, rate) until the function that comes back is called.
async function listen(hear) {
  if (!navigator.mediaDevices) {
    throw new Error("this browser gives no microphone to this page; open it as a file, from localhost, or by https");
  }
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain }).catch((error) => {
    throw new Error(`no microphone: ${error.message}; allow it in the browser, or drop a file`);
  });
  const context = new AudioContext();
  const stop = () => {
    for (const track of stream.getTracks()) track.stop();
    if (context.state !== "closed") context.close();
  };
  try {
    const tap = `data:text/javascript,${encodeURIComponent(document.getElementById("tap").textContent)}`;
    await context.audioWorklet.addModule(tap);
    const node = new AudioWorkletNode(context, "tap", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => hear(data, context.sampleRate);
    context.createMediaStreamSource(stream).connect(node);
    await context.resume();
  } catch (error) {
    stop();
    throw error;
  }
  return stop;
}
