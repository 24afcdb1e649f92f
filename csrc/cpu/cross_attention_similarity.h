// What the forward and the backward pass of cross_attention_similarity are asked for.
#pragma once
#include "sets.h"
#include "shuffle.h"

namespace itm_fast {

// Tensors of one dtype: image [I, R, D], words [cu_seqlens[T], D], weight [S, D], bias [S].
struct SimilarityProblem {
  RowSets images, captions;
  Source weight, bias;
  int64_t R, D, S;
  bool t2i;
  int64_t norm;
  double scale;

  SimilarityProblem(const void* image, const void* words, const void* weight, const void* bias, int64_t dtype,
                    int64_t I, int64_t R, int64_t D, int64_t T, int64_t S, const int64_t* cu_seqlens,
                    const int64_t* region_lengths, bool t2i, int64_t norm, double scale)
      : images(regions({image, dtype}, I, R, region_lengths)),
        captions(itm_fast::captions({words, dtype}, T, cu_seqlens)), weight{weight, dtype}, bias{bias, dtype}, R(R),
        D(D), S(S), t2i(t2i), norm(norm), scale(scale) {}

  const RowSets& contexts() const { return t2i ? images : captions; }
  const RowSets& queries() const { return t2i ? captions : images; }

  // The result's row of a query, counted as queries().edge counts, of set `set` with a context set: rows [I, N] or
  // [I, T, R].
  int64_t row(int64_t context, int64_t set, int64_t query) const {
    if (t2i) return context * captions.edge.back() + query;
    return (set * captions.count() + context) * R + query - images.edge[set];
  }
};

}  // namespace itm_fast
