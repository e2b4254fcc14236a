#include "tables.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cat {
namespace {

constexpr double kPi = 3.14159265358979323846;

double mel(double frequency) { return 1127 * std::log1p(frequency / 700); }

// exp(-2 pi i k / n). The angle is reduced in integers first: cos of a large argument is less exact.
Complex<float> root(long k, long n) {
  const double angle = 2 * kPi * double(k % n) / double(n);
  return {float(std::cos(angle)), float(-std::sin(angle))};
}

double window_at(int i, int length, Window window) {
  const double cosine = std::cos(2 * kPi * i / (length - 1));
  if (window == Window::hamming) return 0.54 - 0.46 * cosine;
  const double hann = 0.5 - 0.5 * cosine;
  return window == Window::povey ? std::pow(hann, 0.85) : hann;
}

void check(const FbankShape& shape) {
  const bool power_of_two = shape.fft_length > 0 && (shape.fft_length & (shape.fft_length - 1)) == 0;
  if (shape.frame_length < 2 || shape.frame_shift < 1 || shape.num_mel_bins < 1 || !power_of_two ||
      shape.fft_length < shape.frame_length) {
    throw std::invalid_argument(
        "fbank: frames of " + std::to_string(shape.frame_length) + " samples every " +
        std::to_string(shape.frame_shift) + ", an FFT of " + std::to_string(shape.fft_length) + " points and " +
        std::to_string(shape.num_mel_bins) +
        " mel bins; expected at least 2 samples, a shift and a bin, and a power of two no shorter than the frame");
  }
}

// Where each table begins, in bytes from the first; all are multiples of 8.
struct Layout {
  explicit Layout(const FbankShape& shape) {
    const size_t n = size_t(shape.fft_length) / 2;
    twiddle = next(0, shape.frame_length * sizeof(float));
    twiddle16 = next(twiddle, n * sizeof(Complex<float>));
    turn = next(twiddle16, n == 256 ? 256 * sizeof(Complex<float>) : 0);
    weight = next(turn, (n / 2 + 1) * sizeof(Complex<float>));
    segment = next(weight, n * sizeof(MelWeight));
    end = next(segment, (shape.num_mel_bins + 2) * sizeof(int));
  }
  static size_t next(size_t begin, size_t bytes) { return begin + (bytes + 7) / 8 * 8; }
  size_t twiddle, twiddle16, turn, weight, segment, end;
};

struct Mel {
  std::vector<MelWeight> weight;
  std::vector<int> segment;
};

Mel mel_weights(const FbankShape& shape, double sample_rate, double low_freq, double high_freq) {
  const int bins = shape.fft_length / 2, edges = shape.num_mel_bins + 2;
  const double low = mel(low_freq), width = (mel(high_freq) - low) / (edges - 1);
  Mel found{std::vector<MelWeight>(bins, MelWeight{0, 0}), std::vector<int>(edges, bins)};
  int next = 0;  // the segment whose first bin is to be found
  for (int k = 0; k < bins; ++k) {
    const double place = (mel(k * sample_rate / shape.fft_length) - low) / width;
    if (place < 0) continue;
    while (next < edges && next <= place) found.segment[next++] = k;
    if (place >= edges - 1) break;
    const double rise = place - std::floor(place);
    found.weight[k] = {float(rise / 4), float((1 - rise) / 4)};
  }
  return found;
}

template <class T>
void copy(FbankTables& tables, size_t begin, const std::vector<T>& from) {
  std::memcpy(tables.memory.data() + begin, from.data(), from.size() * sizeof(T));
}

}  // namespace

FbankView FbankTables::view(const void* copy) const {
  const Layout layout(shape);
  const char* base = static_cast<const char*>(copy);
  return {shape,
          reinterpret_cast<const float*>(base),
          reinterpret_cast<const Complex<float>*>(base + layout.twiddle),
          reinterpret_cast<const Complex<float>*>(base + layout.twiddle16),
          reinterpret_cast<const Complex<float>*>(base + layout.turn),
          reinterpret_cast<const MelWeight*>(base + layout.weight),
          reinterpret_cast<const int*>(base + layout.segment)};
}

FbankTables fbank_tables(const FbankShape& shape, double sample_rate, double low_freq, double high_freq, Window window) {
  check(shape);
  const long n = shape.fft_length / 2;
  std::vector<float> windows;
  std::vector<Complex<float>> twiddle, twiddle16, turn;
  for (int i = 0; i < shape.frame_length; ++i) windows.push_back(float(window_at(i, shape.frame_length, window)));
  for (long k = 0; k < n; ++k) twiddle.push_back(root(k, n));
  for (long j = 0; n == 256 && j < 16; ++j) {
    for (long k = 0; k < 16; ++k) twiddle16.push_back(root(j * k, 256));
  }
  for (long k = 0; k <= n / 2; ++k) turn.push_back(root(k, 2 * n));
  const Mel mels = mel_weights(shape, sample_rate, low_freq, high_freq);

  const Layout layout(shape);
  FbankTables tables{shape, std::vector<unsigned char>(layout.end)};
  copy(tables, 0, windows);
  copy(tables, layout.twiddle, twiddle);
  copy(tables, layout.twiddle16, twiddle16);
  copy(tables, layout.turn, turn);
  copy(tables, layout.weight, mels.weight);
  copy(tables, layout.segment, mels.segment);
  return tables;
}

}  // namespace cat
