// attended_vectors, (1) to (3) of itm_fast/ops/attended_vectors.py; its backward pass is PyTorch's.
//
// A thread owns one set of contexts with a chunk of query sets at a time, and the rows of the result that belong to
// them. Queries that all pairs share are packed once for all threads (windows.h); those of a pair's own are packed by
// the thread. Scratch: the window, 16 MiB, or per thread a chunk of queries, 900 KB at D 1024; per thread the chunk's
// result, 900 KB for values of 1024 numbers, and its weights.
#include "calls/attended_vectors.h"
#include "windows.h"
#include "write.h"

namespace itm_fast {
namespace {

template <class T>
struct AttendedVectors {
  const AttendedVectorsCall& call;
  bool t2i = call.direction == Direction::T2I;
  RowSets images = regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths),
          captions = itm_fast::captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens);
  const RowSets &contexts = t2i ? images : captions, &sets = t2i ? captions : images;
  int64_t pairs = t2i ? call.N : call.T * call.R;  // an image's rows of the result
  bool apart = call.B == call.I && call.Q == pairs, one_scale = call.C * call.P == 1;

  // The row of the result, and of queries and scales of each pair's own, that set's first query has with a context.
  int64_t row(int64_t context, int64_t set) const {
    return t2i ? context * call.N + captions.edge[set] : (set * call.T + context) * call.R;
  }

  // What all pairs share: the words [N, D] or the regions.
  RowSets shared() const {
    RowSets found = sets;
    found.source = {call.queries, call.dtype};
    return found;
  }

  void run() const {
    if (contexts.count() == 0 || sets.count() == 0) return;
    const int64_t columns = CHUNK_BYTES / int64_t(sizeof(T));
    if (!apart)
      return for_windows<T>(shared(), call.threads, [&](const QueryWindow<T>& window) {
        over(window.chunks, window.widest,
             [&](int64_t, int64_t c, Panels<T>&) -> const Panels<T>& { return window.panels[c]; });
      });
    const std::vector<Chunk> all = chunks(sets.edge.data(), sets.count(), columns);
    int64_t widest = 0;
    for (const Chunk& chunk : all) widest = std::max(widest, chunk.rows);
    over(all, widest, [&](int64_t context, int64_t c, Panels<T>& own) -> const Panels<T>& {
      for (int64_t set = all[c].first; set < all[c].last; ++set)
        own.read({call.queries, call.dtype}, row(context, set), sets.length(set), call.D,
                 sets.edge[set] - all[c].begin);
      return own;
    });
  }

  // All contexts with all chunks; queries(context, c, room) gives chunk c's queries as columns.
  template <class Queries>
  void over(const std::vector<Chunk>& chunks, int64_t widest, Queries queries) const {
    const int64_t count = int64_t(chunks.size());
    const int64_t groups = least(count, (8 * call.threads + contexts.count() - 1) / contexts.count());
    parallel(contexts.count() * groups, call.threads, [&] {
      return [&, groups, count, x = Contexts<T>(contexts.most, call.D), tile = Tile(contexts.most, widest, call.S),
              own = Panels<T>(apart ? widest : 0, call.D), held = int64_t(-1)](int64_t part) mutable {
        const int64_t context = part / groups, group = part % groups;
        if (context != held) {
          x.read(contexts.source, contexts.first[context], contexts.length(context));
          tile.read({call.values, call.dtype}, contexts.first[context], x.n, call.S);
        }
        held = context;
        for (int64_t c = count * group / groups; c < count * (group + 1) / groups; ++c)
          attend(x, context, chunks[c], queries(context, c, own), tile);
      };
    });
  }

  struct Tile {
    int64_t ld, value_ld;
    Buffer<T> affinity, weight, factor, scale, total;  // [n][ld], [n][ld]; n values; one value per query
    Buffer<T> value, attended;                         // [n][value_ld], [queries][value_ld]

    Tile(int64_t most, int64_t columns, int64_t S)
        : ld(padded<T>(columns)), value_ld(padded<T>(S)), affinity(most * ld), weight(most * ld),
          factor(round_up(most, LANES<T>)), scale(ld), total(ld), value(most * value_ld), attended(ld * value_ld) {}

    void read(Source s, int64_t first, int64_t n, int64_t S) {
      for (int64_t k = 0; k < n; ++k) {
        T* to = value + k * value_ld;
        const T* from = itm_fast::read<T>(s, (first + k) * S, S, to);
        if (from != to) std::copy_n(from, S, to);
      }
    }
  };

  void attend(const Contexts<T>& x, int64_t context, const Chunk& chunk, const Panels<T>& query, Tile& tile) const {
    constexpr int64_t WIDE = TILE_COLUMNS<T>;
    const auto zero = [](int64_t, int64_t) { return Vec<T>{}; };
    const int64_t ld = tile.ld, n = x.n, count = chunk.last - chunk.first;
    const Source scales{call.scale, call.dtype};
    T one = 1;
    if (one_scale) one = *read<T>(scales, 0, 1, tile.total);
    for (int64_t p = 0; p < chunk.rows; p += WIDE)
      gemm<T>(n, least(WIDE, chunk.rows - p), call.D, {x.column, x.ld}, {query.at(0, p), WIDE}, zero,
              [&](int64_t i, int64_t j, Vec<T> c) { store(tile.affinity + i * ld + p + j, c); });
    logits<T>(call.affinity_norm, one, n, &sets.edge[chunk.first], count, tile.affinity, tile.weight, ld, tile.factor);
    if (!one_scale) {
      for (int64_t set = chunk.first; set < chunk.last; ++set) {
        T* to = tile.scale + sets.edge[set] - chunk.begin;
        const T* from = read<T>(scales, row(context, set), sets.length(set), to);
        if (from != to) std::copy_n(from, sets.length(set), to);
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < chunk.rows; j += LANES<T>) {
          T* at = tile.weight + i * ld + j;
          store(at, load(at) * load(tile.scale + j));
        }
    }
    exponentials<T>(n, chunk.rows, tile.weight, ld, tile.total);
    for (int64_t j = 0; j < chunk.rows; j += LANES<T>) {
      const Vec<T> share = T(1) / load(tile.total + j);
      for (int64_t i = 0; i < n; ++i) store(tile.weight + i * ld + j, load(tile.weight + i * ld + j) * share);
    }
    gemm<T>(chunk.rows, call.S, n, {tile.weight, ld}, {tile.value, tile.value_ld}, zero,
            [&](int64_t j, int64_t s, Vec<T> c) { store(tile.attended + j * tile.value_ld + s, c); });
    for (int64_t set = chunk.first; set < chunk.last; ++set) {
      const T* from = tile.attended + (sets.edge[set] - chunk.begin) * tile.value_ld;
      int64_t at = row(context, set);
      for (int64_t k = 0; k < sets.length(set); ++k, ++at, from += tile.value_ld)
        write<T>(call.attended, call.dtype, at * call.S, call.S, from, T(1));
      if (t2i) continue;
      std::fill_n(tile.scale + 0, 1, T(0));
      for (int64_t k = sets.length(set); k < call.R; ++k, ++at)
        for (int64_t s = 0; s < call.S; ++s)
          write<T>(call.attended, call.dtype, at * call.S + s, 1, tile.scale + 0, T(1));
    }
  }
};

}  // namespace
}  // namespace itm_fast

// Writes attended [I, N, S], or [I, T, R, S] for i2t, in the dtype of the tensors.
extern "C" const char* attended_vectors(const itm_fast::AttendedVectorsCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) AttendedVectors<double>{call}.run();
    else AttendedVectors<float>{call}.run();
  });
}
