// The matrix product of all CPU kernels: C[i][j] = begin(i, j) + sum over k of A[k][i] B[k][j], C's columns along the
// lanes of vectors.
//
// A is read a value at a time and B a row of vectors at a time, so both are stored k-major: A[k][i], B[k][j]. What a
// sum starts from and where it goes are functions of the caller, so that a product fuses with what comes before and
// after it. Every element is one chain of fused multiply-adds over k, so its bits depend on neither its place nor its
// tile. One thread runs a product; callers share products out to threads (threads.h).
#pragma once
#include "tiles.h"

namespace itm_fast {

// c += a b, for each lane.
template <class E>
inline void multiply_add(Vec<Sum<E>>& c, const E* a, Vec<Sum<E>> b) {
#if defined(__AVX512BF16__)
  if constexpr (IS_PAIR<E>) {
    c = (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a->bits)), (__m512bh)b);
    return;
  } else
#endif
  {
    static_assert(!IS_PAIR<E>, "a source that multiplies pairs has to ask for __AVX512BF16__ itself");
    c += b * *a;
  }
}

// One tile of C: ROWS rows by VECTORS vectors, whose sums stay in registers over all k. `ahead` is prefetched, `step`
// bytes further at every k.
template <class E, int ROWS, int VECTORS, class Begin, class End>
inline void tile(int64_t K, const E* a, int64_t lda, const E* b, int64_t ldb, const char* ahead, int64_t step,
                 Begin begin, End end) {
  using T = Sum<E>;
  Vec<T> c[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) c[r][v] = begin(r, v);
  for (int64_t k = 0; k < K; ++k, a += lda, b += ldb, ahead += step) {
    Vec<T> row[VECTORS];
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) std::memcpy(&row[v], b + v * LANES<T>, sizeof row[v]);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) multiply_add<E>(c[r][v], a + r, row[v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) end(r, v, c[r][v]);
}

// The tile of C whose first element is (i, j), cut at M rows and at the vectors that begin before column N.
template <class E, int ROWS, class Begin, class End>
inline void tile_row(int64_t M, int64_t N, int64_t K, Left<E> a, Right<E> b, int64_t i, int64_t j, Begin begin,
                     End end) {
  using T = Sum<E>;
  const E* rows = a.ld ? a.data + i : a.data + i * K;
  const int64_t lda = a.ld ? a.ld : least(TILE_ROWS, round_up(M - i, ROW_STEP));
  const auto first = [&](int r, int v) { return begin(i + r, j + v * LANES<T>); };
  const auto last = [&](int r, int v, Vec<T> c) {
    if (i + r < M) end(i + r, j + v * LANES<T>, c);
  };
  const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS, bytes = b.ld * int64_t(sizeof(E));
  const int64_t step = b.next ? (bytes + tiles - 1) / tiles : 0;  // this tile's share of a row of `next`
  const auto* const ahead = reinterpret_cast<const char*>(b.next ? b.next : rows) + i / TILE_ROWS * K * step;
  const int64_t vectors = least(TILE_VECTORS, (N - j + LANES<T> - 1) / LANES<T>);
  const E* const at = b.data + j;
  if (vectors == TILE_VECTORS) tile<E, ROWS, TILE_VECTORS>(K, rows, lda, at, b.ld, ahead, step, first, last);
  else if (TILE_VECTORS == 3 && vectors == 2) tile<E, ROWS, 2>(K, rows, lda, at, b.ld, ahead, step, first, last);
  else tile<E, ROWS, 1>(K, rows, lda, at, b.ld, ahead, step, first, last);
}

// end(i, j, begin(i, j) + sum over k of A[k][i] B[k][j .. j + LANES]) for all i < M and all vectors that begin at
// j < N. B, and whatever begin and end touch, have their columns padded to whole vectors. begin is also asked for
// rows up to the next multiple of ROW_STEP.
template <class E, class Begin, class End>
inline void gemm(int64_t M, int64_t N, int64_t K, Left<E> a, Right<E> b, Begin begin, End end) {
#if defined(__AMX_BF16__)
  if constexpr (IS_PAIR<E>) return multiply_by_tiles(AmxTiles::ready(), M, N, K, a, b, begin, end);
#endif
  for (int64_t j = 0; j < N; j += TILE_COLUMNS<Sum<E>>) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= round_up(M, ROW_STEP); i += TILE_ROWS)
      tile_row<E, TILE_ROWS>(M, N, K, a, b, i, j, begin, end);
    if constexpr (TILE_ROWS == 12) {
      const int64_t left = round_up(M, ROW_STEP) - i;
      if (left == 8) tile_row<E, 8>(M, N, K, a, b, i, j, begin, end);
      if (left == 4) tile_row<E, 4>(M, N, K, a, b, i, j, begin, end);
    }
  }
}

}  // namespace itm_fast
