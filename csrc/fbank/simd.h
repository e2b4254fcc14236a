// W floats, one of each of W frames, as one value of the compiler's vector extension: +, -, * and comparisons are the
// compiler's, and it translates them to whatever instruction set it is told to use.
#pragma once

#include <utility>

#include "arithmetic.h"

namespace cat {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;  // SSE, NEON
#endif

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVector __attribute__((vector_size(4 * kWidth)));

CAT_HD Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

CAT_HD void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

CAT_HD Vector broadcast(float value) { return Vector{} + value; }

// The elements of a and b, numbered through, at the places that `place(0) .. place(W - 1)` names.
#if defined(__clang__)
template <class Place, int... I>
CAT_HD Vector shuffle(Vector a, Vector b, Place place, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, place(I)...);
}

template <class Place>
CAT_HD Vector shuffle(Vector a, Vector b, Place place) {
  return shuffle(a, b, place, std::make_integer_sequence<int, kWidth>());
}
#else
template <class Place>
CAT_HD Vector shuffle(Vector a, Vector b, Place place) {
  IntVector places{};
  for (int i = 0; i < kWidth; ++i) places[i] = place(i);
  return __builtin_shuffle(a, b, places);
}
#endif

// Exchanges bit kBit of the row number with that of the column number, and so on with the higher bits.
template <int kBit>
CAT_HD void swap_pieces(Vector (&row)[kWidth]) {
  if constexpr (kBit < kWidth) {
    for (int r = 0; r < kWidth; r += 2 * kBit) {
      for (int i = r; i < r + kBit; ++i) {
        const Vector a = row[i], b = row[i + kBit];
        row[i] = shuffle(a, b, [](int c) { return c & kBit ? kWidth + c - kBit : c; });
        row[i + kBit] = shuffle(a, b, [](int c) { return c & kBit ? kWidth + c : c + kBit; });
      }
    }
    swap_pieces<2 * kBit>(row);
  }
}

// Rows to columns, in place. First 4 x 4 within each 128 bits, then the 128-bit pieces.
CAT_HD void transpose(Vector (&row)[kWidth]) {
  constexpr int W = kWidth;
  for (int r = 0; r < W; r += 4) {
    // c is a place within 128 bits, l the first of its 128 bits.
    const auto low = [](int i) { const int c = i % 4, l = i - c; return l + c / 2 + c % 2 * W; };
    const auto high = [](int i) { const int c = i % 4, l = i - c; return l + 2 + c / 2 + c % 2 * W; };
    const auto first = [](int i) { const int c = i % 4, l = i - c; return l + c % 2 + c / 2 * W; };
    const auto second = [](int i) { const int c = i % 4, l = i - c; return l + 2 + c % 2 + c / 2 * W; };
    const Vector a = shuffle(row[r], row[r + 1], low), b = shuffle(row[r], row[r + 1], high);
    const Vector c = shuffle(row[r + 2], row[r + 3], low), d = shuffle(row[r + 2], row[r + 3], high);
    row[r] = shuffle(a, c, first);
    row[r + 1] = shuffle(a, c, second);
    row[r + 2] = shuffle(b, d, first);
    row[r + 3] = shuffle(b, d, second);
  }
  swap_pieces<4>(row);
}

// Natural logarithm, to 1 ulp or so, of positive normal numbers, infinity and NaN (Cephes' logf).
CAT_HD Vector log(Vector x) {
  const IntVector bits = (IntVector)x;
  Vector mantissa = (Vector)((bits & 0x007fffff) | 0x3f800000);
  const IntVector upper = mantissa > 1.41421356f;
  mantissa = upper ? mantissa * 0.5f : mantissa;
  const Vector exponent = __builtin_convertvector((bits >> 23) - 127 - upper, Vector);  // a true comparison is -1
  const Vector f = mantissa - 1.0f, square = f * f;
  Vector y = broadcast(7.0376836292e-2f);
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square - 2.12194440e-4f * exponent - 0.5f * square;
  const Vector result = f + y + 0.693359375f * exponent;
  return x <= 3.402823466e38f ? result : x;
}

CAT_HD Vector log_energy(Vector energy) { return log(energy < kEnergyFloor ? broadcast(kEnergyFloor) : energy); }

}  // namespace cat
