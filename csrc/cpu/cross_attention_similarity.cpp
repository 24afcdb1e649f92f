// Forward of cross_attention_similarity: (1) to (3) of itm_fast/ops/cross_attention_similarity.py.
//
// A window of chunks of queries is packed once for all threads; a thread then owns one set of contexts at a time and
// passes through some of the window's chunks with it. Tile and caches: similarity.h. Scratch: the window, 16 MiB (one
// chunk if that is more), W, and per thread one tile, 1.2 MiB at R 36, D 1024 and S 256.
#include "sets.h"
#include "write.h"

namespace itm_fast {
namespace {

struct Problem {
  Source image, words, weight, bias;
  int64_t I, R, D, T, S;
  const int64_t *cu_seqlens, *region_lengths;
  bool t2i;
  int64_t norm;
  double scale;
  void* result;
  int64_t threads;
};

// Similarity vectors of a chunk as rows of the result, those of regions that an image has not as zeros.
template <class T>
void write_rows(const Problem& p, const RowSets& queries, const Chunk& chunk, int64_t context,
                const SimilarityTile<T>& tile, T* room) {
  constexpr int64_t WIDE = TILE_COLUMNS<T>;
  int64_t set = chunk.first;
  for (int64_t j = 0; j < chunk.rows; ++j) {
    if (j % WIDE == 0) transpose<T>(tile.similar.at(0, j), WIDE, p.S, least(WIDE, chunk.rows - j), room, p.S);
    T* y = room + j % WIDE * p.S;
    const int64_t column = chunk.begin + j;
    if (column == queries.edge[set + 1]) ++set;
    const int64_t place = column - queries.edge[set];
    int64_t row = p.t2i ? context * p.cu_seqlens[p.T] + column : (set * p.T + context) * p.R + place;
    write(p.result, p.image.dtype, row * p.S, p.S, y, tile.inverse[j]);
    if (p.t2i || place + 1 < queries.length(set)) continue;
    std::fill_n(y, p.S, T(0));
    for (int64_t beyond = place + 1; beyond < p.R; ++beyond) write(p.result, p.image.dtype, ++row * p.S, p.S, y, T(0));
  }
}

template <class T>
void forward(const Problem& p) {
  const RowSets images = regions(p.image, p.I, p.R, p.region_lengths);
  const RowSets words = captions(p.words, p.T, p.cu_seqlens);
  const RowSets &contexts = p.t2i ? images : words, &queries = p.t2i ? words : images;
  if (contexts.count() == 0) return;
  const Projection<T> projection(p.weight, p.bias, p.S, p.D);
  for_windows<T>(queries, p.D, p.threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    const int64_t groups = least(count, (8 * p.threads + contexts.count() - 1) / contexts.count());
    parallel(contexts.count() * groups, p.threads, [&] {
      return [&, x = Contexts<T>(contexts.most, p.D), room = Buffer<T>(TILE_COLUMNS<T> * p.S), held = int64_t(-1),
              tile = SimilarityTile<T>(contexts.most, window.widest, p.D, p.S)](int64_t part) mutable {
        const int64_t context = part / groups, group = part % groups;
        if (context != held) x.read(contexts.source, contexts.first[context], contexts.length(context));
        held = context;
        for (int64_t c = count * group / groups; c < count * (group + 1) / groups; ++c) {
          const Chunk& chunk = window.chunks[c];
          tile.attend(x, p.norm, T(p.scale), &queries.edge[chunk.first], chunk.last - chunk.first, window.panels[c]);
          tile.project(x, projection, chunk.rows, window.panels[c]);
          write_rows<T>(p, queries, chunk, context, tile, room);
        }
      };
    });
  });
}

}  // namespace
}  // namespace itm_fast

// Tensors of one dtype: image [I, R, D], words [cu_seqlens[T], D], weight [S, D], bias [S]; result [I, N, S], or
// [I, T, R, S] if not t2i.
extern "C" const char* cross_attention_similarity(const void* image, const void* words, const void* weight,
                                                  const void* bias, int64_t dtype, int64_t I, int64_t R, int64_t D,
                                                  int64_t T, int64_t S, const int64_t* cu_seqlens,
                                                  const int64_t* region_lengths, int64_t t2i, int64_t norm,
                                                  double scale, void* result, int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem p{{image, dtype}, {words, dtype}, {weight, dtype}, {bias, dtype}, I, R, D, T, S,
                    cu_seqlens, region_lengths, t2i != 0, norm, scale, result, threads};
    if (dtype == FLOAT64) forward<double>(p);
    else forward<float>(p);
  });
}
