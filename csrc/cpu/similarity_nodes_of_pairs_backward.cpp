// similarity_nodes of a list of pairs, backward: (4) to (7) of itm_fast/ops/cross_attention_similarity.py.
//
// A slot holds some images, whose gradients it owns, and its part of the gradients of the weights; there are at most
// 16, whatever the number of threads. An image's tile of captions is as in the forward pass. The gradients of a pair's
// words and caption are kept for each pair, and added to those of the tensors in the pairs' order. So the bits depend
// on the list of pairs alone. Scratch: a slot's sums, 2 MiB at D 1024 and S 256, W and W_g, a tile for every thread,
// and D values for each node.
#include "similarity_pairs.h"
#include "similarity_sums.h"

namespace itm_fast {
namespace {

constexpr int64_t MOST_SLOTS = 16;

template <class T, class E = T>
struct PairGradients {
  const SimilarityNodesOfPairsCall& call;
  const SimilarityPairs pairs;
  const RowSets images, words;
  const Gradients local, global;
  const FeaturePanels<E> w;
  FeaturePanels<T> global_w;
  Buffer<T> d_words, d_captions;  // of the pairs, one after the other: [pairs' words][D], [pairs][D]

  explicit PairGradients(const SimilarityNodesOfPairsCall& call)
      : call(call), pairs(call), images(regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths)),
        words(captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens)),
        local{call.d_image, call.d_words, call.d_local_weight, call.d_local_bias},
        global{call.d_image_global, call.d_caption_global, call.d_global_weight, call.d_global_bias},
        w(feature_rows<T, E>({call.local_weight, call.dtype}, call.S, call.D)),
        global_w(call.D, global.any() ? call.S : 0),
        d_words(local.query ? (pairs.bounds[pairs.count] - pairs.count) * call.D : 0),
        d_captions(global.query ? pairs.count * call.D : 0) {
    if (global.any()) global_w.read_rows({call.global_weight, call.dtype}, 0, call.S, 0);
  }

  void run() {
    const int64_t count = int64_t(pairs.images.size()), slots = std::max<int64_t>(1, least(MOST_SLOTS, count));
    SlotSums<T> sums(slots), global_sums(slots);
    parallel(slots, call.threads, [&] {
      return [&, worker = Worker(*this)](int64_t slot) mutable {
        sums[slot].emplace(sums_of<T>(local, call.D, call.S));
        global_sums[slot].emplace(sums_of<T>(global, global.any() ? call.D : 0, call.S));
        for (int64_t image = count * slot / slots; image < count * (slot + 1) / slots; ++image)
          for (const Run& run : pairs.images[image]) worker.run(run, *sums[slot], *global_sums[slot]);
      };
    });
    add_sums(sums, local, call.D, call.S, call.threads);
    if (global.any()) add_sums(global_sums, global, call.D, call.S, call.threads);
    std::vector<std::vector<int64_t>> of_caption(call.T);
    for (int64_t k = 0; k < pairs.count; ++k) of_caption[pairs.caption[k]].push_back(k);
    parallel(call.T, call.threads, [&] {
      return [&](int64_t t) {
        for (const int64_t k : of_caption[t]) {
          if (local.query)
            add(d_words + word(k) * call.D, words.length(t) * call.D,
                static_cast<T*>(local.query) + words.first[t] * call.D);
          if (global.query) add(d_captions + k * call.D, call.D, static_cast<T*>(global.query) + t * call.D);
        }
      };
    });
  }

 private:
  int64_t word(int64_t pair) const { return pairs.bounds[pair] - pair; }  // its first, of all pairs' words

  static void add(const T* from, int64_t n, T* to) {
    for (int64_t k = 0; k < n; ++k) to[k] += from[k];
  }

  // One thread's scratch.
  struct Worker {
    PairGradients& p;
    SimilarityGradient<T, E> tile;
    SimilarityGradient<T> global_tile;
    HeldContexts<T, E> x;
    RunColumns<T> columns;
    FeaturePanels<T> rows, d_q, d_x, global_x, global_rows, global_d_q, global_d_x;
    Buffer<T> room, s;

