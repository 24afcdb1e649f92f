// Backward of similarity_graph: (4) to (7) of itm_fast/ops/similarity_graph.py; and of the scores made of its results.
//
// A part is one image with one chunk of captions, and its rows of d nodes belong to it alone. A thread owns one group
// of parts at a time. Where gradients of the weights are wanted there are at most 16 groups: the gradients are summed
// over the parts of a group, and then over the groups in order, so that the number of threads changes no bit. Scratch:
// 2 (S + 1) S values a step and group, at most 40 MiB in all unless four groups need more; 2 MiB + 0.7 MiB a step and
// thread (S 256), and n^2 values a step and thread for the longest caption.
#include <optional>

#include "graph_backward.h"

namespace itm_fast {
namespace {

constexpr int64_t GROUPS = 16, FEWEST_GROUPS = 4, GROUP_BYTES = int64_t(40) << 20;

// (7), from the sums over all pairs to the gradients of the parameters.
template <class T>
void fold(const GraphGradient& p, int64_t ld, const Sums<T>& sums) {
  const int64_t S = p.S;
  Buffer<T> query(S * ld), key(S * ld), turned(S * ld), rows(S * ld), room(S * S);
  for (int64_t step = 0; step < p.steps; ++step) {
    const T *dM = sums.M + step * S * ld, *du = sums.shift + step * ld;
    T *d_query = static_cast<T*>(p.d_query_weight) + step * S * S, *d_bias = static_cast<T*>(p.d_query_bias) + step * S,
      *d_key = static_cast<T*>(p.d_key_weight) + step * S * S;
    transpose_by_squares<T>(read<T>(p.key_weight, step * S * S, S * S, room), S, S, S, key, ld);
    for (int64_t b = 0; b < S; ++b)
      for (int64_t o = 0; o < S; ++o) d_bias[o] += key[b * ld + o] * du[b];
    transpose_by_squares<T>(dM, ld, S, S, turned, ld);
    gemm(S, S, S, Left<T>{key, ld}, Right<T>{turned, ld}, nothing<T>, put<T>(rows, ld));
    for (int64_t o = 0; o < S; ++o) std::copy_n(rows + o * ld, S, d_query + o * S);
    transpose_by_squares<T>(read<T>(p.query_weight, step * S * S, S * S, room), S, S, S, query, ld);
    gemm(S, S, S, Left<T>{query, ld}, Right<T>{dM, ld}, nothing<T>, put<T>(rows, ld));
    const T* bias = read<T>(p.query_bias, step * S, S, room);
    for (int64_t o = 0; o < S; ++o)
      for (int64_t b = 0; b < S; ++b) d_key[o * S + b] = rows[o * ld + b] + bias[o] * du[b];
    for (int64_t o = 0; o < S; ++o)
      std::copy_n(sums.value + (step * S + o) * ld, S, static_cast<T*>(p.d_value_weight) + (step * S + o) * S);
    std::copy_n(sums.bias + step * ld, S, static_cast<T*>(p.d_value_bias) + step * S);
  }
}

template <class T, class E = T>
void backward(const GraphGradient& p) {
  const Turned<T, E> turned(p);
  const int64_t ld = turned.forward.ld;
  const std::vector<Chunk> pieces = chunks(p.cu_seqlens, p.T, GRAPH_NODES);
  int64_t most = 0, longest = 0;
  for (const Chunk& c : pieces) most = std::max(most, c.rows);
  for (int64_t t = 0; t < p.T; ++t) longest = std::max(longest, p.cu_seqlens[t + 1] - p.cu_seqlens[t]);
  const int64_t count = int64_t(pieces.size()), parts = p.I * count;
  const bool summed = p.d_query_weight != nullptr;
  const int64_t fit = GROUP_BYTES / (2 * p.steps * (p.S + 1) * ld * int64_t(sizeof(T)));
  const int64_t groups = summed ? least(parts, least(GROUPS, std::max(FEWEST_GROUPS, fit))) : parts;
  std::vector<std::optional<Sums<T>>> sums(summed ? groups : 0);  // each made by the thread that takes the group
  parallel(groups, p.threads, [&] {
    return [&, walk = Walk<T, E>(p, turned, most, longest)](int64_t group) mutable {
      if (summed) sums[group].emplace(p.steps, p.S, ld);
      for (int64_t part = parts * group / groups; part < parts * (group + 1) / groups; ++part)
        walk.run(part / count, pieces[size_t(part % count)], summed ? &*sums[group] : nullptr);
    };
  });
  if (sums.empty()) return;
  Sums<T>& all = *sums[0];
  parallel(p.steps * p.S, p.threads, [&] {
    return [&](int64_t row) {
      for (int64_t g = 1; g < groups; ++g) all.add_row(*sums[g], row * ld, ld);
    };
  });
  for (int64_t g = 1; g < groups; ++g) all.add_rest(*sums[g], p.steps * ld, p.S);
  fold<T>(p, ld, all);
  if (!p.score_weight.data) return;
  for (int64_t s = 0; s < p.S; ++s) static_cast<T*>(p.d_score_weight)[s] = T(all.score_weight[s]);
  *static_cast<T*>(p.d_score_bias) = T(all.score_bias);
}

template <class Call>
const char* guarded_backward(const Call& call) {
  return guarded([&] {
    const GraphGradient p(call);
    if (call.dtype == Dtype::FLOAT64) return backward<double>(p);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return backward<float, Pair>(p);
#endif
    backward<float>(p);
  });
}

}  // namespace
}  // namespace itm_fast

// Writes d_nodes [I, M, S] in the dtype of the nodes, unless null. Adds to the gradients of the parameters, which are
// all null or hold zeros, float, or double if the nodes are double; that of the key bias is zero and stays so. grad has
// the shape and dtype of z.
extern "C" const char* similarity_graph_backward(const itm_fast::SimilarityGraphCall& call) {
  return itm_fast::guarded_backward(call);
}

// The same of the scores that score_weight and score_bias make of z, whose gradients follow too; z is computed again.
// d_nodes may be where the nodes are; it is the gradient of y, of which `inverse` is 1 / (|y| + eps).
extern "C" const char* similarity_graph_head_backward(const itm_fast::SimilarityGraphHeadCall& call) {
  return itm_fast::guarded_backward(call);
}
