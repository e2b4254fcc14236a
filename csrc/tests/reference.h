// The definition of a log-mel frame in double precision, written down step by step and not for speed, and random calls
// to compare implementations on.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../fbank/tables.h"
#include "check.h"

namespace reference {

constexpr double kPi = 3.14159265358979323846;
constexpr double kEps = 1.1920928955078125e-07;

using Spectrum = std::vector<std::complex<double>>;

// The sum that a discrete Fourier transform is.
inline Spectrum dft(const Spectrum& x) {
  const size_t n = x.size();
  Spectrum root(n), X(n);
  for (size_t k = 0; k < n; ++k) root[k] = std::polar(1.0, -2 * kPi * double(k) / double(n));
  for (size_t k = 0; k < n; ++k) {
    for (size_t j = 0; j < n; ++j) X[k] += x[j] * root[j * k % n];
  }
  return X;
}

// The same by halves, for powers of two.
inline Spectrum fft(const Spectrum& x) {
  const size_t n = x.size();
  if (n == 1) return x;
  Spectrum even(n / 2), odd(n / 2), X(n);
  for (size_t j = 0; j < n / 2; ++j) even[j] = x[2 * j], odd[j] = x[2 * j + 1];
  even = fft(even), odd = fft(odd);
  for (size_t k = 0; k < n / 2; ++k) {
    const std::complex<double> turned = std::polar(1.0, -2 * kPi * double(k) / double(n)) * odd[k];
    X[k] = even[k] + turned, X[k + n / 2] = even[k] - turned;
  }
  return X;
}

struct Settings {
  cat::FbankShape shape{400, 160, 512, 128};
  double sample_rate = 16000, low_freq = 20, high_freq = 8000;
  cat::Window window = cat::Window::hanning;

  cat::FbankTables tables() const { return cat::fbank_tables(shape, sample_rate, low_freq, high_freq, window); }
};

inline double window_at(int i, int length, cat::Window window) {
  const double phase = 2 * kPi * i / (length - 1);
  if (window == cat::Window::hamming) return 0.54 - 0.46 * std::cos(phase);
  const double hann = 0.5 - 0.5 * std::cos(phase);
  return window == cat::Window::povey ? std::pow(hann, 0.85) : hann;
}

inline double mel(double frequency) { return 1127 * std::log(1 + frequency / 700); }

// Weight of FFT bin k in triangle f.
inline double mel_weight(const Settings& s, int k, int f) {
  const double low = mel(s.low_freq), width = (mel(s.high_freq) - low) / (s.shape.num_mel_bins + 1);
  const double place = (mel(k * s.sample_rate / s.shape.fft_length) - low) / width - f;
  return std::max(0.0, std::min(place, 2 - place));
}

// Mel energies of a frame, and the rounding error that a float implementation of each is allowed: its square root may
// be off by 16 eps of the windowed frame's norm, times the root of the triangle's sum, and by 4 eps of itself; also by
// 1 eps of what the frame's norm is before emphasis takes the low frequencies away, for that is how exact the samples are.
// With `offset_counts`, the mean that is removed after the emphasis counts towards the norm.
struct Energies {
  std::vector<double> energy, bound;
};

inline Energies energies(const Settings& s, const std::vector<double>& samples, double preemphasis, bool remove_dc,
                         bool offset_counts) {
  const int length = s.shape.frame_length, bins = s.shape.fft_length / 2;
  double mean = 0;
  for (double x : samples) mean += x / length;
  Spectrum y(size_t(s.shape.fft_length));
  double norm = 0, norm_before = 0;
  for (int i = 0; i < length; ++i) {
    const double offset = remove_dc ? mean : 0, before = samples[size_t(i ? i - 1 : 0)] - offset;
    y[size_t(i)] = (samples[size_t(i)] - offset - preemphasis * before) * window_at(i, length, s.window);
    norm += std::norm(y[size_t(i)]);
    norm_before += std::pow((samples[size_t(i)] - offset) * window_at(i, length, s.window), 2);
    if (offset_counts) norm += std::pow((1 - preemphasis) * mean * window_at(i, length, s.window), 2);
  }
  const Spectrum X = fft(y);
  Energies found;
  for (int f = 0; f < s.shape.num_mel_bins; ++f) {
    double energy = 0, row = 0;
    for (int k = 0; k < bins; ++k) {
      const double weight = mel_weight(s, k, f);
      energy += weight * std::norm(X[size_t(k)]);
      row += weight;
    }
    found.energy.push_back(energy);
    const double bound = 16 * std::sqrt(norm * row) + std::sqrt(norm_before * row) + 4 * std::sqrt(energy);
    found.bound.push_back(kEps * bound);
  }
  return found;
}

// A call together with the memory it works on. Behind and before the result lie guards that must stay as they are.
struct Case {
  Settings settings;
  cat::FbankCall call{};
  std::vector<unsigned char> waveform, output;
  std::vector<int64_t> lengths;
  std::string name;

  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xa5;

