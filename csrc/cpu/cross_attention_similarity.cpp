// Forward of cross_attention_similarity, (1) to (3) of itm_fast/ops/cross_attention_similarity.py, and of
// similarity_nodes, which writes the similarity vector of the global vectors before each caption's own.
//
// A window of chunks of queries is packed once for all threads; then a thread owns one set of contexts with some of the
// window's chunks at a time, and the rows of the result that belong to them. Tile and caches: similarity.h. Scratch:
// the window, 16 MiB (one chunk if that is more), W, and per thread one tile, 1.1 MiB at R 36, D 1024 and S 256.
#include "cross_attention_similarity.h"

namespace itm_fast {
namespace {

// Writes the similarity vectors of a chunk as rows of the result; those of padding regions are zeros.
template <class T, class E>
void write_rows(const SimilarityProblem& p, const Chunk& chunk, int64_t context, const SimilarityTile<T, E>& tile,
                T* room, Result result) {
  int64_t set = chunk.first;
  write_columns(tile, chunk.rows, p.S, p.weight.dtype, room, result, [&](int64_t j) {
    if (chunk.begin + j == p.queries().edge[set + 1]) ++set;
    return p.row(context, set, chunk.begin + j);
  });
  if (p.t2i) return;
  std::fill_n(room, p.S, T(0));
  for (int64_t set = chunk.first; set < chunk.last; ++set)
    for (int64_t r = p.images.length(set); r < p.R; ++r)
      write(result.rows, p.weight.dtype, p.row(context, set, p.images.edge[set] + r) * p.S, p.S, room, T(0));
}

// Writes the global similarity vectors of all pairs: the captions' global vectors are queries, and an image's global
// vector is their only context, with weight 1.
template <class T>
void write_globals(const SimilarityProblem& p, Result result, int64_t threads) {
  const Globals& g = *p.globals;
  const int64_t I = p.images.count(), S = p.S;
  const RowSets captions = single_rows(g.caption, p.captions.count(), p.D);
  const Projection<T> projection(g.weight, g.bias, S, p.D);
  for_windows<T>(captions, threads, [&](const QueryWindow<T>& window) {
    parallel(I * window.count(), threads, [&] {
      SimilarityTile<T> tile(1, window.widest, p.D, S);
      std::fill_n(tile.weight + 0, tile.ld, T(1));
      return [&, x = Contexts<T>(1, p.D), tile = std::move(tile), room = Buffer<T>(TILE_COLUMNS<T> * S)](
                 int64_t part) mutable {
        const int64_t i = part % I;
        const Chunk& chunk = window.chunks[part / I];
        x.read(g.image, i, 1);
        tile.project(x, projection, chunk.rows, window.panels[part / I]);
        write_columns(tile, chunk.rows, S, p.weight.dtype, static_cast<T*>(room), result,
                      [&](int64_t j) { return p.global_row(i, chunk.first + j); });
      };
    });
  });
}

template <class T, class E = T>
void forward(const SimilarityProblem& p, Result result, int64_t threads) {
  if (p.globals) write_globals<T>(p, result, threads);
  const RowSets &contexts = p.contexts(), &queries = p.queries();
  if (contexts.count() == 0) return;
  const Projection<T, E> projection(p.weight, p.bias, p.S, p.D);
  for_windows<T>(queries, threads, [&](const QueryWindow<T>& window) {
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

void run(const SimilarityProblem& p, Result result, [[maybe_unused]] int64_t bfloat16, int64_t threads) {
  if (p.weight.dtype == Dtype::FLOAT64) return forward<double>(p, result, threads);
#if defined(__AVX512BF16__)
  if (bfloat16) return forward<float, Pair>(p, result, threads);
#endif
  forward<float>(p, result, threads);
}

}  // namespace
}  // namespace itm_fast

// Writes similarity [I, N, S], or [I, T, R, S] for i2t, in the dtype of the tensors.
extern "C" const char* cross_attention_similarity(const itm_fast::CrossAttentionSimilarityCall& call) {
  using namespace itm_fast;
  return guarded([&] { run(SimilarityProblem(call), {call.similarity, nullptr}, call.bfloat16, call.threads); });
}

// Writes nodes [I, N + T, S] in the dtype of the tensors, and inverse [I, N + T] = 1 / (|y| + eps), float, or double if
// the tensors are double.
extern "C" const char* similarity_nodes(const itm_fast::SimilarityNodesCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Globals globals(call);
    run(SimilarityProblem(call, globals), {call.nodes, call.inverse}, call.bfloat16, call.threads);
  });
}
