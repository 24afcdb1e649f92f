// The pair scorers around a head in float64.
#include "similarity_score.h"

template void itm_fast::score<double, double>(const SimilarityGraphScoreCall&);
template void itm_fast::score<double, double>(const SimilarityFilterScoreCall&);
