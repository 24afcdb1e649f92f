// Vectors of float or double, as wide as the instructions that this file is compiled for allow, and the functions on
// them that kernels share. Every function works lane by lane unless it says otherwise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace itm_fast {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr int LANES = VECTOR_BYTES / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// Stores the first n lanes, 1 <= n <= LANES.
template <class T>
inline void store_head(T* p, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16(0xffff >> (16 - n)), (__m512)v);
  else _mm512_mask_storeu_pd(p, __mmask8(0xff >> (8 - n)), (__m512d)v);
#else
  if (n == LANES<T>) std::memcpy(p, &v, sizeof v);
  else if (2 * n == LANES<T>) std::memcpy(p, &v, sizeof v / 2);
  else std::memcpy(p, &v, size_t(n) * sizeof(T));
#endif
}

template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// A mask for the vector whose lanes are values first, first + 1, ... of a row: all bits set where the value's place is
// in [begin, end).
template <class T>
inline Vec<Int<T>> inside(int64_t first, int64_t begin, int64_t end) {
  Vec<Int<T>> lane;
  for (int i = 0; i < LANES<T>; ++i) lane[i] = Int<T>(i);
  return (lane >= Int<T>(begin - first)) & (lane < Int<T>(end - first));
}

template <class T>
inline Vec<T> select(Vec<Int<T>> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// The sum of all lanes: halves are added until one lane is left, so the order does not depend on the values.
template <class T>
inline T sum(Vec<T> v) {
  for (int half = LANES<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// The largest of all lanes.
template <class T>
inline T max(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < LANES<T>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Of each lane, root(v): the square root; bounded(x, bound): x, but at least -bound and at most bound, and NaN stays,
// as the processor's least and largest of two numbers are the second one where either is NaN.
#if defined(__AVX512F__)
template <>
inline float sum<float>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
inline double sum<double>(Vec<double> v) {
  return _mm512_reduce_add_pd((__m512d)v);
}
template <>
inline float max<float>(Vec<float> v) {
  return _mm512_reduce_max_ps((__m512)v);
}
inline Vec<float> root(Vec<float> v) { return (Vec<float>)_mm512_sqrt_ps((__m512)v); }
inline Vec<double> root(Vec<double> v) { return (Vec<double>)_mm512_sqrt_pd((__m512d)v); }
inline Vec<float> bounded(Vec<float> x, float bound) {
  const __m512 low = _mm512_set1_ps(-bound), high = _mm512_set1_ps(bound);
  return (Vec<float>)_mm512_min_ps(high, _mm512_max_ps(low, (__m512)x));
}
inline Vec<double> bounded(Vec<double> x, double bound) {
  const __m512d low = _mm512_set1_pd(-bound), high = _mm512_set1_pd(bound);
  return (Vec<double>)_mm512_min_pd(high, _mm512_max_pd(low, (__m512d)x));
}
#elif defined(__AVX2__)
inline Vec<float> root(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
inline Vec<double> root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
inline Vec<float> bounded(Vec<float> x, float bound) {
  const __m256 low = _mm256_set1_ps(-bound), high = _mm256_set1_ps(bound);
  return (Vec<float>)_mm256_min_ps(high, _mm256_max_ps(low, (__m256)x));
}
inline Vec<double> bounded(Vec<double> x, double bound) {
  const __m256d low = _mm256_set1_pd(-bound), high = _mm256_set1_pd(bound);
  return (Vec<double>)_mm256_min_pd(high, _mm256_max_pd(low, (__m256d)x));
}
#else
template <class V>
inline V root(V v) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}
template <class V, class T>
inline V bounded(V x, T bound) {
  x = x < -bound ? V{} - bound : x;
  return x > bound ? V{} + bound : x;
}
#endif

// Beyond it, e^x or e^-x is below the normal numbers.
template <class T>
constexpr T EXP_RANGE = sizeof(T) == 4 ? T(87.33) : T(708.39);

// e^x, off by at most 2.1 units in the last place (derived in tests/test_white_box_simd.py). Beyond the range it stays
// what it is at its end, also for infinities. NaN gives NaN. x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor
// polynomial, 2^n by setting the exponent's bits.
template <class T>
inline Vec<T> exp_in_range(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52, degree = single ? 7 : 13;
  constexpr T shift = T(1.5) * T(int64_t(1) << mantissa);
  constexpr T high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  x = bounded(x, EXP_RANGE<T>);
  const Vec<T> biased = x * T(1.44269504088896340736) + shift, n = biased - shift;
  const Vec<T> r = (x - n * high) - n * low;
  T inverse[degree + 1] = {1};
  for (int k = 1; k <= degree; ++k) inverse[k] = inverse[k - 1] / T(k);
  Vec<T> p = splat(inverse[degree]);
  for (int k = degree - 1; k >= 0; --k) p = p * r + inverse[k];
  const Vec<Int<T>> power = ((Vec<Int<T>>)biased << mantissa) + (Int<T>(single ? 127 : 1023) << mantissa);
  return p * (Vec<T>)power;
}

// The same, but 0 below the range, so that -inf gives exactly 0.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  return x < -EXP_RANGE<T> ? Vec<T>{} : exp_in_range<T>(x);
}

// tanh(x) = e / (e + 2) with e = e^(2|x|) - 1, and x's sign, off by a few units in the last place. e has no
// cancellation: with 2|x| = n ln 2 + r as in exp(), it is (e^r - 1) 2^n + (2^n - 1), and e^r - 1 is a polynomial
// without its constant. Beyond |x| = 20, where tanh is 1 in both types, e stays as it is there. NaN gives NaN.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52, degree = single ? 7 : 13;
  constexpr T shift = T(1.5) * T(int64_t(1) << mantissa);
  constexpr T high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  Vec<T> twice = (x < 0 ? -x : x) * T(2);
  twice = twice > 40 ? splat(T(40)) : twice;
  const Vec<T> biased = twice * T(1.44269504088896340736) + shift, n = biased - shift;
  const Vec<T> r = (twice - n * high) - n * low;
  T inverse[degree + 1] = {1};
  for (int k = 1; k <= degree; ++k) inverse[k] = inverse[k - 1] / T(k);
  Vec<T> p = splat(inverse[degree]);
  for (int k = degree - 1; k >= 1; --k) p = p * r + inverse[k];
  const Vec<T> power = (Vec<T>)(((Vec<Int<T>>)biased << mantissa) + (Int<T>(single ? 127 : 1023) << mantissa));
  const Vec<T> e = p * r * power + (power - T(1)), positive = e / (e + T(2));
  return x < 0 ? -positive : positive;
}

// 1 / (1 + e^-x); at -inf the inverse of the largest e^x, not 0.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp_in_range<T>(-x));
}

#if defined(__AVX512BF16__)
// sigmoid() for logits that are products of bfloat16 values: off by at most 1e-4 of the result, a twentieth of what
// rounding to bfloat16 may change; 0 where e^-x overflows. e^-x = 2^t is 2^floor(t) times a polynomial in t - floor(t)
// whose largest relative error, 7.5e-5, is the least of its degree.
inline Vec<float> rough_sigmoid(Vec<float> x) {
  const Vec<float> t = x * -1.44269504f;
  const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec<float> p = ((0.07802452f * r + 0.22606716f) * r + 0.69583354f) * r + 0.99992522f;
  return 1.0f / (1.0f + (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)t));
}

// Lane i holds even[i] in its low half and odd[i] in its high half, both rounded to bfloat16.
inline Vec<float> in_pairs(Vec<float> even, Vec<float> odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  return (Vec<float>)_mm512_permutexvar_epi16(order, halves);
}

// Stores the lanes rounded to bfloat16, in the room of half as many floats.
inline void store_rounded(float* to, Vec<float> v) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &half, sizeof half);
}
#endif

}  // namespace itm_fast
