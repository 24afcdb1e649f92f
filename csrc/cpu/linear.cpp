// y = x W^T + b, for projections of one image's or one caption's own vectors, and its gradients
//
//     d x = d y W,   d W = d y^T x,   d b = sum of the rows of d y.
//
// Each element of a result is one chain of multiply-adds, so that, unlike in BLAS, its bits depend on neither the rows
// beside it nor the number of threads. E is what the products multiply: T, or pairs of bfloat16 values with sums in
// float32.
//
// A product's right side is packed first, in panels of TILE_COLUMNS columns that stay in the second cache while they
// are multiplied. Then a thread owns ROWS rows of the left side and of the result at a time, and packs the former too
// (384 KB at K 1024 in float32). d W sums over all rows of x, which are taken DEPTH at a time.
#include "calls/linear.h"
#include "cross_attention_score_backward.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t ROWS = 96, DEPTH = 1024;

// m rows of A times a panel of B, columns j and on of N. Sums start from rows `begin_step` apart and go to rows `step`
// apart.
template <class E, class T = Sum<E>>
void multiply(int64_t m, int64_t j, int64_t N, int64_t K, const E* a, const E* panel, const T* begin,
              int64_t begin_step, T* out, int64_t step) {
  gemm<E>(m, least(TILE_COLUMNS<T>, N - j), K, {a, 0}, {panel, TILE_COLUMNS<T>},
          [=](int64_t i, int64_t k) { return head(begin + least(i, m - 1) * begin_step + j + k, N - j - k); },
          [=](int64_t i, int64_t k, Vec<T> v) {
            store_head(out + i * step + j + k, v, least(LANES<T>, N - j - k));
          });
}

// out = begin + A B for M rows and N columns over K values, or pairs; `begin` is one row for all, or null for what is
// in `out`. Each thread makes functions that pack: right(j, n, to) columns j .. j + n of B as [K][TILE_COLUMNS], and
// left(i, n, to) rows i .. i + n of A as gemm.h's Left wants them.
template <class E, class T = Sum<E>, class MakeRight, class MakeLeft>
void product(int64_t M, int64_t N, int64_t K, int64_t threads, MakeRight make_right, MakeLeft make_left,
             const T* begin, void* out, Dtype dtype) {
  constexpr int64_t WIDE = TILE_COLUMNS<T>;
  const int64_t panels = (N + WIDE - 1) / WIDE, size = K * WIDE;
  T* const direct = dtype == DTYPE<T> ? static_cast<T*>(out) : nullptr;
  const Buffer<E> right = Buffer<E>::zeros(panels * size, threads);
  parallel(panels, threads, [&] {
    return [&, pack = make_right()](int64_t p) mutable { pack(p * WIDE, least(WIDE, N - p * WIDE), right + p * size); };
  });
  parallel((M + ROWS - 1) / ROWS, threads, [&] {
    return [&, pack = make_left(), left = Buffer<E>(packed_size(ROWS, K)),
            room = Buffer<T>(direct ? 0 : ROWS * N)](int64_t part) mutable {
      const int64_t first = part * ROWS, m = least(ROWS, M - first);
      T* const to = direct ? direct + first * N : room + 0;
      pack(first, m, left + 0);
      for (int64_t p = 0; p < panels; ++p)
        multiply<E, T>(m, p * WIDE, N, K, left, right + p * size, begin ? begin : to, begin ? 0 : N, to, N);
      if (!direct) write<T>(out, dtype, first * N, m * N, to, T(1));
    };
  });
}

template <class T, class E>
struct Linear {
  const LinearCall& call;
  const Source x, weight, bias, grad;
  const int64_t N, K, S;

  explicit Linear(const LinearCall& c)
      : call(c), x{c.x, c.dtype}, weight{c.weight, c.dtype}, bias{c.bias, c.dtype}, grad{c.grad, c.dtype}, N(c.N),
        K(c.K), S(c.S) {}

  void forward() const {
    Buffer<T> added(S), room(S);
    if (bias.data) std::copy_n(read<T>(bias, 0, S, room), S, added + 0);
    product<E>(
        N, S, depth<E>(K), call.threads, [this] { return columns(weight, K); }, [this] { return rows(x, K); },
        static_cast<const T*>(added), call.product, x.dtype);
  }