    explicit Worker(PairGradients& p)
        : p(p), tile(p.images.most, p.images.most, p.pairs.widest, p.call.D, p.call.S),
          global_tile(0, 0, p.pairs.most, p.call.D, p.call.S), x(p.images.most, p.images.most, p.call.D),
          columns(p.pairs, p.call.D), rows(p.call.D, p.pairs.widest), d_q(p.call.D, p.pairs.widest),
          d_x(p.call.D, p.images.most), global_x(p.call.D, 1), global_rows(p.call.D, p.pairs.most),
          global_d_q(p.call.D, p.pairs.most), global_d_x(p.call.D, 1), room(p.call.S),
          s(round_up(p.call.S, LANES<T>)) {}

    void run(const Run& run, SimilaritySums<T>& sums, SimilaritySums<T>& global_sums) {
      const SimilarityNodesOfPairsCall& call = p.call;
      const int64_t D = call.D, S = call.S, image = run.image, R = p.images.length(image);
      const std::vector<int64_t> row_of = p.pairs.rows(run);
      const auto gradient = [&](auto row) {
        return [&, row](int64_t, int64_t j, T* to) {
          std::copy_n(read<T>({call.grad, call.dtype}, row(j) * S, S, room), S, to);
          if (!call.nodes) return;
          std::copy_n(read<T>({call.nodes, call.dtype}, row(j) * S, S, room), S, s + 0);
          backward_of_norm<T>(to, S, s, static_cast<const T*>(call.inverse)[row(j)]);
        };
      };
      const auto row = [&](int64_t j) { return row_of[j]; };
      const auto global_row = [&](int64_t k) { return p.pairs.bounds[run.first + k]; };

      x.clear();
      x.add(R);
      x.read_set(0, p.images.source, p.images.first[image]);
      x.multiply_set(0);
      columns.read(p.pairs, run, p.words);
      for (int64_t k = 0; k < run.sets(); ++k) {
        const int64_t caption = p.pairs.caption[run.first + k];
        rows.read_rows(p.words.source, p.words.first[caption], p.words.length(caption), run.edge[k]);
        if (p.global.any()) global_rows.read_rows({call.caption_global, call.dtype}, caption, 1, k);
      }
      d_q.clear();
      d_x.clear();
      tile.run(x, Norm::CLIPPED_L2NORM, T(call.scale), run.edge.data(), run.sets(), nullptr, p.w, columns.words, rows,
               gradient(row), sums, d_q, d_x);
      if (p.local.context) add_rows(p.images, image, p.local.context, d_x, 0);
      for (int64_t j = 0; p.local.query && j < run.columns(); ++j)
        d_q.add_row_to(p.d_words + (p.word(run.first) + j) * D, j);
      if (!p.global.any()) return;
      global_x.read_rows({call.image_global, call.dtype}, image, 1, 0);
      global_d_q.clear();
      global_d_x.clear();
      global_tile.run_unweighted(global_x, 1, run.sets(), p.pairs.most, p.global_w, global_rows, gradient(global_row),
                                 global_sums, global_d_q, global_d_x);
      if (p.global.context) global_d_x.add_row_to(static_cast<T*>(p.global.context) + image * D, 0);
      for (int64_t k = 0; p.global.query && k < run.sets(); ++k)
        global_d_q.add_row_to(p.d_captions + (run.first + k) * D, k);
    }
  };
};

}  // namespace
}  // namespace itm_fast

// Adds to the gradients of the eight tensors that are not null. They have their tensors' shapes, are float, or double
// if the tensors are double, and hold zeros. grad has the shape and dtype of `nodes`; nodes and inverse are the results
// of the forward pass, or null: grad is then the gradient of every node's y.
extern "C" const char* similarity_nodes_of_pairs_backward(const itm_fast::SimilarityNodesOfPairsCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return PairGradients<double>(call).run();
#if defined(__AVX512BF16__)
    if (call.bfloat16) return PairGradients<float, Pair>(call).run();
#endif
    PairGradients<float>(call).run();
  });
}