  static size_t size_of(cat::Dtype dtype) { return dtype == cat::Dtype::float32 ? 4 : 2; }

  // Points the call to the memory; to be called last.
  void finish() {
    const size_t bytes = size_t(call.clips * call.frames * settings.shape.num_mel_bins) * size_of(call.dtype);
    output.assign(bytes + 2 * kGuard, kGuardByte);
    call.output = output.data() + kGuard;
    call.waveform = waveform.data();
    call.lengths = lengths.empty() ? nullptr : lengths.data();
  }

  double sample(int64_t clip, int64_t i) const {
    const int64_t at = clip * call.row_stride + i;
    const unsigned char* from = waveform.data() + size_t(at) * size_of(call.input);
    if (call.input == cat::Dtype::float32) return read<float>(from);
    if (call.input == cat::Dtype::int16) return double(read<int16_t>(from));
    return call.input == cat::Dtype::float16 ? cat::to_float(read<cat::Half>(from))
                                             : cat::to_float(read<cat::BFloat16>(from));
  }

  double result(int64_t clip, int64_t t, int f) const {
    const int64_t at = (clip * call.frames + t) * settings.shape.num_mel_bins + f;
    const unsigned char* from = output.data() + kGuard + size_t(at) * size_of(call.dtype);
    if (call.dtype == cat::Dtype::float32) return read<float>(from);
    return call.dtype == cat::Dtype::float16 ? cat::to_float(read<cat::Half>(from))
                                             : cat::to_float(read<cat::BFloat16>(from));
  }