  // Adds to the gradients that are wanted.
  void backward() const {
    constexpr const T* sum = nullptr;
    if (call.d_x)
      product<E>(
          N, K, depth<E>(S), call.threads, [this] { return features(weight, 0, S); },
          [this] { return rows(grad, S); }, sum, call.d_x, DTYPE<T>);
    for (int64_t k = 0; call.d_weight && k < N; k += DEPTH) {
      const int64_t n = least(DEPTH, N - k);
      product<E>(
          S, K, depth<E>(round_up(n, ROW_STEP)), call.threads, [=, this] { return features(x, k, n); },
          [=, this] { return turned(k, n); }, sum, call.d_weight, DTYPE<T>);
    }
    if (T* const sums = static_cast<T*>(call.d_bias)) {
      Buffer<T> room(S);
      Buffer<double> all(S);
      for (int64_t i = 0; i < N; ++i) {
        const T* const row = read<T>(grad, i * S, S, room);
        for (int64_t s = 0; s < S; ++s) all[s] += double(row[s]);
      }
      for (int64_t s = 0; s < S; ++s) sums[s] += T(all[s]);
    }
  }

  // Rows of D values as columns of B.
  static auto columns(Source source, int64_t D) {
    return [=, room = Buffer<T>(TILE_COLUMNS<T> * D),
            pairs = Buffer<T>(IS_PAIR<E> ? TILE_COLUMNS<T> * paired_size<T>(D) : 0)](int64_t j, int64_t n, E* out) {
      const T* row[TILE_COLUMNS<T>];
      for (int64_t r = 0; r < n; ++r) row[r] = read<T>(source, (j + r) * D, D, room + r * D);
      pack_panel(row, n, D, out, TILE_COLUMNS<T>, pairs + 0);
    };
  }
  // `count` rows of K values from `first` on as rows of B.
  auto features(Source source, int64_t first, int64_t count) const {
    return [=, D = K, room = Buffer<T>(count * TILE_COLUMNS<T>), row = std::vector<const T*>(size_t(count))](
               int64_t j, int64_t n, E* out) mutable {
      for (int64_t r = 0; r < count; ++r)
        row[size_t(r)] = read<T>(source, (first + r) * D + j, n, room + r * TILE_COLUMNS<T>);
      feature_panels(row.data(), count, n, out, count);
    };
  }
  // Rows of D values as rows of A.
  static auto rows(Source source, int64_t D) {
    return [=, room = Buffer<T>(ROWS * D), pairs = Buffer<T>(IS_PAIR<E> ? TILE_ROWS * paired_size<T>(D) : 0)](
               int64_t i, int64_t n, E* out) {
      pack_left<T, E>(read<T>(source, i * D, n * D, room), D, n, D, out, depth<E>(D), 0, pairs);
    };
  }
  // Columns of `count` rows of the result's gradient, from `first` on, as rows of A.
  auto turned(int64_t first, int64_t count) const {
    return [=, from = grad, step = S, room = Buffer<T>(count * ROWS), block = Buffer<T>(count * ROWS)](
               int64_t i, int64_t n, E* out) {
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(read<T>(from, (first + r) * step + i, n, room), n, block + r * ROWS);
      pack_turned<T, E>(block, ROWS, count, n, out, depth<E>(round_up(count, ROW_STEP)), 0);
    };
  }
};

template <class Run>
const char* with_types(const LinearCall& call, Run run) {
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return run(Linear<double, double>(call));
#if defined(__AVX512BF16__)
    if (call.bfloat16) return run(Linear<float, Pair>(call));
#endif
    run(Linear<float, float>(call));
  });
}

}  // namespace
}  // namespace itm_fast

// Writes product [N, S] = x W^T + b, of x [N, K], weight [S, K] and bias [S] (or null), in the dtype of the tensors.
extern "C" const char* linear(const itm_fast::LinearCall& call) {
  return itm_fast::with_types(call, [](const auto& linear) { linear.forward(); });
}

// Adds to d_x, d_weight and d_bias, each unless null: float, or double if the tensors are double.
extern "C" const char* linear_backward(const itm_fast::LinearCall& call) {
  return itm_fast::with_types(call, [](const auto& linear) { linear.backward(); });
}
