// The dtypes as C++ types, and a visitor that maps a DType to its type. bf16 and fp16 are converted
// with straight-line integer code, so that loops over them vectorize on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../ops.h"
#include "parallel.h"

namespace hdp::cpu {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

HDP_INLINE float bits2float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

HDP_INLINE uint32_t float2bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

HDP_INLINE double load(double x) { return x; }
HDP_INLINE float load(float x) { return x; }
HDP_INLINE float load(bf16 x) { return bits2float(uint32_t{x.bits} << 16); }

HDP_INLINE float load(f16 x) {
  const uint32_t sign = uint32_t{x.bits} << 16 & 0x80000000u, rest = x.bits & 0x7fffu;
  // Rebias the exponent by a multiplication, which handles subnormals as well as normal numbers.
  const float value = bits2float(rest << 13) * bits2float(0x77800000u);  // 2^112
  const uint32_t special = 0x7f800000u | rest << 13;                     // infinity or NaN
  return bits2float(sign | (rest >= 0x7c00u ? special : float2bits(value)));
}

HDP_INLINE void store(double x, double* to) { *to = x; }
HDP_INLINE void store(float x, float* to) { *to = x; }

HDP_INLINE void store(float x, bf16* to) {
  const uint32_t bits = float2bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

HDP_INLINE void store(float x, f16* to) {
  const uint32_t bits = float2bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  // Below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits of the sum.
  const uint32_t subnormal = float2bits(bits2float(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest + 0xc8000fffu + (rest >> 13 & 1u)) >> 13;
  uint32_t half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above: infinity
  half = rest > 0x7f800000u ? 0x7e00u : half;
  to->bits = static_cast<uint16_t>(sign | half);
}

// f(T{}) with the type that `dtype` names.
template <class F>
void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

}  // namespace hdp::cpu
