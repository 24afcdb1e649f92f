// The arguments of similarity_nodes_of_pairs, for its forward and backward passes: similarity_nodes of a list of pairs.
#pragma once
#include "calls/similarity_nodes_of_pairs.h"
#include "cross_attention_similarity.h"

namespace itm_fast {

// Consecutive pairs of one image, whose captions' words are the columns of one tile.
struct Run {
  int64_t image, first, last;  // pairs
  std::vector<int64_t> edge;   // [last - first + 1] bounds of the pairs' words in the tile

  int64_t sets() const { return last - first; }
  int64_t columns() const { return edge.back(); }
};

// B pairs, sorted by image; pair k's nodes are the rows bounds[k] .. bounds[k + 1] of the nodes.
struct SimilarityPairs {
  const int64_t *caption, *bounds;
  int64_t count;
  std::vector<std::vector<Run>> images;  // the runs of every image that has pairs
  int64_t widest = 0, most = 0;          // columns and pairs of a run

  explicit SimilarityPairs(const SimilarityNodesOfPairsCall& call)
      : caption(call.pair_caption), bounds(call.pair_bounds), count(call.B) {
    constexpr int64_t COLUMNS = CHUNK_BYTES / int64_t(sizeof(float));
    for (int64_t k = 0; k < count; ++k) {
      const int64_t image = call.pair_image[k], words = bounds[k + 1] - bounds[k] - 1;
      if (images.empty() || images.back().back().image != image) images.emplace_back();
      std::vector<Run>& runs = images.back();
      if (runs.empty() || runs.back().columns() + words > COLUMNS) runs.push_back({image, k, k, {0}});
      Run& run = runs.back();
      run.last = k + 1;
      run.edge.push_back(run.columns() + words);
      widest = std::max(widest, run.columns());
      most = std::max(most, run.sets());
    }
  }

  // The row of the nodes that holds each column of a run.
  std::vector<int64_t> rows(const Run& run) const {
    std::vector<int64_t> result;
    for (int64_t k = run.first; k < run.last; ++k)
      for (int64_t row = bounds[k] + 1; row < bounds[k + 1]; ++row) result.push_back(row);
    return result;
  }
};

// A thread's columns of a run, and of its captions' global vectors.
template <class T>
struct RunColumns {
  Panels<T> words, captions;

  RunColumns(const SimilarityPairs& p, int64_t D) : words(p.widest, D), captions(p.most, D) {}

  void read(const SimilarityPairs& p, const Run& run, const RowSets& from) {
    for (int64_t k = 0; k < run.sets(); ++k) {
      const int64_t caption = p.caption[run.first + k];
      words.read(from.source, from.first[caption], from.length(caption), from.D, run.edge[k]);
    }
  }
};

}  // namespace itm_fast
