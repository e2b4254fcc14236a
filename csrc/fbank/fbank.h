// Log-mel filter bank energies: what every implementation of them takes. Knows nothing of PyTorch.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace cat {

enum class Window { hanning, povey, hamming };

enum class Dtype { float32, float16, bfloat16, int16 };

struct FbankShape {
  int frame_length;  // samples in a frame
  int frame_shift;   // samples from one frame to the next
  int fft_length;    // the next power of two
  int num_mel_bins;
};

// One call. Rows of the waveform lie `row_stride` samples apart; the result (clips, frames, num_mel_bins) is dense.
struct FbankCall {
  const void* waveform;
  Dtype input;
  int64_t clips;
  int64_t samples;
  int64_t row_stride;
  const int64_t* lengths;  // samples of each clip; null: all of them
  void* output;
  Dtype dtype;  // of the result; not int16
  int64_t frames;
  float preemphasis;
  bool remove_dc;
  float scale;     // on every sample, the 2^-15 of int16 included
  float mean;      // the result is (log energy - mean) * factor
  float factor;
};

// Whole frames of a clip of `length` samples: Kaldi's snip-edges.
CAT_HD int64_t frames_of(int64_t length, const FbankShape& shape) {
  return length < shape.frame_length ? 0 : 1 + (length - shape.frame_length) / shape.frame_shift;
}

CAT_HD int64_t clip_frames(const FbankCall& call, const FbankShape& shape, int64_t clip) {
  const bool shorter = call.lengths && call.lengths[clip] < call.samples;
  return frames_of(shorter ? call.lengths[clip] : call.samples, shape);
}

// Of frames that only pad a clip: 0 before the normalisation.
CAT_HD float pad_value(const FbankCall& call) { return (0.0f - call.mean) * call.factor; }

}  // namespace cat
