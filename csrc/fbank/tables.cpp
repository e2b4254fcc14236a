#include "tables.h"

#include <algorithm>
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

// Where each table begins, in bytes from the first; all are multiples of 16.
struct Layout {
  Layout(const FbankShape& shape, int quads) {
    const size_t n = size_t(shape.fft_length) / 2;
    twiddle = next(0, shape.frame_length * sizeof(float));
    twiddle16 = next(twiddle, n * sizeof(Complex<float>));
    turn = next(twiddle16, n == 256 ? 256 * sizeof(Complex<float>) : 0);
    weight = next(turn, (n / 2 + 1) * sizeof(Complex<float>));
    segment = next(weight, n * sizeof(MelWeight));
    span = next(segment, (shape.num_mel_bins + 2) * sizeof(int));
    span_weight = next(span, n == 256 ? (shape.num_mel_bins + 15) / 16 * 16 * sizeof(MelSpan) : 0);
    end = next(span_weight, size_t(quads) * 64 * sizeof(float));
  }
  static size_t next(size_t begin, size_t bytes) { return begin + (bytes + 15) / 16 * 16; }
  size_t twiddle, twiddle16, turn, weight, segment, span, span_weight, end;
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

struct Spans {
  std::vector<MelSpan> span;
  std::vector<float> weight;
};

Spans mel_spans(const Mel& mel, int filters) {
  const int bins = int(mel.weight.size());
  Spans found;
  for (int group = 0; group < filters; group += 16) {
    const int lanes = std::min(16, filters - group);
    int quads = 1;
    for (int f = group; f < group + lanes; ++f) {
      quads = std::max(quads, (mel.segment[f + 2] + 3) / 4 - mel.segment[f] / 4);
    }
    const size_t begin = found.weight.size();
    found.weight.resize(begin + size_t(quads) * 64);
    for (int lane = 0; lane < 16; ++lane) {
      const int f = std::min(group + lane, filters - 1);
      const int first = std::min(mel.segment[f] / 4 * 4, bins - 4 * quads);
      found.span.push_back({uint16_t(first), uint16_t(quads)});
      for (int k = mel.segment[f]; k < mel.segment[f + 2]; ++k) {
        const int i = k - first;
        found.weight[begin + size_t(i / 4 * 64 + lane * 4 + i % 4)] =
            k < mel.segment[f + 1] ? mel.weight[k].rise : mel.weight[k].fall;
      }
    }
  }
  return found;
}

template <class T>
void copy(FbankTables& tables, size_t begin, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(tables.memory.data() + begin, from.data(), from.size() * sizeof(T));
}

}  // namespace

FbankView FbankTables::view(const void* copy) const {
  const Layout layout(shape, quads);
  const char* base = static_cast<const char*>(copy);
  return {shape,
          reinterpret_cast<const float*>(base),
          reinterpret_cast<const Complex<float>*>(base + layout.twiddle),
          reinterpret_cast<const Complex<float>*>(base + layout.twiddle16),
          reinterpret_cast<const Complex<float>*>(base + layout.turn),
          reinterpret_cast<const MelWeight*>(base + layout.weight),
          reinterpret_cast<const int*>(base + layout.segment),
          reinterpret_cast<const MelSpan*>(base + layout.span),
          reinterpret_cast<const float*>(base + layout.span_weight),
          quads};
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

  const Spans spans = n == 256 ? mel_spans(mels, shape.num_mel_bins) : Spans{};
  const int quads = int(spans.weight.size() / 64);

  const Layout layout(shape, quads);
  FbankTables tables{shape, quads, std::vector<unsigned char>(layout.end)};
  copy(tables, 0, windows);
  copy(tables, layout.twiddle, twiddle);
  copy(tables, layout.twiddle16, twiddle16);
  copy(tables, layout.turn, turn);
  copy(tables, layout.weight, mels.weight);
  copy(tables, layout.segment, mels.segment);
  copy(tables, layout.span, spans.span);
  copy(tables, layout.span_weight, spans.weight);
  return tables;
}

}  // namespace cat
