// similarity_graph_score: SGR's pair score, (1) to (3) of itm_fast/ops/similarity_graph_score.py. Tiles and scratch:
// pair_score.h and graph.h.
#include "graph.h"
#include "pair_score.h"

namespace itm_fast {
namespace {

template <class T, class E = T>
void forward(const PairScore& p, int64_t steps, const Source (&parameter)[5]) {
  const GraphWeights<T, E> weights(p.S, steps, parameter[0], parameter[1], parameter[2], parameter[3], parameter[4]);
  score_pairs<T, E>(p, [&](int64_t nodes, int64_t longest) { return Graph<T, E>(weights, nodes, longest); });
}

}  // namespace
}  // namespace itm_fast

// Tensors of one dtype: image [I, R, D], image_global [I, D], words [cu_seqlens[T], D], caption_global [T, D], weights
// [S, D], biases [S]; query, key and value weights [K, S, S], biases [K, S]; score_weight [S]; score [I, T].
// bfloat16: products of bfloat16 values may be used, where the processor has them.
extern "C" const char* similarity_graph_score(
    const void* image, const void* image_global, const void* words, const void* caption_global, const void* local_weight,
    const void* local_bias, const void* global_weight, const void* global_bias, const void* query_weight,
    const void* query_bias, const void* key_weight, const void* value_weight, const void* value_bias,
    const void* score_weight, const void* score_bias, const int64_t* cu_seqlens, const int64_t* region_lengths, void* score,
    int64_t dtype, int64_t I, int64_t R, int64_t T, int64_t D, int64_t S, int64_t K, double scale,
    [[maybe_unused]] int64_t bfloat16, int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const auto s = [&](const void* data) { return Source{data, dtype}; };
    const PairScore p{s(image), s(image_global), s(words), s(caption_global), s(local_weight), s(local_bias),
                      s(global_weight), s(global_bias), s(score_weight), s(score_bias), cu_seqlens, region_lengths, score,
                      I, R, T, D, S, scale, threads};
    const Source parameter[5] = {s(query_weight), s(query_bias), s(key_weight), s(value_weight), s(value_bias)};
    if (dtype == FLOAT64) return forward<double>(p, K, parameter);
#if defined(__AVX512BF16__)
    if (bfloat16) return forward<float, Pair>(p, K, parameter);
#endif
    forward<float>(p, K, parameter);
  });
}
