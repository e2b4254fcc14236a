// The arithmetic of a log-mel frame, written once for a value type V: a float on the GPU, a vector of frames on the CPU.
//
// A frame of N = 2 n real samples is transformed as n complex numbers z[k] = x[2k] + i x[2k+1]; `split` takes the two
// interleaved spectra apart. All transforms are forward: exp(-2 pi i j k / n).
#pragma once

#include "numbers.h"

namespace cat {

// Kaldi's floor of the mel energies, the machine epsilon of float.
constexpr float kEnergyFloor = 1.1920928955078125e-07f;

// x - preemphasis * before, with `kept` = 1 - preemphasis. Neighbouring samples are alike: their difference is exact, and
// no product of the size of a sample is rounded.
template <class V>
CAT_HD V emphasise(V x, V before, float kept) {
  return (x - before) + before * kept;
}

template <class V>
struct Complex {
  V re, im;
};

template <class V>
CAT_HD Complex<V> operator+(Complex<V> a, Complex<V> b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
CAT_HD Complex<V> operator-(Complex<V> a, Complex<V> b) {
  return {a.re - b.re, a.im - b.im};
}

template <class V>
CAT_HD Complex<V> operator*(Complex<V> a, Complex<float> w) {
  return {a.re * w.re - a.im * w.im, a.re * w.im + a.im * w.re};
}

template <class V>
CAT_HD Complex<V> minus_i_times(Complex<V> a) {
  return {a.im, V{} - a.re};
}

// Four-point transform in place. kWithoutD: d is zero and is not read.
template <bool kWithoutD = false, class V>
CAT_HD void dft4(Complex<V>& a, Complex<V>& b, Complex<V>& c, Complex<V>& d) {
  const Complex<V> sum_ac = a + c, difference_ac = a - c;
  const Complex<V> sum_bd = kWithoutD ? b : b + d, difference_bd = kWithoutD ? b : b - d;
  a = sum_ac + sum_bd;
  b = {difference_ac.re + difference_bd.im, difference_ac.im - difference_bd.re};
  c = sum_ac - sum_bd;
  d = {difference_ac.re - difference_bd.im, difference_ac.im + difference_bd.re};
}

// Where dft16 leaves frequency k.
CAT_HD constexpr int place16(int k) { return k % 4 * 4 + k / 4; }

// Sixteen-point transform in place, frequency k at z[place16(k)]. Inputs from kFilled (13 to 16) on are zero.
template <int kFilled = 16, class V>
CAT_HD void dft16(Complex<V> (&z)[16]) {
  static_assert(kFilled >= 13 && kFilled <= 16, "only inputs 13 to 15 may be left out");
  constexpr float kCos = 0.92387953251128676f, kSin = 0.38268343236508977f, kHalf = 0.70710678118654752f;
  dft4(z[0], z[4], z[8], z[12]);
  dft4<(kFilled < 14)>(z[1], z[5], z[9], z[13]);
  dft4<(kFilled < 15)>(z[2], z[6], z[10], z[14]);
  dft4<(kFilled < 16)>(z[3], z[7], z[11], z[15]);
  // z[j + 4 k] times exp(-2 pi i j k / 16).
  z[5] = z[5] * Complex<float>{kCos, -kSin};
  z[6] = {(z[6].re + z[6].im) * kHalf, (z[6].im - z[6].re) * kHalf};
  z[7] = z[7] * Complex<float>{kSin, -kCos};
  z[9] = {(z[9].re + z[9].im) * kHalf, (z[9].im - z[9].re) * kHalf};
  z[10] = minus_i_times(z[10]);
  z[11] = {(z[11].im - z[11].re) * kHalf, (z[11].re + z[11].im) * -kHalf};
  z[13] = z[13] * Complex<float>{kSin, -kCos};
  z[14] = {(z[14].im - z[14].re) * kHalf, (z[14].re + z[14].im) * -kHalf};
  z[15] = z[15] * Complex<float>{-kCos, kSin};
  dft4(z[0], z[1], z[2], z[3]);
  dft4(z[4], z[5], z[6], z[7]);
  dft4(z[8], z[9], z[10], z[11]);
  dft4(z[12], z[13], z[14], z[15]);
}

// Butterfly j of one pass of Stockham's transform of `points`, from `in` to `out`. `stride` is 1 in the first pass and
// grows by the pass's radix; twiddle[k] = exp(-2 pi i k / points). There are points / 4 butterflies in a pass of
// radix 4, points / 2 in one of radix 2, which comes last and needs no twiddle factors.
template <class V>
CAT_HD void stockham4(const Complex<V>* in, Complex<V>* out, const Complex<float>* twiddle, int points, int stride, int j) {
  const int quarter = points / 4, q = j % stride, p = j / stride;
  Complex<V> a = in[j], b = in[j + quarter], c = in[j + 2 * quarter], d = in[j + 3 * quarter];
  dft4(a, b, c, d);
  Complex<V>* to = out + q + 4 * stride * p;
  to[0] = a;
  to[stride] = b * twiddle[p * stride];
  to[2 * stride] = c * twiddle[2 * p * stride];
  to[3 * stride] = d * twiddle[3 * p * stride];
}

template <class V>
CAT_HD void stockham2(const Complex<V>* in, Complex<V>* out, int points, int j) {
  const Complex<V> a = in[j], b = in[j + points / 2];
  out[j] = a + b;
  out[j + points / 2] = a - b;
}

// Four times the powers of bins k and n - k of the real samples, from z[k] and z[n - k] of their n-point transform;
// turn = exp(-2 pi i k / 2n). The four is part of the mel weights.
template <class V>
CAT_HD void split(Complex<V> low, Complex<V> high, Complex<float> turn, V& power_low, V& power_high) {
  const Complex<V> even = {low.re + high.re, low.im - high.im};
  const Complex<V> odd = Complex<V>{low.im + high.im, high.re - low.re} * turn;
  const Complex<V> sum = even + odd, difference = even - odd;
  power_low = sum.re * sum.re + sum.im * sum.im;
  power_high = difference.re * difference.re + difference.im * difference.im;
}

}  // namespace cat
