// similarity_graph_score and similarity_filter_score: SGRAF's pair scores, (1) to (3) of
// itm_fast/ops/similarity_score.py. Tiles and scratch: similarity_score.h.
#include "similarity_score.h"

namespace itm_fast {

// Compiled in files of their own, which takes as long as this one: similarity_score_float64.cpp and _bfloat16.cpp.
extern template void graph_scores<double, double>(const PairScore&, const GraphWeights<double>&, KeptNodes<double>);
extern template void score<double, double>(const SimilarityFilterScoreCall&);
#if defined(__AVX512BF16__)
extern template void graph_scores<float, Pair>(const PairScore&, const GraphWeights<float, Pair>&, KeptNodes<float>);
extern template void score<float, Pair>(const SimilarityFilterScoreCall&);
#endif

namespace {

template <class Call>
const char* guarded_score(const Call& call) {
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return score<double, double>(call);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return score<float, Pair>(call);
#endif
    score<float, float>(call);
  });
}

}  // namespace
}  // namespace itm_fast

// All write score [I, T] in the dtype of the tensors; shapes: calls/, who owns what: calls.cpp.
extern "C" const char* similarity_graph_score(const itm_fast::SimilarityGraphScoreCall& call) {
  return itm_fast::guarded_score(call);
}

// Writes nodes and inverse of the first kept[0] images too, float, or double if the tensors are double.
extern "C" const char* similarity_graph_score_kept(const itm_fast::SimilarityGraphScoreKeptCall& call) {
  return itm_fast::guarded_score(call);
}

extern "C" const char* similarity_filter_score(const itm_fast::SimilarityFilterScoreCall& call) {
  return itm_fast::guarded_score(call);
}
