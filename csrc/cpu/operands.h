// What a product of gemm.h takes: sizes of its tiles, elements, and the layouts of both sides.
#pragma once
#include "simd.h"

namespace itm_fast {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_VECTORS = 2;  // 24 sums, 2 of B and a broadcast: 27 of 32 registers
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 3;  // 12 sums, 3 of B and a broadcast: 16 registers
#endif
constexpr int ROW_STEP = 4;  // rows of A come in multiples of this, zeros beyond the real ones

template <class T>
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES<T>;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Two bfloat16 values, of k and k + 1 for an even k, in one word: what AVX-512's dot product takes from A and from B.
struct Pair {
  uint32_t bits;
};

// E is the type of A's and B's elements: float, double or Pair. Sums of pairs are in float32.
template <class E>
constexpr bool IS_PAIR = std::is_same_v<E, Pair>;
template <class E>
using Sum = std::conditional_t<IS_PAIR<E>, float, E>;

// Rows of A and B in a product over K values: half as many when each row holds two.
template <class E>
constexpr int64_t depth(int64_t K) {
  return IS_PAIR<E> ? (K + 1) / 2 : K;
}

// A as a k-major array whose rows lie ld apart, or, with ld = 0, packed by pack_rows: panels of TILE_ROWS rows, the
// last one of as many as are left.
template <class E>
struct Left {
  const E* data;
  int64_t ld;
};

// B as a k-major array whose rows lie ld apart. `next`, where given, is a matrix of the same size that a later product
// reads: it is prefetched into the second cache a line at a time while this product runs, else the later product's
// first rows of A would wait for all of it.
template <class E>
struct Right {
  const E* data;
  int64_t ld;
  const E* next = nullptr;
};

}  // namespace itm_fast
