// Functions that move values between lanes: sums along the lanes of many vectors at once, and a transpose of squares of
// LANES x LANES values.
#pragma once
#include <utility>

#include "pack.h"

namespace itm_fast {

#if !defined(__has_builtin)
#define __has_builtin(name) 0
#endif

// a0 b0 a1 b1 ... of the lower (half = 0) or upper (half = 1) halves of two vectors.
template <class T, int half, size_t... lane>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (int(lane) / 2 + (lane & 1) * LANES<T> + half * LANES<T> / 2)...);
#else
  return __builtin_shuffle(a, b, Vec<Int<T>>{Int<T>(lane / 2 + (lane & 1) * LANES<T> + half * LANES<T> / 2)...});
#endif
}

// a0 b0 a1 b1 ... of the lower halves, and below of the upper halves.
template <class T>
inline Vec<T> lower(Vec<T> a, Vec<T> b) {
  return interleave<T, 0>(a, b, std::make_index_sequence<LANES<T>>());
}

template <class T>
inline Vec<T> upper(Vec<T> a, Vec<T> b) {
  return interleave<T, 1>(a, b, std::make_index_sequence<LANES<T>>());
}

// Lane r of the result is the sum over the lanes of v[r], in the same order for every r. v is used up.
template <class T>
inline Vec<T> sums(Vec<T> (&v)[LANES<T>]) {
#pragma GCC unroll 4
  for (int count = LANES<T>; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < count / 2; ++k)
      v[k] = lower<T>(v[k], v[k + count / 2]) + upper<T>(v[k], v[k + count / 2]);
  return v[0];
}

// Transposes LANES vectors in place. Each round interleaves vectors half a square apart.
template <class T>
inline void transpose_vectors(Vec<T> (&v)[LANES<T>]) {
  Vec<T> w[LANES<T>];
#pragma GCC unroll 4
  for (int count = LANES<T>; count > 1; count /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < LANES<T> / 2; ++k) {
      w[2 * k] = lower<T>(v[k], v[k + LANES<T> / 2]);
      w[2 * k + 1] = upper<T>(v[k], v[k + LANES<T> / 2]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < LANES<T>; ++k) v[k] = w[k];
  }
}

// Transposes LANES rows of LANES values, `step` apart, into rows `ld` apart.
template <class T>
inline void transpose_square(const T* from, int64_t step, T* to, int64_t ld) {
  Vec<T> v[LANES<T>];
#pragma GCC unroll 16
  for (int r = 0; r < LANES<T>; ++r) v[r] = load(from + r * step);
  transpose_vectors<T>(v);
#pragma GCC unroll 16
  for (int r = 0; r < LANES<T>; ++r) store(to + r * ld, v[r]);
}

// out[k][r] = row r's value k, for `count` rows of K values; out's rows lie `step` apart.
template <class T>
inline void interleave(const T* const* row, int64_t count, int64_t K, T* out, int64_t step) {
  const int64_t whole = K / LANES<T> * LANES<T>;
  for (int64_t r = 0; r < count; r += LANES<T>) {
    const int64_t n = least(LANES<T>, count - r);
    for (int64_t k = 0; k < whole; k += LANES<T>) {
      Vec<T> v[LANES<T>];
#pragma GCC unroll 16
      for (int i = 0; i < LANES<T>; ++i) v[i] = load(row[r + least(i, n - 1)] + k);
      transpose_vectors<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < LANES<T>; ++i) store_head(out + (k + i) * step + r, v[i], n);
    }
    for (int64_t k = whole; k < K; ++k)
      for (int64_t i = r; i < r + n; ++i) out[k * step + i] = row[i][k];
  }
}

// The same result as transpose() of pack.h, faster: squares of LANES x LANES values, then the rest value by value.
template <class T>
inline void transpose_by_squares(const T* rows, int64_t step, int64_t count, int64_t K, T* out, int64_t ld) {
  const int64_t whole_rows = count / LANES<T> * LANES<T>, whole = K / LANES<T> * LANES<T>;
  for (int64_t r = 0; r < whole_rows; r += LANES<T>)
    for (int64_t k = 0; k < whole; k += LANES<T>) transpose_square(rows + r * step + k, step, out + k * ld + r, ld);
  if (whole < K) transpose(rows + whole, step, whole_rows, K - whole, out + whole * ld, ld);
  if (whole_rows < count) transpose(rows + whole_rows * step, step, count - whole_rows, K, out + whole_rows, ld);
}

}  // namespace itm_fast
