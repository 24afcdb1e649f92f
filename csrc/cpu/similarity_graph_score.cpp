// similarity_graph_score: SGR's pair score, (1) to (3) of itm_fast/ops/similarity_graph_score.py. Tiles and scratch:
// pair_score.h and graph.h.
#include "similarity_graph_score.h"

extern "C" const char* similarity_graph_score(const itm_fast::SimilarityGraphScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return score_graphs<double>(call);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return score_graphs<float, Pair>(call);
#endif
    score_graphs<float>(call);
  });
}
