// Sets of rows of a tensor: a set is an image's regions or a caption's words. In attention the rows of one set are the
// queries, which attend to the rows of another, the contexts.
#pragma once
#include "pack.h"

namespace itm_fast {

// The sets of all images or all captions. Owns the bounds; the rows stay in the caller's tensor.
struct RowSets {
  Source source;
  int64_t D;                   // values of a row
  std::vector<int64_t> first;  // [sets] row of the tensor that a set begins with
  std::vector<int64_t> edge;   // [sets + 1] the sets' bounds when their rows are counted one after the other
  int64_t most = 0;            // rows of the largest set

  int64_t count() const { return int64_t(first.size()); }
  int64_t length(int64_t set) const { return edge[set + 1] - edge[set]; }
};

// The valid regions of images [I, R, D]; `lengths` may be null.
inline RowSets regions(Source image, int64_t I, int64_t R, int64_t D, const int64_t* lengths) {
  RowSets sets{image, D, std::vector<int64_t>(I), std::vector<int64_t>(I + 1)};
  for (int64_t i = 0; i < I; ++i) {
    sets.first[i] = i * R;
    sets.edge[i + 1] = sets.edge[i] + (lengths ? lengths[i] : R);
    sets.most = std::max(sets.most, sets.length(i));
  }
  return sets;
}

// The words [N, D] of T captions.
inline RowSets captions(Source words, int64_t T, int64_t D, const int64_t* cu_seqlens) {
  RowSets sets{words, D, {cu_seqlens, cu_seqlens + T}, {cu_seqlens, cu_seqlens + T + 1}};
  for (int64_t t = 0; t < T; ++t) sets.most = std::max(sets.most, sets.length(t));
  return sets;
}

// Some of the sets, in the order given.
inline RowSets chosen(const RowSets& sets, const std::vector<int64_t>& wanted) {
  RowSets some{sets.source, sets.D, {}, {0}};
  for (const int64_t set : wanted) {
    some.first.push_back(sets.first[size_t(set)]);
    some.edge.push_back(some.edge.back() + sets.length(set));
    some.most = std::max(some.most, sets.length(set));
  }
  return some;
}

// Every row of a tensor as a set of its own.
inline RowSets single_rows(Source source, int64_t count, int64_t D) {
  RowSets sets{source, D, std::vector<int64_t>(count), std::vector<int64_t>(count + 1), 1};
  for (int64_t k = 0; k < count; ++k) sets.first[k] = k, sets.edge[k + 1] = k + 1;
  return sets;
}

}  // namespace itm_fast
