// A vector of frames from samples to log-mel values. Compiled once for each instruction set, as CAT_ISA.
//
// No function of the standard library is used: the linker could take the copy compiled for another processor.

#include "cpu.h"
#include "simd.h"

#define CAT_JOIN(a, b) a##b
#define CAT_NAME(prefix, isa) CAT_JOIN(prefix, isa)
#define CAT_STRING(isa) CAT_QUOTE(isa)
#define CAT_QUOTE(isa) #isa

namespace cat {
namespace {

constexpr int W = kWidth;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Samples in a row of the converted copy of the frames.
int padded(const FbankShape& shape) { return round_up(shape.frame_length, W); }

int vectors(const FbankShape& shape) {
  // Samples, read in blocks of W, then spectra.
  return shape.fft_length > padded(shape) ? shape.fft_length : padded(shape);
}

int64_t scratch(const FbankShape& shape) {
  const int64_t buffers = 2 * int64_t(vectors(shape)) * W, converted = int64_t(W) * padded(shape);
  return buffers + converted + int64_t(W) * round_up(shape.num_mel_bins, W);
}

template <class T>
void convert(const CpuFrame* frames, int length, int stride, float scale, float* out) {
  for (int lane = 0; lane < W; ++lane) {
    const T* from = static_cast<const T*>(frames[lane].samples);
    for (int i = 0; i < length; ++i) out[lane * stride + i] = to_float(from[i]) * scale;
  }
}

// Every frame's samples to vectors.
void gather(const float* const (&lane)[W], int length, Vector* x) {
  int i = 0;
  for (; i + W <= length; i += W) {
    Vector block[W];
    for (int r = 0; r < W; ++r) block[r] = load(lane[r] + i);
    transpose(block);
    for (int r = 0; r < W; ++r) x[i + r] = block[r];
  }
  for (; i < length; ++i) {
    for (int r = 0; r < W; ++r) x[i][r] = lane[r][i];
  }
}

// The sum, by sixteens of sixteens: rounding grows with the longest chain of additions.
Vector sum_of(const Vector* x, int length) {
  Vector sum{};
  for (int i = 0; i < length; i += 256) {
    Vector part{};
    for (int j = i; j < i + 256 && j < length; j += 16) {
      Vector few{};
      for (int k = j; k < j + 16 && k < length; ++k) few += x[k];
      part += few;
    }
    sum += part;
  }
  return sum;
}

// Removes the mean, emphasises and applies the window, in place.
void prepare(const FbankView& tables, const FbankCall& call, Vector* x) {
  const int length = tables.shape.frame_length;
  Vector mean{};
  if (call.remove_dc) {
    // Twice: the first mean is rounded at the size of the offset, what it leaves is rounded at the size of the rest.
    const Vector offset = sum_of(x, length) * (1.0f / length);
    for (int i = 0; i < length; ++i) x[i] -= offset;
    mean = sum_of(x, length) * (1.0f / length);
  }
  const float kept = 1 - call.preemphasis;
  Vector before = x[0] - mean;
  for (int i = 0; i < length; ++i) {
    const Vector centred = x[i] - mean;
    x[i] = emphasise(centred, before, kept) * tables.window[i];
    before = centred;
  }
}

// 256 points as 16 x 16. Only the first 16 kFilled inputs are read.
template <int kFilled>
void dft256(Complex<Vector>* z, Complex<Vector>* other, const Complex<float>* twiddle16) {
  for (int j = 0; j < 16; ++j) {
    Complex<Vector> column[16] = {};
    for (int i = 0; i < kFilled; ++i) column[i] = z[16 * i + j];
    dft16<kFilled>(column);
    other[j] = column[0];
    for (int k = 1; k < 16; ++k) other[16 * k + j] = column[place16(k)] * twiddle16[16 * j + k];
  }
  for (int k = 0; k < 16; ++k) {
    Complex<Vector> row[16];
    for (int j = 0; j < 16; ++j) row[j] = other[16 * k + j];
    dft16(row);
    for (int j = 0; j < 16; ++j) z[16 * j + k] = row[place16(j)];
  }
}

// Any power of two; the result is in z or in other.
Complex<Vector>* dft(Complex<Vector>* z, Complex<Vector>* other, const Complex<float>* twiddle, int points) {
  int stride = 1;
  for (; 4 * stride <= points; stride *= 4) {
    for (int j = 0; j < points / 4; ++j) stockham4(z, other, twiddle, points, stride, j);
    Complex<Vector>* const result = other;
    other = z, z = result;
  }
  if (stride == points) return z;
  for (int j = 0; j < points / 2; ++j) stockham2(z, other, points, j);
  return other;
}

void split_all(const Complex<Vector>* z, const Complex<float>* turn, int n, Vector* power) {
  Vector nyquist;
  split(z[0], z[0], turn[0], power[0], nyquist);
  for (int k = 1; k <= n / 2; ++k) {
    // Of the two that are the same at n / 2, both are right.
    split(z[k], z[n - k], turn[k], power[k], power[n - k]);
  }
}

// Log-mel values in place of `rows`: W rows of num_mel_bins (rounded up) floats.
void mel(const FbankView& tables, const FbankCall& call, const Vector* power, float* rows, int row_stride) {
  const int bins = tables.shape.num_mel_bins;
  const int* segment = tables.segment;
  const MelWeight* weight = tables.weight;
  // Not a number where the frame is none: triangles without a bin must show that too.
  const Vector zero = power[0] * 0.0f;
  Vector rising = zero;
  for (int k = segment[0]; k < segment[1]; ++k) rising += power[k] * weight[k].rise;
  for (int first = 0; first < bins; first += W) {
    Vector block[W];
    for (int f = 0; f < W; ++f) {
      if (first + f >= bins) {
        block[f] = Vector{};
        continue;
      }
      Vector up = zero, down{};
      for (int k = segment[first + f + 1]; k < segment[first + f + 2]; ++k) {
        up += power[k] * weight[k].rise;
        down += power[k] * weight[k].fall;
      }
      block[f] = (log_energy(rising + down) - call.mean) * call.factor;
      rising = up;
    }
    transpose(block);
    for (int r = 0; r < W; ++r) store(rows + r * row_stride + first, block[r]);
  }
}

template <class T>
void write(const CpuFrame* frames, int count, const float* rows, int row_stride, int bins) {
  for (int r = 0; r < count; ++r) {
    T* to = static_cast<T*>(frames[r].row);
    for (int f = 0; f < bins; ++f) assign(to[f], rows[r * row_stride + f]);
  }
}

void compute(const FbankView& tables, const FbankCall& call, const CpuFrame* frames, int count, float* scratch) {
  const FbankShape& shape = tables.shape;
  const int length = shape.frame_length, n = shape.fft_length / 2, stride = padded(shape);
  Vector* const x = reinterpret_cast<Vector*>(scratch);
  Vector* const other = x + vectors(shape);
  float* const converted = reinterpret_cast<float*>(other + vectors(shape));
  float* const rows = converted + W * stride;

  CpuFrame all[W];  // the last frame stands in for those that there are not
  for (int r = 0; r < W; ++r) all[r] = frames[r < count ? r : count - 1];
  const float* lane[W];
  for (int r = 0; r < W; ++r) lane[r] = converted + r * stride;
  switch (call.input) {
    case Dtype::float16: convert<Half>(all, length, stride, call.scale, converted); break;
    case Dtype::bfloat16: convert<BFloat16>(all, length, stride, call.scale, converted); break;
    case Dtype::int16: convert<int16_t>(all, length, stride, call.scale, converted); break;
    case Dtype::float32:
      if (call.scale != 1.0f) {
        convert<float>(all, length, stride, call.scale, converted);
      } else {
        for (int r = 0; r < W; ++r) lane[r] = static_cast<const float*>(all[r].samples);
      }
  }

  gather(lane, length, x);
  prepare(tables, call, x);
  for (int i = length; i < shape.fft_length; ++i) x[i] = Vector{};
  Complex<Vector>* z = reinterpret_cast<Complex<Vector>*>(x);
  Complex<Vector>* power = reinterpret_cast<Complex<Vector>*>(other);
  if (n == 256) {
    if (length <= 2 * 16 * 13) {
      dft256<13>(z, power, tables.twiddle16);
    } else {
      dft256<16>(z, power, tables.twiddle16);
    }
  } else if (dft(z, power, tables.twiddle, n) != z) {
    Complex<Vector>* const result = power;
    power = z, z = result;
  }
  split_all(z, tables.turn, n, reinterpret_cast<Vector*>(power));
  const int row_stride = round_up(shape.num_mel_bins, W);
  mel(tables, call, reinterpret_cast<const Vector*>(power), rows, row_stride);
  switch (call.dtype) {
    case Dtype::float16: write<Half>(frames, count, rows, row_stride, shape.num_mel_bins); break;
    case Dtype::bfloat16: write<BFloat16>(frames, count, rows, row_stride, shape.num_mel_bins); break;
    default: write<float>(frames, count, rows, row_stride, shape.num_mel_bins);
  }
}

}  // namespace

extern const CpuFrames CAT_NAME(cpu_frames_, CAT_ISA);
const CpuFrames CAT_NAME(cpu_frames_, CAT_ISA) = {CAT_STRING(CAT_ISA), W, scratch, compute};

}  // namespace cat
