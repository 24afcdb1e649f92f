// Tensors of any dtype are read here, as numbers of the type T that sums have, into the layouts that gemm.h multiplies.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "calls/choices.h"
#include "threads.h"

namespace itm_fast {

template <class T>
constexpr Dtype DTYPE = sizeof(T) == 4 ? Dtype::FLOAT32 : Dtype::FLOAT64;

// A contiguous tensor in the caller's memory, in the caller's dtype.
struct Source {
  const void* data;
  Dtype dtype;
};

inline float widen_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline float widen_float16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  float x;
  if (rest >= 0x0400) {
    const uint32_t wide = sign | ((rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000));
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  x = float(rest) * 0x1p-24f;  // zero or subnormal
  return sign ? -x : x;
}

// n values from `offset` on: the tensor's own memory where its dtype is T, else widened into `room`.
template <class T>
inline const T* read(Source s, int64_t offset, int64_t n, T* room) {
  if (s.dtype == DTYPE<T>) return static_cast<const T*>(s.data) + offset;
  const auto copy = [&](auto* from, auto widen) {
    for (int64_t i = 0; i < n; ++i) room[i] = T(widen(from[offset + i]));
  };
  const auto same = [](auto x) { return x; };
  if (s.dtype == Dtype::FLOAT32) copy(static_cast<const float*>(s.data), same);
  else if (s.dtype == Dtype::FLOAT64) copy(static_cast<const double*>(s.data), same);
  else if (s.dtype == Dtype::BFLOAT16) copy(static_cast<const uint16_t*>(s.data), widen_bfloat16);
  else if (s.dtype == Dtype::FLOAT16) copy(static_cast<const uint16_t*>(s.data), widen_float16);
  else throw std::invalid_argument("a CPU kernel got a dtype it does not know");
  return room;
}

// out[k][r] = rows[r][k] for `count` rows of K values that lie `step` apart; out's rows lie ld apart.
template <class T>
inline void transpose(const T* rows, int64_t step, int64_t count, int64_t K, T* out, int64_t ld) {
  constexpr int64_t SIDE = 16;
  for (int64_t k = 0; k < K; k += SIDE)
    for (int64_t r = 0; r < count; r += SIDE)
      for (int64_t kk = k; kk < least(k + SIDE, K); ++kk)
        for (int64_t rr = r; rr < least(r + SIDE, count); ++rr) out[kk * ld + rr] = rows[rr * step + kk];
}

// Rows first .. first + count of a tensor with K columns become the columns of B for a product over these K values: out
// is [K][ld].
template <class T>
inline void pack_columns(Source s, int64_t first, int64_t count, int64_t K, T* out, int64_t ld) {
  constexpr int64_t SIDE = 16;
  Buffer<T> room(SIDE * K);
  for (int64_t r = 0; r < count; r += SIDE) {
    const int64_t n = least(SIDE, count - r);
    transpose(read<T>(s, (first + r) * K, n * K, room), K, n, K, out + r, ld);
  }
}

// Rows first .. first + count of a tensor with D columns, both as rows [count][row_ld] and as columns [D][ld].
template <class T>
inline void read_both(Source s, int64_t first, int64_t count, int64_t D, T* row, int64_t row_ld, T* column,
                      int64_t ld) {
  for (int64_t r = 0; r < count; ++r) {
    T* to = row + r * row_ld;
    const T* from = read<T>(s, (first + r) * D, D, to);
    if (from != to) std::copy_n(from, D, to);
  }
  transpose<T>(row, row_ld, count, D, column, ld);
}

// The Gram matrix [n][gram_ld] of n columns [D][ld]: their products with each other. Returns the largest |column|^2.
template <class T>
inline T multiply_with_each_other(int64_t n, int64_t D, const T* column, int64_t ld, T* gram, int64_t gram_ld) {
  gemm<T>(n, n, D, {column, ld}, {column, ld}, [](int64_t, int64_t) { return Vec<T>{}; },
          [=](int64_t i, int64_t j, Vec<T> c) { store(gram + i * gram_ld + j, c); });
  T largest = 0;
  for (int64_t x = 0; x < n; ++x) largest = std::max(largest, gram[x * gram_ld + x]);
  return largest;
}

// How many values pack_rows() writes for M rows of K values.
constexpr int64_t packed_size(int64_t M, int64_t K) { return round_up(M, ROW_STEP) * K; }

// A of a product, packed as gemm.h's Left wants: panels of TILE_ROWS rows, k-major; out must hold packed_size(M, K)
// zeros. value(i, k) gives the element.
template <class T, class Value>
inline void pack_rows(int64_t M, int64_t K, T* out, Value value) {
  for (int64_t i = 0; i < M; i += TILE_ROWS) {
    const int64_t wide = least(TILE_ROWS, round_up(M - i, ROW_STEP)), rows = least(wide, M - i);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t r = 0; r < rows; ++r) out[i * K + k * wide + r] = value(i + r, k);
  }
}

