// The element types of waveforms and results, and their conversions from and to float.
//
// Everything here has internal linkage: the CPU code is compiled once for each instruction set, and a function shared
// between these objects could be the one that this processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define CAT_HD static __host__ __device__ __forceinline__
#else
#define CAT_HD static inline __attribute__((always_inline))
#endif

namespace cat {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

CAT_HD float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CAT_HD uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CAT_HD float to_float(float value) { return value; }

CAT_HD float to_float(int16_t value) { return value; }

CAT_HD float to_float(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }

CAT_HD float to_float(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(value.bits & 0x7fff) << 13;
  // The exponent is moved by a product with 2^112, which also makes subnormal numbers normal. Infinity and NaN have
  // an exponent that this does not reach.
  const uint32_t bits = as_bits(as_float(rest) * 0x1p112f);
  return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : bits));
#endif
}

// The value rounded to nearest, ties to even.
CAT_HD void assign(float& to, float value) { to = value; }

CAT_HD void assign(BFloat16& to, float value) {
  const uint32_t bits = as_bits(value);
  to.bits = uint16_t(value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

CAT_HD void assign(Half& to, float value) {
#ifdef __CUDA_ARCH__
  to.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  // Below 2^-14 the result is subnormal: adding 1/2 lets the adder round to multiples of 2^-24.
  const uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13;
  uint32_t half = rest < 0x38800000 ? subnormal : normal;
  half = rest >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more round to infinity
  half = rest > 0x7f800000 ? 0x7fff : half;
  to.bits = uint16_t(sign | half);
#endif
}

}  // namespace cat
