// Windows, twiddle factors and mel weights against their formulas, and settings that there are not.

#include <stdexcept>

#include "reference.h"

namespace {

using cat::Window;
using reference::Settings;

double distance(cat::Complex<float> found, double angle) {
  return std::abs(std::complex<double>(double(found.re), double(found.im)) - std::polar(1.0, -angle));
}

void check_tables(const Settings& s, const std::string& name) {
  const cat::FbankTables tables = s.tables();
  const cat::FbankView view = tables.view();
  const int length = s.shape.frame_length, n = s.shape.fft_length / 2, bins = s.shape.num_mel_bins;
  CHECK(reinterpret_cast<const unsigned char*>(view.segment + bins + 2) <= tables.memory.data() + tables.memory.size())
      << name << ": the tables are longer than their memory";
  for (int i = 0; i < length; ++i) {
    const double expected = reference::window_at(i, length, s.window);
    CHECK(std::fabs(view.window[i] - expected) <= 1e-7) << name << ": window " << i;
  }
  for (int k = 0; k < n; ++k) CHECK(distance(view.twiddle[k], 2 * reference::kPi * k / n) < 1e-7) << name << ": twiddle " << k;
  for (int k = 0; k <= n / 2; ++k) CHECK(distance(view.turn[k], reference::kPi * k / n) < 1e-7) << name << ": turn " << k;
  for (int j = 0; n == 256 && j < 16; ++j) {
    for (int k = 0; k < 16; ++k) {
      CHECK(distance(view.twiddle16[16 * j + k], 2 * reference::kPi * j * k / 256) < 1e-7) << name << ": " << j << "," << k;
    }
  }
  // Every bin belongs to one segment, in order, and only there has weights.
  CHECK(view.segment[0] >= 0 && view.segment[bins + 1] <= n) << name << ": segments outside the spectrum";
  std::vector<int> segment_of(size_t(n), -1);
  for (int f = 0; f <= bins; ++f) {
    CHECK(view.segment[f] <= view.segment[f + 1]) << name << ": segment " << f << " ends before it begins";
    for (int k = view.segment[f]; k < view.segment[f + 1]; ++k) segment_of[size_t(k)] = f;
  }
  for (int k = 0; k < n; ++k) {
    const cat::MelWeight weight = view.weight[k];
    const int segment = segment_of[size_t(k)];
    if (segment < 0) continue;
    CHECK(std::fabs(weight.rise + weight.fall - 0.25) < 1e-7) << name << ": the weights of bin " << k;
    for (int f = 0; f < bins; ++f) {
      const double found = 4.0 * double(f == segment ? weight.rise : f == segment - 1 ? weight.fall : 0.0f);
      CHECK(std::fabs(found - reference::mel_weight(s, k, f)) < 1e-6) << name << ": bin " << k << " in triangle " << f;
    }
  }
}

template <class Function>
void check_throws(Function function, const std::string& word) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find(word) != std::string::npos) << error.what();
    return;
  }
  CHECK(false) << "no error with " << word;
}

}  // namespace

int main() {
  Settings s;
  check_tables(s, "standard");
  // Of 128 bins from 20 Hz, row 3 covers no FFT bin.
  const cat::FbankTables standard = s.tables();
  for (int f = 0; f < 128; ++f) {
    const bool empty = standard.view().segment[f] == standard.view().segment[f + 2];
    CHECK(empty == (f == 3)) << "row " << f;
  }
  for (Window window : {Window::hanning, Window::povey, Window::hamming}) {
    s.window = window;
    check_tables(s, "window");
  }
  s = {{200, 80, 256, 40}, 8000, 0, 4000, Window::hanning};
  check_tables(s, "8 kHz");
  s = {{1200, 480, 2048, 80}, 48000, 100, 12000, Window::hanning};
  check_tables(s, "48 kHz, a narrow band");
  s = {{2, 1, 2, 1}, 100, 0, 50, Window::hanning};
  check_tables(s, "2 samples");
  s = {{400, 160, 512, 500}, 16000, 20, 8000, Window::hanning};
  check_tables(s, "500 bins");
  for (cat::FbankShape shape : {cat::FbankShape{1, 160, 2, 128}, {400, 0, 512, 128}, {400, 160, 500, 128},
                                {400, 160, 256, 128}, {400, 160, 0, 128}, {400, 160, 512, 0}, {-1, -1, -4, -1}}) {
    check_throws([&] { cat::fbank_tables(shape, 16000, 20, 8000, Window::hanning); }, "expected");
  }
  return check::result("test_tables");
}
