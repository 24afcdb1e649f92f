// Backward of cross_attention_similarity and of similarity_nodes: (4) to (7) of
// itm_fast/ops/cross_attention_similarity.py, which the global similarity vectors share from (5) on.
//
// A slot holds one chunk of queries and its part of the gradients: d W and d b, summed over all contexts that met the
// slot; d q of its queries; d x of the few context sets that are held in memory at a time. There are as many slots as
// fit into SLOT_BYTES, at most 16. A thread owns one slot at a time and computes its gradients with all contexts held;
// then the slots' d x are added in the slots' order and the next contexts are read. d W and d b are added at the end.
// Which tiles meet in a slot depends on the shapes alone, so the gradients' bits do not depend on the number of
// threads. Where global vectors have gradients too, they go through slots likewise: the captions' global vectors as
// queries, those of the images held as contexts, W_g in place of W.
//
// Scratch: 48 MiB of slots (one slot, if that is more), W in two layouts, 2 MiB at D 1024 and S 256, the contexts held,
// 1.3 MiB, and per thread one tile, 1.9 MiB at R 36; with global vectors 1 MiB more a slot and for W_g, and 1.3 MiB
// more a thread. Pairs of bfloat16 values take 1 MiB more for the contexts and 0.6 MiB more a thread, and nothing of a
// slot.
#include <memory>

#include "cross_attention_similarity.h"
#include "similarity_sums.h"

namespace itm_fast {
namespace {

constexpr int64_t SLOT_BYTES = int64_t(48) << 20, MOST_SLOTS = 16;
constexpr int64_t CONTEXT_ROWS = 144, MOST_CONTEXTS = 16;  // held at a time

// A chunk's queries, feature by feature, and their gradients.
template <class T>
struct Slot {
  FeaturePanels<T> rows, d_q, d_x;  // d_x of the contexts held
  Slot(int64_t D, int64_t columns, int64_t contexts) : rows(D, columns), d_q(D, columns), d_x(D, contexts) {}
};

// globals_wanted is for p.globals; its context is the images' global vectors. `grad` is that of y with globals whose
// similarity vectors are not known; without globals, these are computed again where they are not known.
template <class T, class E = T>
void backward(const SimilarityProblem& p, Source grad, Known known, const Gradients& wanted,
              const Gradients& globals_wanted, int64_t threads) {
  const RowSets &contexts = p.contexts(), &queries = p.queries();
  const int64_t D = p.D, S = p.S;
  const bool global = p.globals && globals_wanted.any();
  std::unique_ptr<Projection<T>> projection;
  if (!p.globals && !known.rows.data) projection = std::make_unique<Projection<T>>(p.weight, p.bias, S, D);
  const FeaturePanels<E> w = feature_rows<T, E>(p.weight, S, D);
  FeaturePanels<T> global_w(D, global ? S : 0);
  if (global) global_w.read_rows(p.globals->weight, 0, S, 0);

  const int64_t context_rows = std::max(contexts.most, CONTEXT_ROWS);
  const int64_t chunk_bytes = CHUNK_BYTES * D;
  const int64_t slot_bytes = 3 * chunk_bytes + (S + context_rows) * D * int64_t(sizeof(T));
  const int64_t slots = std::max<int64_t>(1, least(MOST_SLOTS, SLOT_BYTES / (slot_bytes + 1)));
  SlotSums<T> sums, global_sums;
  // A chunk is one thread's: few queries are cut into eight, as even as their sets allow, so that threads share them.
  int64_t columns = CHUNK_BYTES / int64_t(sizeof(T));
  if (queries.edge.back() <= 8 * columns) {
    columns = queries.edge.back() / 8 + 1;
    while (chunks(queries.edge.data(), queries.count(), columns).size() > size_t(least(8, queries.count()))) ++columns;
  }

  for_windows<T>(queries, threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    std::vector<std::optional<Slot<T>>> local(count), overall(count);
    int64_t widest = window.widest;  // queries of a chunk, or captions, should there be more of them
    for (const Chunk& chunk : window.chunks) widest = std::max(widest, chunk.last - chunk.first);
    sums.resize(std::max(sums.size(), size_t(count)));
    if (global) global_sums.resize(sums.size());
    parallel(count, threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        local[c].emplace(D, chunk.rows, context_rows);
        for (int64_t k = chunk.first; k < chunk.last; ++k)
          local[c]->rows.read_rows(queries.source, queries.first[k], queries.length(k), queries.edge[k] - chunk.begin);
        if (!sums[c]) sums[c].emplace(sums_of<T>(wanted, D, S));
        if (!global) return;
        overall[c].emplace(D, chunk.last - chunk.first, MOST_CONTEXTS);
        overall[c]->rows.read_rows(p.globals->caption, chunk.first, chunk.last - chunk.first, 0);
        if (!global_sums[c]) global_sums[c].emplace(sums_of<T>(globals_wanted, D, S));
      };
    });
    std::vector<SimilarityGradient<T>> global_tiles;
    std::vector<SimilarityGradient<T, E>> tiles;  // one for each thread
    for (int64_t k = 0; k < least(threads, count); ++k) {
      tiles.emplace_back(context_rows, contexts.most, window.widest, D, S);
      if (global) global_tiles.emplace_back(0, 0, widest, D, S);
    }
    HeldContexts<T, E> x(context_rows, contexts.most, D);
    FeaturePanels<T> global_x(D, global ? MOST_CONTEXTS : 0);
    for (int64_t first = 0, held; first < contexts.count(); first += held) {
      x.clear();
      for (held = 0; first + held < contexts.count() && held < MOST_CONTEXTS; ++held) {
        if (x.n + contexts.length(first + held) > context_rows) break;
        x.add(contexts.length(first + held));
      }
      parallel(held, threads, [&] {
        return [&](int64_t k) { x.read_set(k, contexts.source, contexts.first[first + k]); };
      });
      parallel(held, threads, [&] { return [&](int64_t k) { x.multiply_set(k); }; });
      if (global) global_x.read_rows(p.globals->image, first, held, 0);
      std::atomic<int64_t> taken{0};
      parallel(count, threads, [&] {
        return [&, thread = taken++, room = Buffer<T>(S), s_j = Buffer<T>(round_up(S, LANES<T>))](int64_t c) {
          const Chunk& chunk = window.chunks[c];
          const int64_t sets = chunk.last - chunk.first;
          // The gradient of the similarity vector in row row(k, j) of the result, or that of its y.
          const auto gradient = [&](auto row) {
            return [&, row](int64_t k, int64_t j, T* to) mutable {
              const int64_t at = row(k, j);
              std::copy_n(read<T>(grad, at * S, S, room), S, to);
              if (!known.rows.data) return;
              std::copy_n(read<T>(known.rows, at * S, S, room), S, s_j + 0);
              backward_of_norm<T>(to, S, s_j, static_cast<const T*>(known.inverse)[at]);
            };
          };
          const auto row = [&, set = chunk.first](int64_t k, int64_t j) mutable {
            if (j == 0) set = chunk.first;
            while (chunk.begin + j >= queries.edge[set + 1]) ++set;
            return p.row(first + k, set, chunk.begin + j);
          };
          local[c]->d_x.clear();
          tiles[thread].run(x, p.norm, T(p.scale), &queries.edge[chunk.first], sets, projection.get(), w,
                            window.panels[c], local[c]->rows, gradient(row), *sums[c], local[c]->d_q, local[c]->d_x);
          if (!global) return;
          const auto global_row = [&](int64_t k, int64_t j) { return p.global_row(first + k, chunk.first + j); };
          overall[c]->d_x.clear();
          global_tiles[thread].run_unweighted(global_x, held, sets, widest, global_w, overall[c]->rows,
                                              gradient(global_row), *global_sums[c], overall[c]->d_q, overall[c]->d_x);
        };
      });
      parallel(held, threads, [&] {
        return [&](int64_t k) {
          for (int64_t c = 0; c < count; ++c) {
            if (wanted.context) add_rows<T>(contexts, first + k, wanted.context, local[c]->d_x, x.sets[k].first);
            if (global && globals_wanted.context)
              overall[c]->d_x.add_row_to(static_cast<T*>(globals_wanted.context) + (first + k) * D, k);
          }
        };
      });
    }
    parallel(count, threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        for (int64_t k = chunk.first; k < chunk.last; ++k) {
          if (wanted.query) add_rows<T>(queries, k, wanted.query, local[c]->d_q, queries.edge[k] - chunk.begin);
          if (global && globals_wanted.query)
            overall[c]->d_q.add_row_to(static_cast<T*>(globals_wanted.query) + k * D, k - chunk.first);
        }
      };
    });
  }, slots * chunk_bytes, columns);
  add_sums(sums, wanted, D, S, threads);
  add_sums(global_sums, globals_wanted, D, S, threads);
}

