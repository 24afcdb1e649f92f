// What the forward and the backward pass of cross_attention_similarity and of similarity_nodes are asked for.
#pragma once
#include "windows.h"
#include "shuffle.h"

namespace itm_fast {

// The global vectors of images [I, D] and captions [T, D], with their own weight [S, D] and bias [S].
struct Globals {
  Source image, caption, weight, bias;
};

// Tensors of one dtype: image [I, R, D], words [cu_seqlens[T], D], weight [S, D], bias [S].
struct SimilarityProblem {
  RowSets images, captions;
  Source weight, bias;
  int64_t R, D, S;
  bool t2i;
  int64_t norm;
  double scale;
  const Globals* globals = nullptr;  // t2i: a caption's rows begin with the similarity vector of the global ones

  SimilarityProblem(const void* image, const void* words, const void* weight, const void* bias, int64_t dtype,
                    int64_t I, int64_t R, int64_t D, int64_t T, int64_t S, const int64_t* cu_seqlens,
                    const int64_t* region_lengths, bool t2i, int64_t norm, double scale)
      : images(regions({image, dtype}, I, R, D, region_lengths)),
        captions(itm_fast::captions({words, dtype}, T, D, cu_seqlens)), weight{weight, dtype}, bias{bias, dtype}, R(R),
        D(D), S(S), t2i(t2i), norm(norm), scale(scale) {}

  const RowSets& contexts() const { return t2i ? images : captions; }
  const RowSets& queries() const { return t2i ? captions : images; }

  // The result's row of a query, counted as queries().edge counts, of set `set` with a context set: rows [I, N], with
  // globals [I, N + T], or [I, T, R].
  int64_t row(int64_t context, int64_t set, int64_t query) const {
    if (!t2i) return (set * captions.count() + context) * R + query - images.edge[set];
    const int64_t row = context * captions.edge.back() + query;
    return globals ? row + context * captions.count() + set + 1 : row;
  }

  int64_t global_row(int64_t image, int64_t caption) const { return row(image, caption, captions.edge[caption]) - 1; }
};

}  // namespace itm_fast
