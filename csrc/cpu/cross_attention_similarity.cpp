// Forward of cross_attention_similarity: (1) to (3) of itm_fast/ops/cross_attention_similarity.py.
//
// A window of chunks of queries is packed once for all threads; a thread then owns one set of contexts at a time and
// passes through some of the window's chunks with it. Tile and caches: similarity.h. Scratch: the window, 16 MiB (one
// chunk if that is more), W, and per thread one tile, 1.1 MiB at R 36, D 1024 and S 256.
#include "cross_attention_similarity.h"
#include "write.h"

namespace itm_fast {
namespace {

// Similarity vectors of a chunk as rows of the result, those of regions that an image has not as zeros.
template <class T, class E>
void write_rows(const SimilarityProblem& p, const Chunk& chunk, int64_t context, const SimilarityTile<T, E>& tile,
                T* room, void* result) {
  constexpr int64_t WIDE = TILE_COLUMNS<T>;
  const int64_t S = p.S, dtype = p.weight.dtype;
  int64_t set = chunk.first;
  for (int64_t j = 0; j < chunk.rows; ++j) {
    if (j % WIDE == 0) transpose_by_squares<T>(tile.similar.at(0, j), WIDE, S, least(WIDE, chunk.rows - j), room, S);
    T* y = room + j % WIDE * S;
    const int64_t column = chunk.begin + j;
    if (column == p.queries().edge[set + 1]) ++set;
    int64_t row = p.row(context, set, column);
    write(result, dtype, row * S, S, y, tile.inverse[j]);
    if (p.t2i || column + 1 < p.queries().edge[set + 1]) continue;
    std::fill_n(y, S, T(0));
    for (int64_t r = p.images.length(set); r < p.R; ++r) write(result, dtype, ++row * S, S, y, T(0));
  }
}

template <class T, class E = T>
void forward(const SimilarityProblem& p, void* result, int64_t threads) {
  const RowSets &contexts = p.contexts(), &queries = p.queries();
  if (contexts.count() == 0) return;
  const Projection<T, E> projection(p.weight, p.bias, p.S, p.D);
  for_windows<T>(queries, p.D, threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    const int64_t groups = least(count, (8 * threads + contexts.count() - 1) / contexts.count());
    parallel(contexts.count() * groups, threads, [&] {
      return [&, x = Contexts<T, E>(contexts.most, p.D), room = Buffer<T>(TILE_COLUMNS<T> * p.S), held = int64_t(-1),
              tile = SimilarityTile<T, E>(contexts.most, window.widest, p.D, p.S)](int64_t part) mutable {
        const int64_t context = part / groups, group = part % groups;
        if (context != held) x.read(contexts.source, contexts.first[context], contexts.length(context));
        held = context;
        for (int64_t c = count * group / groups; c < count * (group + 1) / groups; ++c) {
          const Chunk& chunk = window.chunks[c];
          tile.attend(x, p.norm, T(p.scale), &queries.edge[chunk.first], chunk.last - chunk.first, window.panels[c]);
          tile.project(x, projection, chunk.rows, window.panels[c]);
          write_rows(p, chunk, context, tile, static_cast<T*>(room), result);
        }
      };
    });
  });
}

}  // namespace
}  // namespace itm_fast

// result: [I, N, S], or [I, T, R, S] if not t2i. bfloat16: products of bfloat16 values may be used, where the processor
// has them.
extern "C" const char* cross_attention_similarity(const void* image, const void* words, const void* weight,
                                                  const void* bias, int64_t dtype, int64_t I, int64_t R, int64_t D,
                                                  int64_t T, int64_t S, const int64_t* cu_seqlens,
                                                  const int64_t* region_lengths, int64_t t2i, int64_t norm,
                                                  double scale, void* result, [[maybe_unused]] int64_t bfloat16,
                                                  int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const SimilarityProblem p(image, words, weight, bias, dtype, I, R, D, T, S, cu_seqlens, region_lengths, t2i != 0,
                              norm, scale);
    if (dtype == FLOAT64) return forward<double>(p, result, threads);
#if defined(__AVX512BF16__)
    if (bfloat16) return forward<float, Pair>(p, result, threads);
#endif
    forward<float>(p, result, threads);
  });
}
