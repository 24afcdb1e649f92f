// similarity_graph_score: SGR's pair score, (1) to (3) of itm_fast/ops/similarity_graph_score.py. Tiles and scratch:
// pair_score.h and graph.h.
#include "graph.h"
#include "pair_score.h"

namespace itm_fast {
namespace {

template <class T, class E = T>
void forward(const SimilarityGraphScoreCall& call) {
  const GraphWeights<T, E> weights(call);
  score_pairs<T, E>(PairScore(call),
                    [&](int64_t nodes, int64_t longest) { return Graph<T, E>(weights, nodes, longest); });
}

}  // namespace
}  // namespace itm_fast

extern "C" const char* similarity_graph_score(const itm_fast::SimilarityGraphScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return forward<double>(call);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return forward<float, Pair>(call);
#endif
    forward<float>(call);
  });
}
