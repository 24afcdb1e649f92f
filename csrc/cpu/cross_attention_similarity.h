// The arguments of cross_attention_similarity and of similarity_nodes, for their forward and backward passes, and how
// their results are written.
#pragma once
#include "calls/cross_attention_similarity.h"
#include "calls/similarity_nodes.h"
#include "shuffle.h"
#include "windows.h"
#include "write.h"

namespace itm_fast {

// The global vectors of images [I, D] and captions [T, D], with their own weight [S, D] and bias [S].
struct Globals {
  Source image, caption, weight, bias;

  explicit Globals(const SimilarityNodesCall& call)
      : image{call.image_global, call.dtype}, caption{call.caption_global, call.dtype},
        weight{call.global_weight, call.dtype}, bias{call.global_bias, call.dtype} {}
};

// Tensors of one dtype: image [I, R, D], words [cu_seqlens[T], D], weight [S, D], bias [S].
struct SimilarityProblem {
  RowSets images, captions;
  Source weight, bias;
  int64_t R, D, S;
  bool t2i;
  Norm norm;
  double scale;
  const Globals* globals = nullptr;  // t2i: a caption's rows begin with the similarity vector of the global ones

  explicit SimilarityProblem(const CrossAttentionSimilarityCall& call)
      : images(regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths)),
        captions(itm_fast::captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens)),
        weight{call.weight, call.dtype}, bias{call.bias, call.dtype}, R(call.R), D(call.D), S(call.S),
        t2i(call.direction == Direction::T2I), norm(call.affinity_norm), scale(call.scale) {}

  // The local similarity vectors of similarity_nodes; `globals` must outlive this.
  SimilarityProblem(const SimilarityNodesCall& call, const Globals& globals)
      : images(regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths)),
        captions(itm_fast::captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens)),
        weight{call.local_weight, call.dtype}, bias{call.local_bias, call.dtype}, R(call.R), D(call.D), S(call.S),
        t2i(true), norm(Norm::CLIPPED_L2NORM), scale(call.scale), globals(&globals) {}

  const RowSets& contexts() const { return t2i ? images : captions; }
  const RowSets& queries() const { return t2i ? captions : images; }

  // The row of the result that holds query `query`, an index as in queries().edge, of set `set` with a context set. The
  // result's rows are [I, N], with globals [I, N + T], or for i2t [I, T, R].
  int64_t row(int64_t context, int64_t set, int64_t query) const {
    if (!t2i) return (set * captions.count() + context) * R + query - images.edge[set];
    const int64_t row = context * captions.edge.back() + query;
    return globals ? row + context * captions.count() + set + 1 : row;
  }

  int64_t global_row(int64_t image, int64_t caption) const { return row(image, caption, captions.edge[caption]) - 1; }
};

// Where the similarity vectors go: as rows of S values in the inputs' dtype, and, unless null, 1 / (|y| + eps) of each.
struct Result {
  void* rows;
  void* inverse;
};

// Writes column j of a tile, for j < count, to row row(j) of the result. `room` holds TILE_COLUMNS rows of S values.
template <class T, class E, class Row>
void write_columns(const SimilarityTile<T, E>& tile, int64_t count, int64_t S, Dtype dtype, T* room, Result result,
                   Row row) {
  constexpr int64_t WIDE = TILE_COLUMNS<T>;
  for (int64_t j = 0; j < count; ++j) {
    if (j % WIDE == 0) transpose_by_squares<T>(tile.similar.at(0, j), WIDE, S, least(WIDE, count - j), room, S);
    T* y = room + j % WIDE * S;
    const int64_t at = row(j);
    write(result.rows, dtype, at * S, S, y, tile.inverse[j]);
    if (result.inverse) static_cast<T*>(result.inverse)[at] = tile.inverse[j];
  }
}

}  // namespace itm_fast
