// The pair scorers around a head with products of bfloat16 values, on processors that have them.
#include "similarity_score.h"

#if defined(__AVX512BF16__)
template void itm_fast::score<float, itm_fast::Pair>(const SimilarityGraphScoreCall&);
template void itm_fast::score<float, itm_fast::Pair>(const SimilarityFilterScoreCall&);
#endif
