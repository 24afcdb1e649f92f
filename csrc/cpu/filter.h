// Attention filtration over a chunk's nodes in evaluation: equations (1) to (4) of itm_fast/ops/similarity_filter.py.
//
// X is [S][nodes], a caption's nodes side by side. A node's gate is computed in its column. Sums over a caption's nodes
// start at the caption's own first column, with nodes along the lanes and for LANES features at once, so their order
// does not depend on the captions beside it. X is read twice, from the second cache.
#pragma once
#include "attention.h"
#include "calls/similarity_filter_score.h"
#include "shuffle.h"

namespace itm_fast {

// The parameters as Filter reads them, made once per call and shared by all threads. (1) and (2) are one operation: the
// projection's bias and BatchNorm's statistics fold into gate = sigmoid(scale w.x + shift).
template <class T>
struct FilterWeights {
  int64_t S;
  Buffer<T> weight;  // [S]
  T scale, shift;

  explicit FilterWeights(const SimilarityFilterScoreCall& c)
      : S(c.S), weight(S),
        scale(one(c.norm_weight, c.dtype) / std::sqrt(one(c.running_var, Dtype::FLOAT64) + T(c.eps))),
        shift((one(c.filter_bias, c.dtype) - one(c.running_mean, Dtype::FLOAT64)) * scale + one(c.norm_bias, c.dtype)) {
    Buffer<T> room(S);
    const T* from = read<T>({c.filter_weight, c.dtype}, 0, S, room);
    std::copy(from, from + S, static_cast<T*>(weight));
  }

 private:
  static T one(const void* data, Dtype dtype) {
    T room;
    return *read<T>({data, dtype}, 0, 1, &room);
  }
};

// One thread's scratch for the filtration of a chunk of captions' nodes, and the filtration itself.
template <class T>
class Filter {
 public:
  // Scratch for chunks of at most `nodes` nodes.
  Filter(const FilterWeights<T>& weights, int64_t nodes)
      : weights(weights), ld(padded<T>(nodes)), x(weights.S * ld), gate(ld), m(weights.S) {}

  // Where the caller puts X before every run: [S][stride()], columns edge[first] .. edge[last] - edge[first].
  T* nodes() { return x; }
  int64_t stride() const { return ld; }

  // z[t - first][0 .. S] of the captions first .. last of edge.
  void run(const int64_t* edge, int64_t first, int64_t last, T* z, int64_t ldz) {
    const int64_t origin = edge[first], columns = edge[last] - origin;
    int64_t j = 0;
    for (; j + 4 * LANES<T> <= columns; j += 4 * LANES<T>) gates<4>(j);
    for (; j < columns; j += LANES<T>) gates<1>(j);
    for (int64_t t = first; t < last; ++t, z += ldz)
      gather(edge[t] - origin, edge[t + 1] - edge[t], z);
  }

 private:
  // The gates of VECTORS vectors of nodes, from column j on.
  template <int VECTORS>
  void gates(int64_t j) const {
    Vec<T> a[VECTORS] = {};
    for (int64_t s = 0; s < weights.S; ++s)
      for (int v = 0; v < VECTORS; ++v) a[v] += load(x + j + s * ld + v * LANES<T>) * weights.weight[s];
    for (int v = 0; v < VECTORS; ++v)
      store(gate + j + v * LANES<T>, sigmoid<T>(a[v] * weights.scale + weights.shift));
  }

  // (3) and (4) for one caption of n nodes, whose first column is `begin`.
  void gather(int64_t begin, int64_t n, T* z) const {
    const T *nodes = x + begin, *g = gate + begin;
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
          v[r] += select<T>(own, load(nodes + least(s + r, S - 1) * ld + j) * beta, Vec<T>{});
      }
      const Vec<T> some = select<T>(inside<T>(s, 0, S), sums<T>(v), Vec<T>{});
      store(m + s, some);
      squares += some * some;
    }
    const T length = 1 / (std::sqrt(sum<T>(squares)) + T(EPS));
    for (int64_t s = 0; s < S; ++s) z[s] = m[s] * length;
  }

  const FilterWeights<T>& weights;
  const int64_t ld;
  Buffer<T> x, gate, m;
};

}  // namespace itm_fast
