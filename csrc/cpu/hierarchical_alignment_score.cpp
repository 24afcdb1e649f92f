// Scores of all pairs: (1) to (9) of itm_fast/ops/hierarchical_alignment_score.py.
//
// A window of captions is prepared once for all threads: their keys and, with scalar gates, their features as the right
// side of products, and each caption's Gram matrix and numbers (alignment.h); with vector gates their rows and gates. A
// thread owns some images with some of the window's chunks at a time and keeps the images packed in its second cache.
// For each chunk it computes the affinities with all its images by one product, the products of features by another,
// and the scores pair by pair in the first caches. Only scores leave.
// For a backward pass, the affinities and, with scalar gates, the products of features of all pairs leave too.
//
// E is what these two products multiply, and those of attention and rows where vectors are formed: T, or pairs of
// bfloat16 values with sums in float32. All else is computed in T; the Gram matrices are then of the rounded rows
// (`item`).
//
// Scratch beyond inputs and results: a window (32 MiB) and 2 to 3 MiB a thread, more only where one caption alone is
// larger.
#include <memory>

#include "alignment_items.h"
#include "alignment_vectors.h"
#include "calls/hierarchical_alignment_score.h"
#include "calls/hierarchical_alignment_score_kept.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t WINDOW_BYTES = 32 << 20, COLUMNS = 384;

// n rows, `place(i)` of the tensor, in panels of at most `wide` rows, k-major; a panel is padded to a multiple of
// `step`.
template <class T, class E, class Place>
void pack(Source source, int64_t n, int64_t D, int64_t wide, int64_t step, Place place, E* out) {
  Buffer<T> room(wide * D), pairs(IS_PAIR<E> ? wide * paired_size<T>(D) : 0);
  const T* row[TILE_COLUMNS<T>];
  for (int64_t i = 0; i < n; i += wide) {
    const int64_t count = least(wide, n - i);
    for (int64_t r = 0; r < count; ++r) row[r] = read<T>(source, place(i + r) * D, D, room + r * D);
    pack_panel(row, count, D, out + i * depth<E>(D), least(wide, round_up(n - i, step)), pairs + 0);
  }
}

// n rows as the left side of a product.
template <class T, class E>
void pack_left(Source source, const std::vector<int64_t>& rows, int64_t D, E* out) {
  pack<T>(source, int64_t(rows.size()), D, TILE_ROWS, ROW_STEP, [&](int64_t i) { return rows[size_t(i)]; }, out);
}

// n rows from `first` on as the right side: panels as wide as a tile, [panel][depth of D][TILE_COLUMNS].
template <class T, class E>
void panels(Source source, int64_t first, int64_t n, int64_t D, E* out) {
  pack<T>(source, n, D, TILE_COLUMNS<T>, TILE_COLUMNS<T>, [&](int64_t i) { return first + i; }, out);
}

// A chunk of captions, shared by the threads.
template <class T, class E>
struct Captions {
  Chunk chunk;
  int64_t columns;
  Buffer<E> keys, features;
  std::vector<Item<T>> items;

  Captions(const AlignmentCall& call, const Chunk& chunk, const Pools<T>& pools)
      : chunk(chunk), columns(round_up(chunk.rows, TILE_COLUMNS<T>)), keys(columns * depth<E>(call.P)),
        features(call.vector() ? 0 : columns * depth<E>(call.D)) {
    panels<T>(call.word_key, chunk.begin, chunk.rows, call.P, keys + 0);
    if (!call.vector()) panels<T>(call.words, chunk.begin, chunk.rows, call.D, features + 0);
    const Modality words{call.words, call.word_gate, 1};
    for (int64_t t = chunk.first; t < chunk.last; ++t)
      items.push_back(item<T, E>(call, words, call.cu_seqlens[t], call.cu_seqlens[t + 1] - call.cu_seqlens[t], pools,
                                 call.vector()));
  }
};

// What a backward pass takes from the forward pass, or null: affinities of all pairs and, with scalar gates, products
// of features, [I][R][N], and 1 for pairs whose vectors were formed, else 0, [I][T].
template <class T>
struct Kept {
  T *affinity = nullptr, *product = nullptr, *formed = nullptr;
};

