// Linear layers over columns: y = W x + b for x [K][ld], one column per row of a tensor.
#pragma once
#include "pack.h"

namespace itm_fast {

constexpr int64_t LAYER_BYTES = 256 << 10;  // of W's rows that are multiplied at a time: they stay in the second cache

// The tensor whose values begin `values` later in the same memory.
inline Source after(Source s, int64_t values) {
  const int64_t size = s.dtype == Dtype::FLOAT64 ? 8 : s.dtype == Dtype::FLOAT32 ? 4 : 2;
  return {static_cast<const char*>(s.data) + values * size, s.dtype};
}

// W [S, K] and b [S], packed as the left side of products. Made once per call, shared by all threads.
template <class T>
struct Layer {
  int64_t S, K, step;  // step: rows of W at a time
  Buffer<T> weight, bias;

  Layer(Source w, Source b, int64_t S, int64_t K)
      : S(S), K(K), step(std::max<int64_t>(1, LAYER_BYTES / (TILE_ROWS * K * int64_t(sizeof(T)))) * TILE_ROWS),
        weight(packed_size(S, K)), bias(round_up(S, ROW_STEP)) {
    Buffer<T> room(std::max(S, S * K));
    const T* rows = read<T>(w, 0, S * K, room);
    pack_rows(S, K, weight + 0, [=](int64_t s, int64_t k) { return rows[s * K + k]; });
    std::copy_n(read<T>(b, 0, S, room), S, bias + 0);
  }

  // end(s, j, values) gets y's row s, columns j .. j + LANES, of x [K][ld].
  template <class End>
  void apply(const T* x, int64_t ld, int64_t columns, End end) const {
    for (int64_t first = 0; first < S; first += step)
      gemm<T>(least(step, S - first), columns, K, {weight + first * K, 0}, {x, ld},
              [=, this](int64_t s, int64_t) { return splat(bias[first + s]); },
              [=](int64_t s, int64_t j, Vec<T> y) { end(first + s, j, y); });
  }
};

}  // namespace itm_fast
