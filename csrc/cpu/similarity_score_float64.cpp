// The pair scorers around a head in float64.
#include "similarity_score.h"

namespace itm_fast {
template void graph_scores<double, double>(const PairScore&, const GraphWeights<double>&, KeptNodes<double>);
template void score<double, double>(const SimilarityFilterScoreCall&);
}  // namespace itm_fast
