// SGR's pair score in float64.
#include "similarity_graph_score.h"

template void itm_fast::score_graphs<double>(const SimilarityGraphScoreCall&);
