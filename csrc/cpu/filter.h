// Attention filtration over a chunk's nodes in evaluation: equations (1) to (4) of itm_fast/ops/similarity_filter.py.
//
// X is [S][nodes], a caption's nodes side by side. A node's gate is computed in its column; the sums over a caption's
// nodes run along the lanes from the caption's own first column on, for LANES features at once. X is read twice, from
// the second cache. Each thread has a Filter of its own; the weights are shared.
#pragma once
#include "attention.h"
#include "shuffle.h"

namespace itm_fast {

// (1) and (2) in one: the projection's bias and BatchNorm's statistics fold into gate = sigmoid(scale w.x + shift).
template <class T>
struct FilterWeights {
  int64_t S;
  Buffer<T> weight;  // [S]
  T scale, shift;

  FilterWeights(int64_t S, Source weights, T bias, T norm_weight, T norm_bias, T mean, T var, T eps)
      : S(S), weight(S), scale(norm_weight / std::sqrt(var + eps)), shift((bias - mean) * scale + norm_bias) {
    Buffer<T> room(S);
    const T* from = read<T>(weights, 0, S, room);
    std::copy(from, from + S, static_cast<T*>(weight));
  }
};

template <class T>
class Filter {
 public:
  // Scratch for chunks of at most `nodes` nodes.
  Filter(const FilterWeights<T>& weights, int64_t nodes) : weights(weights), gate(padded<T>(nodes)), m(weights.S) {}

  // z[t - first][0 .. S] of the captions first .. last; X's columns are edge[first] .. edge[last] - edge[first].
  void run(const T* x, int64_t ld, const int64_t* edge, int64_t first, int64_t last, T* z, int64_t ldz) {
    const int64_t origin = edge[first], columns = edge[last] - origin;
    int64_t j = 0;
    for (; j + 4 * LANES<T> <= columns; j += 4 * LANES<T>) gates<4>(x + j, ld, gate + j);
    for (; j < columns; j += LANES<T>) gates<1>(x + j, ld, gate + j);
    for (int64_t t = first; t < last; ++t, z += ldz)
      gather(x + (edge[t] - origin), ld, gate + (edge[t] - origin), edge[t + 1] - edge[t], z);
  }

 private:
  template <int VECTORS>
  void gates(const T* x, int64_t ld, T* to) const {
    Vec<T> a[VECTORS] = {};
    for (int64_t s = 0; s < weights.S; ++s)
      for (int v = 0; v < VECTORS; ++v) a[v] += load(x + s * ld + v * LANES<T>) * weights.weight[s];
    for (int v = 0; v < VECTORS; ++v)
      store(to + v * LANES<T>, sigmoid<T>(a[v] * weights.scale + weights.shift));
  }

  // (3) and (4) for one caption of n nodes; g is read from its own first gate on.
  void gather(const T* x, int64_t ld, const T* g, int64_t n, T* z) const {
    Vec<T> all{};
    for (int64_t j = 0; j < n; j += LANES<T>) all += select<T>(inside<T>(j, 0, n), load(g + j), Vec<T>{});
    const T share = 1 / (sum<T>(all) + T(EPS));
    Vec<T> squares{};
    const int64_t S = weights.S;
    for (int64_t s = 0; s < S; s += LANES<T>) {
      Vec<T> v[LANES<T>] = {};
      for (int64_t j = 0; j < n; j += LANES<T>) {
        const Vec<T> beta = load(g + j) * share;
        const Vec<Int<T>> own = inside<T>(j, 0, n);
#pragma GCC unroll 16
        for (int r = 0; r < LANES<T>; ++r)
          v[r] += select<T>(own, load(x + least(s + r, S - 1) * ld + j) * beta, Vec<T>{});
      }
      const Vec<T> some = select<T>(inside<T>(s, 0, S), sums<T>(v), Vec<T>{});
      store(m + s, some);
      squares += some * some;
    }
    const T length = 1 / (std::sqrt(sum<T>(squares)) + T(EPS));
    for (int64_t s = 0; s < S; ++s) z[s] = m[s] * length;
  }

  const FilterWeights<T>& weights;
  Buffer<T> gate, m;
};

}  // namespace itm_fast