  template <class T>
  static T read(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
};

// The relative rounding of a result of this type, half a unit in its last place.
inline double rounding(cat::Dtype dtype) {
  return dtype == cat::Dtype::float32 ? 0x1p-24 : dtype == cat::Dtype::float16 ? 0x1p-11 : 0x1p-8;
}

// Every value of the result, pad rows included, and the guards.
inline void check_result(const Case& c, bool offset_counts = false) {
  const cat::FbankCall& call = c.call;
  for (size_t i = 0; i < Case::kGuard; ++i) {
    CHECK(c.output[i] == Case::kGuardByte) << c.name << ": written before the result";
    CHECK(c.output[c.output.size() - 1 - i] == Case::kGuardByte) << c.name << ": written behind the result";
  }
  std::vector<double> samples(size_t(c.settings.shape.frame_length));
  for (int64_t clip = 0; clip < call.clips; ++clip) {
    const int64_t length = call.lengths ? std::min(call.lengths[clip], call.samples) : call.samples;
    const int64_t frames = cat::frames_of(length, c.settings.shape);
    for (int64_t t = 0; t < call.frames; ++t) {
      Energies expected;
      if (t < frames) {
        for (size_t i = 0; i < samples.size(); ++i) {
          samples[i] = c.sample(clip, t * c.settings.shape.frame_shift + int64_t(i)) * double(call.scale);
        }
        expected = energies(c.settings, samples, double(call.preemphasis), call.remove_dc, offset_counts);
      }
      for (int f = 0; f < c.settings.shape.num_mel_bins; ++f) {
        double low = 0, high = 0;
        if (t < frames) {
          const double root = std::sqrt(expected.energy[size_t(f)]), bound = expected.bound[size_t(f)];
          const double floor = double(cat::kEnergyFloor);
          low = std::log(std::max(floor, std::pow(std::max(0.0, root - bound), 2)));
          high = std::log(std::max(floor, std::pow(root + bound, 2)));
        }
        // The logarithm and the normalisation round as well.
        const double slack = 4 * kEps * (std::fabs(low) + std::fabs(double(call.mean)) + 1e-30);
        low = (low - slack - double(call.mean)) * double(call.factor);
        high = (high + slack - double(call.mean)) * double(call.factor);
        const double last = rounding(call.dtype) * std::max(std::fabs(low), std::fabs(high)) * 1.01;
        const double found = c.result(clip, t, f);
        CHECK(found >= low - last && found <= high + last)
            << c.name << ": clip " << clip << " frame " << t << " bin " << f << ": " << found << " is not in [" << low
            << ", " << high << "]";
      }
    }
  }
}

// A waveform of one of several kinds, in the call's dtype. Behind a clip's length lies NaN (or the largest integer).
inline void fill(Case& c, std::mt19937& random) {
  const cat::FbankCall& call = c.call;
  const size_t row = size_t(call.row_stride), total = size_t(call.clips) * row + size_t(call.samples);
  c.waveform.assign(total * Case::size_of(call.input), 0xff);  // NaN; -1 as an integer
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  for (int64_t clip = 0; clip < call.clips; ++clip) {
    const int64_t length = c.lengths.empty() ? call.samples : std::min(c.lengths[size_t(clip)], call.samples);
    const int kind = int(random() % 5);
    const double pitch = uniform(random) * kPi, offset = normal(random) * 0.3;
    for (int64_t i = 0; i < length; ++i) {
      double x = 0.2 * normal(random);
      if (kind == 1) x = 0.5 * std::sin(pitch * double(i)) + 1e-4 * normal(random);
      if (kind == 2) x = 1e-3 * x + offset;
      if (kind == 3) x = i % 97 ? 0 : x;
      if (kind == 4) x = 0;
      unsigned char* to = c.waveform.data() + (size_t(clip) * row + size_t(i)) * Case::size_of(call.input);
      const float value = float(x);
      if (call.input == cat::Dtype::float32) {
        std::memcpy(to, &value, 4);
      } else if (call.input == cat::Dtype::int16) {
        const int16_t integer = int16_t(std::lrint(std::max(-1.0, std::min(1.0, x)) * 32767));
        std::memcpy(to, &integer, 2);
      } else if (call.input == cat::Dtype::float16) {
        cat::Half half;
        cat::assign(half, value);
        std::memcpy(to, &half, 2);
      } else {
        cat::BFloat16 half;
        cat::assign(half, value);
        std::memcpy(to, &half, 2);
      }
    }
  }
}

inline const char* name_of(cat::Dtype dtype) {
  const char* const names[] = {"float32", "float16", "bfloat16", "int16"};
  return names[int(dtype)];
}

struct CaseOptions {
  int64_t clips = 2, samples = 2000, extra_stride = 0, frames = 0;  // 0: all there are
  std::vector<int64_t> lengths;
  cat::Dtype input = cat::Dtype::float32, dtype = cat::Dtype::float32;
  double preemphasis = 0.97, scale = 1, mean = 0, factor = 1;
  bool remove_dc = true;
  unsigned seed = 0;
};

inline Case make_case(const std::string& name, const Settings& settings, const CaseOptions& o) {
  Case c;
  c.name = name;
  c.settings = settings;
  c.lengths = o.lengths;
  c.call.input = o.input;
  c.call.dtype = o.dtype;
  c.call.clips = o.clips;
  c.call.samples = o.samples;
  c.call.row_stride = o.samples + o.extra_stride;
  c.call.frames = o.frames ? o.frames : cat::frames_of(o.samples, settings.shape);
  c.call.preemphasis = float(o.preemphasis);
  c.call.remove_dc = o.remove_dc;
  c.call.scale = float(o.input == cat::Dtype::int16 ? o.scale * 0x1p-15 : o.scale);
  c.call.mean = float(o.mean);
  c.call.factor = float(o.factor);
  std::mt19937 random(o.seed);
  fill(c, random);
  c.finish();
  return c;
}

// Settings and calls that between them use every branch; `largest_fft` leaves longer ones out.
inline std::vector<Case> cases(int largest_fft) {
  using cat::Dtype;
  using cat::Window;
  std::vector<Case> all;
  const Settings standard;
  const auto add = [&](const std::string& name, const Settings& s, const CaseOptions& o) {
    if (s.shape.fft_length <= largest_fft) all.push_back(make_case(name, s, o));
  };
  CaseOptions o;
  add("standard", standard, o);
  o.samples = 400, o.clips = 1;
  add("one frame", standard, o);
  o = {};
  o.clips = 3, o.samples = 6003, o.extra_stride = 1, o.lengths = {6003, 400, 3111}, o.frames = 40;
  o.mean = -4.268, o.factor = 1 / (2 * 4.569);
  add("ragged, odd rows, padded, normalised", standard, o);
  o.lengths = {399, 9999, 0}, o.frames = 7;
  add("too short, too long, cut", standard, o);
  o = {};
  o.samples = 6100;
  for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::int16}) {
    o.input = dtype;
    add(std::string("from ") + name_of(dtype), standard, o);
  }
  o.input = Dtype::int16;
  o.extra_stride = 1;
  for (Dtype dtype : {Dtype::float16, Dtype::bfloat16}) {
    o.dtype = dtype, o.mean = -4, o.factor = 0.11;
    add(std::string("to ") + name_of(dtype), standard, o);
  }
  o = {};
  o.scale = 32768, o.preemphasis = 0.9;
  add("scaled", standard, o);
  o = {};
  o.remove_dc = false;
  add("with the mean", standard, o);
  o.preemphasis = 0;
  add("neither", standard, o);
  o = {};
  Settings s;
  s.window = Window::povey, s.shape.num_mel_bins = 80, s.low_freq = 50, s.high_freq = 7000;
  add("povey, 80 bins", s, o);
  s.window = Window::hamming, s.shape.num_mel_bins = 23;
  add("hamming, 23 bins", s, o);
  s.shape.num_mel_bins = 1;
  add("1 bin", s, o);
  s.shape.num_mel_bins = 15;
  add("15 bins", s, o);
  s.shape.num_mel_bins = 257;
  add("257 bins", s, o);
  s = {};
  s.shape.frame_shift = 161;
  add("odd shift", s, o);
  s.shape.frame_shift = 400;
  add("frames side by side", s, o);
  s.shape.frame_shift = 2;
  o.samples = 500;
  add("shift of 2", s, o);
  s.shape.frame_shift = 1000, o.samples = 5000;
  add("frames apart", s, o);
  for (int length : {2, 3, 5, 10, 31, 64, 100, 200, 411, 416, 417, 431, 433, 512, 551, 800, 1102, 1200, 4000}) {
    s = {};
    s.shape.frame_length = length;
    s.shape.frame_shift = length * 2 / 5 + 1;
    for (s.shape.fft_length = 1; s.shape.fft_length < length; s.shape.fft_length *= 2) {
    }
    s.shape.num_mel_bins = length < 64 ? 3 : 40;
    o = {};
    o.clips = 1, o.samples = length * 3 + 1;
    add("frames of " + std::to_string(length), s, o);
  }
  return all;
}

}  // namespace reference