// A thread's images, and its arrays.
template <class T, class E>
class Worker {
 public:
  Worker(const AlignmentCall& call, const Pools<T>& pools, const Kept<T>& kept, int64_t most_rows, int64_t columns,
         int64_t longest)
      : call_(call), pools_(pools), kept_(kept), ld_(padded<T>(columns)),
        keys_(packed_size(most_rows, depth<E>(call.P))),
        features_(call.vector() ? 0 : packed_size(most_rows, depth<E>(call.D))), affinity_(most_rows * ld_),
        product_(call.vector() ? 0 : most_rows * ld_), a_(call.R * Item<T>::whole(longest)),
        c_(call.R * Item<T>::whole(longest)), coefficients_(call.problem, call.R, longest),
        pair_vectors_(call.problem, call.R, longest, pools.wide) {}

  void take(int64_t first, int64_t last) {
    const Modality images{call_.image, call_.image_gate, 0};
    std::vector<int64_t> rows;
    first_ = first;
    items_.clear();
    for (int64_t i = first; i < last; ++i) {
      items_.push_back(item<T, E>(call_, images, i * call_.R, call_.regions(i), pools_, call_.vector()));
      for (int64_t r = 0; r < call_.regions(i); ++r) rows.push_back(i * call_.R + r);
    }
    rows_ = int64_t(rows.size());
    pack_left<T>(call_.image_key, rows, call_.P, keys_ + 0);
    if (!call_.vector()) pack_left<T>(call_.image, rows, call_.D, features_ + 0);
  }

  void run(const Captions<T, E>& captions) {
    multiply(keys_, captions.keys, depth<E>(call_.P), captions, affinity_);
    if (!call_.vector()) multiply(features_, captions.features, depth<E>(call_.D), captions, product_);
    if (kept_.affinity) keep(affinity_, captions, kept_.affinity);
    if (kept_.product) keep(product_, captions, kept_.product);
    int64_t row = 0;
    for (size_t k = 0; k < items_.size(); row += items_[k++].n)
      for (int64_t t = captions.chunk.first; t < captions.chunk.last; ++t) {
        const Item<T>&image = items_[k], &caption = captions.items[size_t(t - captions.chunk.first)];
        const int64_t at = row * ld_ + call_.cu_seqlens[t] - captions.chunk.begin, i = first_ + int64_t(k);
        gather<T, false>(affinity_ + at, ld_, image.n, caption.n, a_);
        T score;
        if (call_.vector()) {
          score = pair_vectors_.score(a_, image, caption, true, pools_.image, pools_.caption);
        } else {
          gather<T, false>(product_ + at, ld_, image.n, caption.n, c_);
          score = coefficients_.score(a_, c_, image, caption);
          if (coefficients_.poor) score = formed(i, t);
          if (kept_.formed) kept_.formed[i * call_.T + t] = coefficients_.poor;
        }
        write(call_.score, call_.image.dtype, i * call_.T + t, 1, &score, T(1));
      }
  }

 private:
  void multiply(const E* left, const E* right, int64_t K, const Captions<T, E>& captions, T* out) {
    for (int64_t j = 0; j < captions.columns; j += TILE_COLUMNS<T>)
      gemm<E>(rows_, TILE_COLUMNS<T>, K, Left<E>{left, 0},
              Right<E>{right + j * K, TILE_COLUMNS<T>,
                       right + least(j + TILE_COLUMNS<T>, captions.columns - TILE_COLUMNS<T>) * K},
              [](int64_t, int64_t) { return Vec<T>{}; },
              [&](int64_t i, int64_t jj, Vec<T> v) { store(out + i * ld_ + j + jj, v); });
  }

  // Copies a chunk's columns of all rows to where a tensor [I][R][N] has them.
  void keep(const T* from, const Captions<T, E>& captions, T* all) {
    int64_t row = 0;
    for (size_t k = 0; k < items_.size(); ++k)
      for (int64_t r = 0; r < items_[k].n; ++r, ++row)
        std::copy_n(from + row * ld_, captions.chunk.rows,
                    all + ((first_ + int64_t(k)) * call_.R + r) * call_.cu_seqlens[call_.T] + captions.chunk.begin);
  }

  // The pair's score from its vectors, which its coefficients cannot give.
  T formed(int64_t i, int64_t t) {
    const Modality images{call_.image, call_.image_gate, 0};
    const Modality words{call_.words, call_.word_gate, 1};
    const int64_t begin = call_.cu_seqlens[t];
    return pair_vectors_.score(a_, item<T, E>(call_, images, i * call_.R, call_.regions(i), pools_, true),
                               item<T, E>(call_, words, begin, call_.cu_seqlens[t + 1] - begin, pools_, true), false,
                               pools_.image, pools_.caption);
  }

