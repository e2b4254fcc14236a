// In the browser's audio thread: the mean of the channels, in pieces of 2048 samples.
"use strict";

registerProcessor("tap", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(2048);
    this.filled = 0;
  }

  process([channels]) {
    for (let i = 0; channels.length && i < channels[0].length; i++) {
      this.piece[this.filled++] = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
});
