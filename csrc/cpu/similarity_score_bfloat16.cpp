// The pair scorers around a head with products of bfloat16 values, on processors that have them.
#include "similarity_score.h"

#if defined(__AVX512BF16__)
namespace itm_fast {
template void graph_scores<float, Pair>(const PairScore&, const GraphWeights<float, Pair>&, KeptNodes<float>);
template void score<float, Pair>(const SimilarityFilterScoreCall&);
}  // namespace itm_fast
#endif
