// Scores of all pairs: (1), (2) and (3) of itm_fast/ops/cross_attention_score.py.
//
// A thread owns one block of context sets with some of a window's chunks of queries at a time. It packs the block,
// about 144 rows, once, and keeps it with the sets' Gram matrices in its second cache; the window's queries are packed
// once per call and shared. For each chunk it computes all the block's affinities by one product over D; then set by
// set, in the first caches, logits, exponentials, |P|^2 by the Gram matrix, and the pooled cosines. Only scores leave.
//
// Scratch beyond inputs and results: a window (32 MiB; 8 MiB beside affinities) and 1 MiB a thread, more
// only where one set alone is larger.
#include <memory>

#include "cross_attention_score.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t WINDOW_BYTES = 32 << 20, TRAINED_BYTES = 8 << 20;  // of a window; of one beside affinities

// The sum over the terms of the score that each term's options give; they share sets, direction and affinities.
template <class T, class E = T>
void scores(const Problem& problem, const std::vector<Options>& terms, void* score, T* affinity, int64_t threads) {
  const RowSets &context = problem.context, &query = problem.query;
  const std::vector<Chunk> blocks = context_blocks<T>(context);
  if (blocks.empty()) return;
  // What a window and a block hold is what one of the terms needs, if one does.
  Problem smoothing = problem, lengths = problem;
  for (const Options& term : terms) {
    if (term.pool == Pool::SMOOTHED_NEGATIVE) {
      if (smoothing.pool == term.pool && smoothing.pool_scale != term.pool_scale)
        throw std::invalid_argument("the terms of a sum of scores must smooth with one pool_scale");
      static_cast<Options&>(smoothing) = term;
    }
    if (term.lengths()) static_cast<Options&>(lengths) = term;
  }
  const int64_t width = CHUNK_BYTES / int64_t(sizeof(T));
  const int64_t bytes = affinity ? TRAINED_BYTES : WINDOW_BYTES;
  for_windows<T, E>(smoothing, width, bytes, threads, [&](const Window<T, E>& window) {
    const int64_t count = int64_t(blocks.size()), columns = int64_t(window.chunks.size());
    const int64_t groups = least(columns, (PARTS + count - 1) / count);
    parallel(count * groups, threads, [&] {
      auto now = std::make_unique<Problem>(problem);  // with the options of the term at work
      const Problem& options = *now;
      return [&, now = std::move(now), block = Block<T, E>(lengths, blocks),
              work = Cosines<T>(options, Block<T>::most_rows(blocks), context.most,
                                Block<T>::most_rows(window.chunks)),
              total = Buffer<T>(width)](int64_t part) mutable {
        const int64_t group = part % groups;
        block.take(blocks[size_t(part / groups)]);
        for (int64_t c = columns * group / groups; c < columns * (group + 1) / groups; ++c) {
          const Chunk& chunk = window.chunks[size_t(c)];
          work.affinities(block, window, c);
          if (affinity) work.keep_affinities(block, chunk, affinity);
          for (int64_t set = block.run.first; set < block.run.last; ++set) {
            for (size_t k = 0; k < terms.size(); ++k) {
              static_cast<Options&>(*now) = terms[k];
              if (now->maxima()) work.maxima(context.edge[set] - block.run.begin, context.length(set), chunk.rows);
              else work.cosines(block, set, window, c, [](int64_t, int64_t, Vec<T>) {});
              const bool smooth = now->pool == Pool::SMOOTHED_NEGATIVE;
              for (int64_t q = chunk.first; q < chunk.last; ++q) {
                const T one = work.pooled(query.edge[q] - chunk.begin, query.length(q),
                                          smooth ? window.smooth_of(q) : nullptr);
                T& sum = total[q - chunk.first];
                sum = k ? sum + one : one;
              }
            }
            for (int64_t q = chunk.first; q < chunk.last; ++q)
              write(score, query.source.dtype, set * problem.context_step + q * problem.query_step, 1,
                    total + (q - chunk.first), T(1));
          }
        }
      };
    });
  });
}

void run(const CrossAttentionScoreCall& call, const std::vector<Options>& terms) {
  const Problem problem(call);
  if (call.dtype == Dtype::FLOAT64)
    return scores<double>(problem, terms, call.score, static_cast<double*>(call.affinity), call.threads);
  float* const affinity = static_cast<float*>(call.affinity);
#if defined(__AVX512BF16__)
  if (call.bfloat16) return scores<float, Pair>(problem, terms, call.score, affinity, call.threads);
#endif
  scores<float>(problem, terms, call.score, affinity, call.threads);
}

}  // namespace
}  // namespace itm_fast

// Writes score [I, T] in the dtype of the tensors, and, unless it is null, affinity [contexts, queries] for backward,
// float, or double if the tensors are double; shapes: calls/, who owns what: calls.cpp.
extern "C" const char* cross_attention_score(const itm_fast::CrossAttentionScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] { run(call, {Options(call)}); });
}

// Writes the sum of the scores of several calls to the first one's `score`: calls[0], calls[1], ... until one has no
// `score`. They differ in their options only, and have one direction.
extern "C" const char* cross_attention_score_sum(const itm_fast::CrossAttentionScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    std::vector<Options> terms;
    for (const CrossAttentionScoreCall* one = &call; one->score; ++one) terms.emplace_back(*one);
    run(call, terms);
  });
}
