// Results in the inputs' dtype, rounded to nearest, ties to even.
#pragma once
#include "pack.h"

namespace itm_fast {

inline uint16_t narrow_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (rest < 0x38800000) {  // subnormal: one unit of the sum's last place is one of the result
    const float sum = std::fabs(x) + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &sum, sizeof rounded);
    return uint16_t(sign | (rounded - 0x3f000000));
  }
  return uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

// n values times `factor`, as values offset .. offset + n of a contiguous tensor.
template <class T>
inline void write(void* tensor, Dtype dtype, int64_t offset, int64_t n, const T* values, T factor) {
  const auto copy = [&](auto* to, auto narrow) {
    for (int64_t i = 0; i < n; ++i) to[offset + i] = narrow(values[i] * factor);
  };
  const auto same = [](T x) { return x; };
  if (dtype == Dtype::FLOAT32) copy(static_cast<float*>(tensor), same);
  else if (dtype == Dtype::FLOAT64) copy(static_cast<double*>(tensor), same);
  else if (dtype == Dtype::BFLOAT16)
    copy(static_cast<uint16_t*>(tensor), [](T x) { return uint16_t(x == x ? narrow_bfloat16(float(x)) : 0x7fc0); });
  else copy(static_cast<uint16_t*>(tensor), [](T x) { return narrow_float16(float(x)); });
}

}  // namespace itm_fast
