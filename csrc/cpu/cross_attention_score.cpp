// Scores of all pairs: (1), (2) and (3) of itm_fast/ops/cross_attention_score.py.
//
// A thread owns one block of context sets with some of a window's chunks of queries at a time. It packs the block,
// about 144 rows, once, and keeps it with the sets' Gram matrices in its second cache; the window's queries are packed
// once per call and shared. For each chunk it computes all the block's affinities by one product over D; then set by
// set, in the first caches, logits, exponentials, |P|^2 by the Gram matrix, and the pooled cosines. Only scores leave.
//
// Scratch beyond inputs and results: a window (32 MiB; 8 MiB beside affinities) and 1 MiB a thread, more
// only where one set alone is larger.
#include "cross_attention_score.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t WINDOW_BYTES = 32 << 20, TRAINED_BYTES = 8 << 20;  // of a window; of one beside affinities

template <class T, class E = T>
void scores(const Problem& problem, void* score, T* affinity, int64_t threads) {
  const RowSets &context = problem.context, &query = problem.query;
  const std::vector<Chunk> blocks = context_blocks<T>(context);
  if (blocks.empty()) return;
  const int64_t bytes = affinity ? TRAINED_BYTES : WINDOW_BYTES;
  for_windows<T, E>(problem, CHUNK_BYTES / int64_t(sizeof(T)), bytes, threads, [&](const Window<T, E>& window) {
    const int64_t count = int64_t(blocks.size()), columns = int64_t(window.chunks.size());
    const int64_t groups = least(columns, (PARTS + count - 1) / count);
    parallel(count * groups, threads, [&] {
      return [&, block = Block<T, E>(problem, blocks),
              work = Cosines<T>(problem, Block<T>::most_rows(blocks), context.most,
                                Block<T>::most_rows(window.chunks))](int64_t part) mutable {
        const int64_t group = part % groups;
        block.take(blocks[size_t(part / groups)]);
        for (int64_t c = columns * group / groups; c < columns * (group + 1) / groups; ++c) {
          const Chunk& chunk = window.chunks[size_t(c)];
          work.affinities(block, window, c);
          if (affinity) work.keep_affinities(block, chunk, affinity);
          for (int64_t set = block.run.first; set < block.run.last; ++set) {
            if (problem.maxima()) work.maxima(context.edge[set] - block.run.begin, context.length(set), chunk.rows);
            else work.cosines(block, set, window, c, [](int64_t, int64_t, Vec<T>) {});
            for (int64_t q = chunk.first; q < chunk.last; ++q) {
              const T one = work.pooled(query.edge[q] - chunk.begin, query.length(q), window.smooth_of(q));
              write(score, query.source.dtype, set * problem.context_step + q * problem.query_step, 1, &one, T(1));
            }
          }
        }
      };
    });
  });
}

}  // namespace
}  // namespace itm_fast

// Writes score [I, T] in the dtype of the tensors, and, unless it is null, affinity [contexts, queries] for backward,
// float, or double if the tensors are double; shapes and who owns what: calls.h.
extern "C" const char* cross_attention_score(const itm_fast::CrossAttentionScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem problem(call);
    if (call.dtype == Dtype::FLOAT64)
      return scores<double>(problem, call.score, static_cast<double*>(call.affinity), call.threads);
    float* const affinity = static_cast<float*>(call.affinity);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return scores<float, Pair>(problem, call.score, affinity, call.threads);
#endif
    scores<float>(problem, call.score, affinity, call.threads);
  });
}
