// What a frame is multiplied with: window, twiddle factors and mel weights, computed in double precision.
#pragma once

#include <cstddef>
#include <vector>

#include "arithmetic.h"
#include "fbank.h"

namespace cat {

// Weights of a bin for `split`'s fourfold power: `rise` of the triangle that rises there, `fall` of the one before,
// which falls. They sum to 1/4 within the band and are 0 outside.
struct MelWeight {
  float rise, fall;
};

// The bins of a triangle, for 16 lanes with a triangle each: `quads` times 4 of them from `first` on, a multiple of 4. All
// 16 have the same number of bins; those that are not their triangle's have no weight.
struct MelSpan {
  uint16_t first, quads;
};

// The tables as a frame's code reads them, in this process's memory or a GPU's. n = fft_length / 2.
struct FbankView {
  FbankShape shape;
  const float* window;              // (frame_length)
  const Complex<float>* twiddle;    // (n) exp(-2 pi i k / n)
  const Complex<float>* twiddle16;  // (16, 16) exp(-2 pi i j k / 256), only where n = 256 = 16 x 16
  const Complex<float>* turn;       // (n / 2 + 1) exp(-2 pi i k / fft_length)
  const MelWeight* weight;          // (n)
  // Segment s holds the bins between mel edges s and s + 1: segment[s] up to segment[s + 1]. Triangle s rises there.
  const int* segment;  // (num_mel_bins + 2)
  // The same weights, triangle by triangle, 16 triangles at a time. Only where n = 256.
  const MelSpan* span;       // (num_mel_bins, rounded up to 16)
  const float* span_weight;  // (quads, 16, 4)
  int quads;                 // of all groups of 16
};

// The tables in one block of memory, which may be copied to a GPU as it is.
struct FbankTables {
  FbankShape shape;
  int quads;
  std::vector<unsigned char> memory;

  FbankView view() const { return view(memory.data()); }
  FbankView view(const void* copy) const;
};

// Throws std::invalid_argument for a shape that no frame has.
FbankTables fbank_tables(const FbankShape& shape, double sample_rate, double low_freq, double high_freq, Window window);

}  // namespace cat