void run(const SimilarityProblem& p, Source grad, Known known, const Gradients& wanted, const Gradients& globals_wanted,
         [[maybe_unused]] int64_t bfloat16, int64_t threads) {
  if (p.weight.dtype == Dtype::FLOAT64) return backward<double>(p, grad, known, wanted, globals_wanted, threads);
#if defined(__AVX512BF16__)
  if (bfloat16) return backward<float, Pair>(p, grad, known, wanted, globals_wanted, threads);
#endif
  backward<float>(p, grad, known, wanted, globals_wanted, threads);
}

}  // namespace
}  // namespace itm_fast

// Adds to the gradients of image, words, weight and bias that are not null. They have their tensors' shapes, are float,
// or double if the tensors are double, and hold zeros. grad has the shape and dtype of `similarity`.
extern "C" const char* cross_attention_similarity_backward(const itm_fast::CrossAttentionSimilarityCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const SimilarityProblem p(call);
    const Gradients wanted{p.t2i ? call.d_image : call.d_words, p.t2i ? call.d_words : call.d_image, call.d_weight,
                           call.d_bias};
    const Source grad{call.grad, call.dtype};
    run(p, grad, {}, wanted, {}, call.bfloat16, call.threads);
  });
}

// The same for similarity_nodes and its eight tensors; nodes and inverse are the results of the forward pass, or null:
// grad is then the gradient of every node's y.
extern "C" const char* similarity_nodes_backward(const itm_fast::SimilarityNodesCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Globals globals(call);
    const SimilarityProblem p(call, globals);
    const Source grad{call.grad, call.dtype};
    const Known known{{call.nodes, call.dtype}, call.inverse};
    const Gradients wanted{call.d_image, call.d_words, call.d_local_weight, call.d_local_bias};
    const Gradients globals_wanted{call.d_image_global, call.d_caption_global, call.d_global_weight,
                                   call.d_global_bias};
    run(p, grad, known, wanted, globals_wanted, call.bfloat16, call.threads);
  });
}