// The bits of x rounded to bfloat16, to nearest, ties to even.
inline uint32_t narrow_bfloat16(float x) {
  if (x != x) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// The same for products of bfloat16 values: K values become (K + 1) / 2 pairs, a zero beyond an odd K.
template <class Value>
inline void pack_rows(int64_t M, int64_t K, Pair* out, Value value) {
  pack_rows<Pair>(M, (K + 1) / 2, out, [&](int64_t i, int64_t k) {
    const uint32_t even = narrow_bfloat16(float(value(i, 2 * k)));
    return Pair{even | (2 * k + 1 < K ? narrow_bfloat16(float(value(i, 2 * k + 1))) << 16 : 0)};
  });
}

#if defined(__AVX512BF16__)
// B of a product of bfloat16 values from the float one [K][ld]: (K + 1) / 2 rows of pairs.
inline void pair_rows(int64_t K, int64_t columns, const float* b, int64_t ld, Pair* out) {
  for (int64_t k = 0; k < K; k += 2)
    for (int64_t j = 0; j < columns; j += LANES<float>) {
      const Vec<float> odd = k + 1 < K ? load(b + (k + 1) * ld + j) : Vec<float>{};
      const Vec<float> both = in_pairs(load(b + k * ld + j), odd);
      std::memcpy(out + k / 2 * ld + j, &both, sizeof both);
    }
}
#endif

// Of a matrix and its rows' pairs, what a product of E takes.
template <class E>
inline const E* either([[maybe_unused]] const Sum<E>* matrix, [[maybe_unused]] const E* pairs) {
  if constexpr (IS_PAIR<E>) return pairs;
  else return matrix;
}

// A matrix [K][columns], its rows ld apart, as a product of E takes it: itself, or its rows' pairs, made in `out`.
template <class E>
inline const E* factors([[maybe_unused]] int64_t K, [[maybe_unused]] int64_t columns, const Sum<E>* matrix,
                        [[maybe_unused]] int64_t ld, E* out) {
  if constexpr (IS_PAIR<E>) pair_rows(K, columns, matrix, ld, out);
  return either<E>(matrix, out);
}

// A vector of row i of `rows` rows, as a product ends with it, becomes a factor in `out`, whose rows lie ld apart:
// itself, or its pairs with the row before, which `even` keeps. `only`, unless null, is positive in the columns to
// write.
template <class E>
inline void put_factor(int64_t rows, int64_t i, int64_t j, Vec<Sum<E>> v, Vec<Sum<E>> (&even)[TILE_VECTORS], E* out,
                       int64_t ld, const Sum<E>* only = nullptr) {
  using T = Sum<E>;
  if constexpr (IS_PAIR<E>) {
    if (i % 2 == 0) even[j / LANES<T>] = v;
    if (i % 2 == 0 && i + 1 < rows) return;
    v = in_pairs(even[j / LANES<T>], i % 2 ? v : Vec<T>{});
  }
  T* const to = reinterpret_cast<T*>(out + (depth<E>(i + 1) - 1) * ld + j);  // pairs have the size of a float
  store(to, only ? select<T>(load(only + j) > 0, v, load(to)) : v);
}

// Consecutive sets of rows (captions' words, images' regions) that are worked on together: their rows become the
// columns of one matrix.
struct Chunk {
  int64_t first, last;  // sets
  int64_t begin, rows;  // of the packed tensor
};

// Cut sets with bounds edge[0 .. sets] into chunks of at most `most` rows, one set at the least.
inline std::vector<Chunk> chunks(const int64_t* edge, int64_t sets, int64_t most) {
  std::vector<Chunk> result;
  for (int64_t first = 0; first < sets;) {
    int64_t last = first + 1;
    while (last < sets && edge[last + 1] - edge[first] <= most) ++last;
    result.push_back({first, last, edge[first], edge[last] - edge[first]});
    first = last;
  }
  return result;
}

// Distance between rows of a matrix with `columns` columns: whole vectors and one more, for loads that begin inside
// the last one, and an odd number of cache lines, so that a column of it does not fall into a few cache sets.
template <class T>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  const int64_t lines = (round_up(columns, TILE_COLUMNS<T>) + LANES<T> + line - 1) / line;
  return (lines | 1) * line;
}

}  // namespace itm_fast
