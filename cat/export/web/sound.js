// A file's samples: the browser decodes them at the file's own rate, so that the resampling is the same in all browsers.
"use strict";

// {wave: the mean of the channels, rate}
async function decoded(file) {
  const bytes = await file.arrayBuffer();
  if (bytes.byteLength === 0) throw new Error(`${file.name} is empty: 0 bytes`);
  let context;
  try {
    context = new OfflineAudioContext(1, 1, rateOf(new DataView(bytes)));
  } catch {
    context = new OfflineAudioContext(1, 1, 48000); // a rate that this browser has not
  }
  let buffer;
  try {
    buffer = await context.decodeAudioData(bytes);
  } catch {
    throw new Error(`${file.name}: this browser cannot decode it; expected a sound file, as WAV, FLAC, MP3 or Ogg`);
  }
  const wave = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    buffer.getChannelData(channel).forEach((sample, i) => (wave[i] += sample));
  }
  wave.forEach((sample, i) => (wave[i] = sample / buffer.numberOfChannels));
  if (!wave.every(Number.isFinite)) throw new Error(`${file.name}: some of its samples are NaN or infinite`);
  return { wave, rate: buffer.sampleRate };
}

// The sampling rate that a file's header tells; 48000 where it is another kind of file.
function rateOf(view) {
  const text = (at, length) =>
    at + length > view.byteLength ? "" : String.fromCharCode(...new Uint8Array(view.buffer, at, length));
  const long = (at) => (at + 4 <= view.byteLength ? view.getUint32(at, true) : 0);
  if (text(0, 4) === "RIFF" && text(8, 4) === "WAVE") {
    for (let at = 12; at + 16 <= view.byteLength; at += 8 + long(at + 4) + (long(at + 4) % 2)) {
      if (text(at, 4) === "fmt ") return long(at + 12) || 48000;
    }
  }
  if (text(0, 4) === "fLaC" && view.byteLength > 22) return (view.getUint32(18) >>> 12) || 48000;
  if (text(0, 4) === "OggS" && text(28, 7) === "\x01vorbis") return long(40) || 48000;
  return mp3Rate(view, text) || 48000;
}

function mp3Rate(view, text) {
  let at = 0;
  if (text(0, 3) === "ID3" && view.byteLength > 10) {
    at = 10 + [6, 7, 8, 9].reduce((size, byte) => size * 128 + view.getUint8(byte), 0);
  }
  if (at + 4 > view.byteLength || view.getUint16(at) >>> 5 !== 0x7ff) return 0;
  const version = (view.getUint8(at + 1) >> 3) & 3, rate = [44100, 48000, 32000][(view.getUint8(at + 2) >> 2) & 3];
  return rate / ({ 3: 1, 2: 2, 0: 4 }[version] ?? NaN);
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