  const AlignmentCall& call_;
  const Pools<T>& pools_;
  const Kept<T> kept_;
  int64_t ld_, first_ = 0, rows_ = 0;
  Buffer<E> keys_, features_;
  Buffer<T> affinity_, product_, a_, c_;
  Coefficients<T> coefficients_;
  PairVectors<T, E> pair_vectors_;
  std::vector<Item<T>> items_;
};

template <class T, class E = T>
void scores(const AlignmentCall& call, const Kept<T>& kept = {}) {
  if (!call.I || !call.T) return;
  const Pools<T> pools(call);
  // Images whose packed rows, keys and features, are 0.6 MB; with vector gates one, for its rows fill the second cache.
  const int64_t fitting = BLOCK_BYTES / int64_t(sizeof(T)) / std::max<int64_t>(1, call.R * (call.D + call.P));
  const int64_t images = call.vector() ? 1 : std::max<int64_t>(1, fitting), blocks = (call.I + images - 1) / images;
  const int64_t factor = int64_t(sizeof(E));
  const int64_t each = factor * depth<E>(call.P) +  // bytes of a word in a window
                       (call.vector() ? int64_t(sizeof(T)) * (IS_PAIR<E> ? 4 : 3) * call.D : factor * depth<E>(call.D));
  const std::vector<Chunk> all = chunks(call.cu_seqlens, call.T, COLUMNS * 4 / int64_t(sizeof(T)));
  int64_t longest = 0, columns = 0;
  for (int64_t t = 0; t < call.T; ++t) longest = std::max(longest, call.cu_seqlens[t + 1] - call.cu_seqlens[t]);
  for (const Chunk& chunk : all) columns = std::max(columns, chunk.rows);
  for (size_t begin = 0; begin < all.size();) {
    size_t end = begin;
    int64_t bytes = 0;
    do bytes += all[end++].rows * each;
    while (end < all.size() && bytes + all[end].rows * each <= WINDOW_BYTES);
    const int64_t count = int64_t(end - begin), groups = least(count, (PARTS + blocks - 1) / blocks);
    std::vector<std::unique_ptr<Captions<T, E>>> window(static_cast<size_t>(count));
    parallel(count, call.threads, [&] {
      return [&](int64_t c) {
        window[size_t(c)] = std::make_unique<Captions<T, E>>(call, all[begin + size_t(c)], pools);
      };
    });
    parallel(blocks * groups, call.threads, [&] {
      return [&, worker = Worker<T, E>(call, pools, kept, images * call.R, columns, longest)](int64_t part) mutable {
        const int64_t group = part % groups, first = part / groups * images;
        worker.take(first, least(first + images, call.I));
        for (int64_t c = count * group / groups; c < count * (group + 1) / groups; ++c) worker.run(*window[size_t(c)]);
      };
    });
    begin = end;
  }
}

}  // namespace
}  // namespace itm_fast

// Writes score [I, T] in the dtype of the tensors; shapes: calls/, who owns what: calls.cpp.
extern "C" const char* hierarchical_alignment_score(const itm_fast::HierarchicalAlignmentScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return scores<double>(AlignmentCall(call));
#if defined(__AVX512BF16__)
    if (call.bfloat16) return scores<float, Pair>(AlignmentCall(call));
#endif
    scores<float>(AlignmentCall(call));
  });
}

// The same, and `products`, float, or double if the tensors are double: the affinities [I, R, N] and, with scalar
// gates, the products of features [I, R, N] and which pairs' vectors were formed [I, T]; and a vector's room.
extern "C" const char* hierarchical_alignment_score_kept(const itm_fast::HierarchicalAlignmentScoreKeptCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const int64_t each = call.I * call.R * call.N;
    const AlignmentCall asked(call);
    const auto run = [&]<class T, class E>(T* products, E) {
      Kept<T> kept{products};
      if (!asked.vector()) kept.product = products + each, kept.formed = products + 2 * each;
      scores<T, E>(asked, kept);
    };
    if (call.dtype == Dtype::FLOAT64) return run(static_cast<double*>(call.products), double());
#if defined(__AVX512BF16__)
    if (call.bfloat16) return run(static_cast<float*>(call.products), Pair());
#endif
    run(static_cast<float*>(call.products), float());
  });
}
