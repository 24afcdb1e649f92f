// Backward of cross_attention_similarity: (4) to (7) of itm_fast/ops/cross_attention_similarity.py.
//
// Slots, as many as fit SLOT_BYTES, at most 16, hold a chunk of queries each and what it sums: d W and d b of all tiles
// it saw, d q of its queries, d x of a few sets of contexts. A thread takes a slot through these contexts; then the
// slots' d x are added in their order, and the next contexts come; d W and d b are added at the end. Which tiles a
// slot sees depends on the shapes alone, so the gradients' bits do not depend on the threads.
//
// Scratch: 48 MiB of slots (one slot, if that is more), W in two layouts, 2 MiB at D 1024 and S 256, the contexts held,
// 2 MiB, and per thread one tile, 1.7 MiB at R 36.
#include "cross_attention_similarity.h"
#include "similarity_backward.h"

namespace itm_fast {
namespace {

constexpr int64_t SLOT_BYTES = int64_t(48) << 20, MOST_SLOTS = 16;
constexpr int64_t CONTEXT_ROWS = 144, MOST_CONTEXTS = 16;  // held at a time

// Where the gradients go, in T; null where none is wanted.
struct Gradients {
  void *image, *words, *weight, *bias;
};

template <class T>
void add_rows(const RowSets& sets, int64_t set, int64_t D, void* to, const FeaturePanels<T>& from, int64_t row) {
  for (int64_t r = 0; r < sets.length(set); ++r)
    from.add_row_to(static_cast<T*>(to) + (sets.first[set] + r) * D, D, row + r);
}

template <class T>
void backward(const SimilarityProblem& p, Source grad, const Gradients& wanted, int64_t threads) {
  const RowSets &contexts = p.contexts(), &queries = p.queries();
  const int64_t D = p.D, S = p.S;
  void *d_context = p.t2i ? wanted.image : wanted.words, *d_query = p.t2i ? wanted.words : wanted.image;
  const Projection<T> projection(p.weight, p.bias, S, D);
  FeaturePanels<T> w(D, S);
  w.read_rows(p.weight, 0, S, D, 0);

  const int64_t context_rows = std::max(contexts.most, CONTEXT_ROWS);
  const int64_t chunk_bytes = CHUNK_BYTES * D;
  const int64_t slot_bytes = 3 * chunk_bytes + (S + context_rows) * D * int64_t(sizeof(T));
  const int64_t slots = std::max<int64_t>(1, least(MOST_SLOTS, SLOT_BYTES / (slot_bytes + 1)));
  std::vector<SimilaritySums<T>> sums;
  // A chunk is one thread's: few queries are cut into eight, so that threads share them.
  const int64_t eighth = round_up(queries.edge.back() / 8 + 1, TILE_COLUMNS<T>);
  const int64_t columns = least(eighth, CHUNK_BYTES / int64_t(sizeof(T)));

  for_windows<T>(queries, D, threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    std::vector<FeaturePanels<T>> rows, d_q;
    std::vector<std::vector<FeaturePanels<T>>> d_x(count);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t columns = window.chunks[c].rows;
      rows.emplace_back(D, columns);
      d_q.emplace_back(D, columns);
      if (c == int64_t(sums.size()))
        sums.push_back({d_context != nullptr, d_query != nullptr, wanted.weight != nullptr, wanted.bias != nullptr,
                        FeaturePanels<T>(D, S), Buffer<T>(round_up(S, LANES<T>))});
    }
    parallel(count, threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        for (int64_t k = chunk.first; k < chunk.last; ++k)
          rows[c].read_rows(queries.source, queries.first[k], queries.length(k), D, queries.edge[k] - chunk.begin);
      };
    });
    std::vector<SimilarityGradient<T>> tiles;  // one for each thread
    for (int64_t k = 0; k < least(threads, count); ++k) tiles.emplace_back(contexts.most, window.widest, D, S);
    for (int64_t first = 0, held; first < contexts.count(); first += held) {
      std::vector<Contexts<T>> x;
      for (held = 0; first + held < contexts.count() && held < MOST_CONTEXTS; ++held) {
        if (contexts.edge[first + held + 1] - contexts.edge[first] > context_rows) break;
        x.emplace_back(contexts.length(first + held), D);
      }
      parallel(held, threads, [&] {
        return [&](int64_t k) { x[k].read(contexts.source, contexts.first[first + k], contexts.length(first + k)); };
      });
      std::atomic<int64_t> taken{0};
      parallel(count, threads, [&] {
        return [&, &tile = tiles[taken++], room = Buffer<T>(S)](int64_t c) {
          const Chunk& chunk = window.chunks[c];
          d_x[c].clear();
          for (int64_t k = 0; k < held; ++k) {
            int64_t set = chunk.first;
            const auto upstream = [&](int64_t j, T* to) {
              if (chunk.begin + j == queries.edge[set + 1]) ++set;
              const int64_t row = p.row(first + k, set, chunk.begin + j);
              std::copy_n(read<T>(grad, row * S, S, room), S, to);
            };
            d_x[c].emplace_back(D, x[k].n);
            tile.run(x[k], p.norm, T(p.scale), &queries.edge[chunk.first], chunk.last - chunk.first, projection, w,
                     window.panels[c], rows[c], upstream, sums[c], d_q[c], d_x[c].back());
          }
        };
      });
      if (d_context)
        parallel(held, threads, [&] {
          return [&](int64_t k) {
            for (int64_t c = 0; c < count; ++c) add_rows<T>(contexts, first + k, D, d_context, d_x[c][k], 0);
          };
        });
    }
    if (d_query)
      parallel(count, threads, [&] {
        return [&](int64_t c) {
          const Chunk& chunk = window.chunks[c];
          for (int64_t k = chunk.first; k < chunk.last; ++k)
            add_rows<T>(queries, k, D, d_query, d_q[c], queries.edge[k] - chunk.begin);
        };
      });
  }, slots * chunk_bytes, columns);
  for (const SimilaritySums<T>& one : sums) {
    for (int64_t s = 0; wanted.weight && s < S; ++s)
      one.weight.add_row_to(static_cast<T*>(wanted.weight) + s * D, D, s);
    for (int64_t s = 0; wanted.bias && s < S; ++s) static_cast<T*>(wanted.bias)[s] += one.bias[s];
  }
}

}  // namespace
}  // namespace itm_fast

// grad has the shape and dtype of the result; gradients have the shape of their tensor, in float (in double, where the
// tensors are), hold zeros, and are null where they are not wanted.
extern "C" const char* cross_attention_similarity_backward(
    const void* image, const void* words, const void* weight, const void* bias, int64_t dtype, int64_t I, int64_t R,
    int64_t D, int64_t T, int64_t S, const int64_t* cu_seqlens, const int64_t* region_lengths, int64_t t2i,
    int64_t norm, double scale, const void* grad, void* d_image, void* d_words, void* d_weight, void* d_bias,
    int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const SimilarityProblem p(image, words, weight, bias, dtype, I, R, D, T, S, cu_seqlens, region_lengths, t2i != 0,
                              norm, scale);
    const Gradients wanted{d_image, d_words, d_weight, d_bias};
    if (dtype == FLOAT64) backward<double>(p, {grad, dtype}, wanted, threads);
    else backward<float>(p, {grad, dtype}, wanted, threads);
  });
}
