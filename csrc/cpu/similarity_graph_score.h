// SGR's pair score in one dtype: equations (1) to (3) of itm_fast/ops/similarity_graph_score.py.
#pragma once
#include "graph.h"
#include "pair_score.h"

namespace itm_fast {

// T: what sums are kept in; E: what products multiply, T or pairs of bfloat16 values.
template <class T, class E = T>
void score_graphs(const SimilarityGraphScoreCall& call) {
  const GraphWeights<T, E> weights(call);
  score_pairs<T, E>(PairScore(call),
                    [&](int64_t nodes, int64_t longest) { return Graph<T, E>(weights, nodes, longest); });
}

// Compiled in a file of its own, similarity_graph_score_float64.cpp, or an edit would wait for it too.
extern template void score_graphs<double>(const SimilarityGraphScoreCall&);

}  // namespace itm_fast
