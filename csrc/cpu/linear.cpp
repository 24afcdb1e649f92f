// x W^T + b, for projections of one image's or one caption's own vectors. Each element of the result is one chain of
// multiply-adds over the features, so that, unlike in BLAS, its bits depend on neither the rows beside it nor the
// number of threads.
//
// W is packed once, in panels of TILE_COLUMNS columns that stay in the second cache while they are multiplied; a thread
// owns ROWS rows of x and of the result at a time, and packs the former too (384 KB at K 1024 in float32).
#include "calls/linear.h"
#include "similarity.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t ROWS = 96;

template <class T>
void multiply(Source x, Source weight, Source bias, int64_t N, int64_t K, int64_t S, void* result, int64_t threads) {
  constexpr int64_t WIDE = Panels<T>::WIDE;
  const int64_t panels = (S + WIDE - 1) / WIDE, ld = panels * WIDE;
  const Panels<T> columns(S, K);
  Buffer<T> added(ld);
  if (bias.data) {
    Buffer<T> room(S);
    std::copy_n(read<T>(bias, 0, S, room), S, added + 0);
  }
  parallel(panels, threads, [&] {
    return [&](int64_t p) {
      pack_columns(weight, p * WIDE, least(WIDE, S - p * WIDE), K, columns.at(0, p * WIDE), WIDE);
    };
  });
  parallel((N + ROWS - 1) / ROWS, threads, [&] {
    return [&, room = Buffer<T>(ROWS * K), a = Buffer<T>(packed_size(ROWS, K)),
            out = Buffer<T>(ROWS * ld)](int64_t part) mutable {
      const int64_t first = part * ROWS, M = least(ROWS, N - first);
      const T* rows = read<T>(x, first * K, M * K, room);
      pack_rows(M, K, a + 0, [=](int64_t i, int64_t k) { return rows[i * K + k]; });
      for (int64_t p = 0; p < panels; ++p)
        gemm<T>(M, WIDE, K, {a, 0}, {columns.at(0, p * WIDE), WIDE},
                [&](int64_t, int64_t j) { return load(added + p * WIDE + j); },
                [&](int64_t i, int64_t j, Vec<T> c) { store(out + i * ld + p * WIDE + j, c); });
      for (int64_t i = 0; i < M; ++i) write<T>(result, x.dtype, (first + i) * S, S, out + i * ld, T(1));
    };
  });
}

}  // namespace
}  // namespace itm_fast

// Writes product [N, S] = x W^T + b, of x [N, K], weight [S, K] and bias [S] (or null), in the dtype of the tensors.
extern "C" const char* linear(const itm_fast::LinearCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Source x{call.x, call.dtype}, weight{call.weight, call.dtype}, bias{call.bias, call.dtype};
    if (call.dtype == Dtype::FLOAT64)
      multiply<double>(x, weight, bias, call.N, call.K, call.S, call.product, call.threads);
    else multiply<float>(x, weight, bias, call.N, call.K, call.S, call.product, call.threads);
  });
}
