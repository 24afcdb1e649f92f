// Scores of all pairs: (1) to (9) of itm_fast/ops/hierarchical_alignment_score.py.
//
// A window of captions is prepared once for all threads: their keys and, with scalar gates, their features as the right
// side of products, and each caption's Gram matrix and numbers (alignment.h); with vector gates their rows and gates. A
// thread owns some images with some of the window's chunks at a time and keeps the images packed in its second cache.
// For each chunk it computes the affinities with all its images by one product, the products of features by another,
// and the scores pair by pair in the first caches. Only scores leave.
//
// Scratch beyond inputs and scores: a window (32 MiB) and 2 to 3 MiB a thread, more only where one caption alone is
// larger.
#include <memory>

#include "alignment.h"
#include "cross_attention_score.h"

namespace itm_fast {
namespace {

constexpr int64_t WINDOW_BYTES = 32 << 20, COLUMNS = 384;

struct Call {
  Source image, image_key, image_gate, words, word_key, word_gate, image_pool, caption_pool;
  int64_t I, R, D, P, K, T;
  const int64_t *cu_seqlens, *region_lengths;
  Alignment problem;
  void* score;
  int64_t threads;

  explicit Call(const HierarchicalAlignmentScoreCall& c)
      : image{c.image, c.dtype}, image_key{c.image_key, c.dtype}, image_gate{c.image_gate, c.dtype},
        words{c.words, c.dtype}, word_key{c.word_key, c.dtype}, word_gate{c.word_gate, c.dtype},
        image_pool{c.image_pool, c.dtype}, caption_pool{c.caption_pool, c.dtype}, I(c.I), R(c.R), D(c.D), P(c.P),
        K(c.K), T(c.T), cu_seqlens(c.cu_seqlens), region_lengths(c.region_lengths),
        problem{c.direction != Direction::T2I, c.direction != Direction::I2T, c.pool == Pool::MEAN, c.scale,
                c.local_mix, c.global_mix},
        score(c.score), threads(c.threads) {}

  bool vector() const { return K > 1; }
  int64_t regions(int64_t i) const { return region_lengths ? region_lengths[i] : R; }
};

// One modality's tensors. `own`: 0 for images, 1 for words; it is also which of a row's two gate terms belongs to the
// gate of its own side, the other one being for the other side's gate.
struct Modality {
  Source rows, keys, gates;
  int64_t own;
};

template <class T>
struct Pools {
  int64_t wide;
  Buffer<T> image, caption;

  explicit Pools(const Call& call)
      : wide(round_up(call.D, LANES<T>)), image(wide), caption(wide) {
    Buffer<T> room(call.D);
    std::copy_n(read<T>(call.image_pool, 0, call.D, room), call.D, image + 0);
    std::copy_n(read<T>(call.caption_pool, 0, call.D, room), call.D, caption + 0);
  }
};

// Rows first .. first + n as an Item; `formed`: the item will be used where vectors of a pair are formed.
template <class T>
Item<T> item(const Call& call, const Modality& from, int64_t first, int64_t n, const Pools<T>& pools, bool formed) {
  const int64_t D = call.D, K = call.K, wide = pools.wide;
  Item<T> made(n, !formed, formed ? wide : 0, formed && call.vector());
  Buffer<T> room(2 * std::max(D, K)), passing(formed ? 0 : n * wide);
  const T *own = from.own ? pools.caption : pools.image, *other = from.own ? pools.image : pools.caption;
  std::vector<const T*> row;
  for (int64_t i = 0; i < n; ++i) {
    T* const x = (formed ? made.rows : passing) + i * wide;
    std::copy_n(read<T>(from.rows, (first + i) * D, D, room), D, x);
    row.push_back(x);
    const T square = inner(x, x, wide);
    made.norm()[i] = std::sqrt(square);
    made.highest = std::max(made.highest, square);
    const T* const gate = read<T>(from.gates, (first + i) * 2 * K, 2 * K, room);
    if (!call.vector()) {
      made.own()[i] = gate[from.own];
      made.other()[i] = gate[1 - from.own];
      made.pool_own()[i] = inner(x, own, wide);
      made.pool_other()[i] = inner(x, other, wide);
    } else if (formed) {
      std::copy_n(gate + from.own * K, K, made.own_gates + i * wide);
      std::copy_n(gate + (1 - from.own) * K, K, made.other_gates + i * wide);
    }
  }
  if (!formed) gram_matrix<T>([&](int64_t i) { return row[size_t(i)]; }, n, wide, nullptr, made.gram, made.ld);
  return made;
}

// n rows as the left side of a product.
template <class T>
void pack(Source source, const std::vector<int64_t>& rows, int64_t D, T* out) {
  Buffer<T> room(TILE_ROWS * D);
  const int64_t n = int64_t(rows.size());
  for (int64_t i = 0; i < n; i += TILE_ROWS) {
    const T* row[TILE_ROWS];
    const int64_t count = least(TILE_ROWS, n - i);
    for (int64_t r = 0; r < count; ++r) row[r] = read<T>(source, rows[size_t(i + r)] * D, D, room + r * D);
    interleave(row, count, D, out + i * D, least(TILE_ROWS, round_up(n - i, ROW_STEP)));
  }
}

// n rows from `first` on as the right side: panels as wide as a tile, [panel][D][TILE_COLUMNS].
template <class T>
void panels(Source source, int64_t first, int64_t n, int64_t D, T* out) {
  constexpr int64_t W = TILE_COLUMNS<T>;
  Buffer<T> room(W * D);
  for (int64_t j = 0; j < n; j += W) {
    const T* row[W];
    const int64_t count = least(W, n - j);
    for (int64_t r = 0; r < count; ++r) row[r] = read<T>(source, (first + j + r) * D, D, room + r * D);
    interleave(row, count, D, out + j * D, W);
  }
}

// A chunk of captions, shared by the threads.
template <class T>
struct Captions {
  Chunk chunk;
  int64_t columns;
  Buffer<T> keys, features;
  std::vector<Item<T>> items;

  Captions(const Call& call, const Chunk& chunk, const Pools<T>& pools)
      : chunk(chunk), columns(round_up(chunk.rows, TILE_COLUMNS<T>)), keys(columns * call.P),
        features(call.vector() ? 0 : columns * call.D) {
    panels<T>(call.word_key, chunk.begin, chunk.rows, call.P, keys);
    if (!call.vector()) panels<T>(call.words, chunk.begin, chunk.rows, call.D, features);
    const Modality words{call.words, call.word_key, call.word_gate, 1};
    for (int64_t t = chunk.first; t < chunk.last; ++t)
      items.push_back(
          item<T>(call, words, call.cu_seqlens[t], call.cu_seqlens[t + 1] - call.cu_seqlens[t], pools, call.vector()));
  }
};

// A thread's images, and its arrays.
template <class T>
class Worker {
 public:
  Worker(const Call& call, const Pools<T>& pools, int64_t most_rows, int64_t columns, int64_t longest)
      : call_(call), pools_(pools), ld_(padded<T>(columns)), keys_(packed_size(most_rows, call.P)),
        features_(call.vector() ? 0 : packed_size(most_rows, call.D)), affinity_(most_rows * ld_),
        product_(call.vector() ? 0 : most_rows * ld_), a_(call.R * Item<T>::whole(longest)),
        c_(call.R * Item<T>::whole(longest)), coefficients_(call.problem, call.R, longest),
        explicit_(call.problem, call.R, longest, pools.wide) {}

  void take(int64_t first, int64_t last) {
    const Modality images{call_.image, call_.image_key, call_.image_gate, 0};
    std::vector<int64_t> rows;
    first_ = first;
    items_.clear();
    for (int64_t i = first; i < last; ++i) {
      items_.push_back(item<T>(call_, images, i * call_.R, call_.regions(i), pools_, call_.vector()));
      for (int64_t r = 0; r < call_.regions(i); ++r) rows.push_back(i * call_.R + r);
    }
    rows_ = int64_t(rows.size());
    pack<T>(call_.image_key, rows, call_.P, keys_);
    if (!call_.vector()) pack<T>(call_.image, rows, call_.D, features_);
  }

  void run(const Captions<T>& captions) {
    multiply(keys_, captions.keys, call_.P, captions, affinity_);
    if (!call_.vector()) multiply(features_, captions.features, call_.D, captions, product_);
    int64_t row = 0;
    for (size_t k = 0; k < items_.size(); row += items_[k++].n)
      for (int64_t t = captions.chunk.first; t < captions.chunk.last; ++t) {
        const Item<T>&image = items_[k], &caption = captions.items[size_t(t - captions.chunk.first)];
        const int64_t at = row * ld_ + call_.cu_seqlens[t] - captions.chunk.begin, i = first_ + int64_t(k);
        gather(affinity_ + at, image.n, caption, a_);
        T score;
        if (call_.vector()) {
          score = explicit_.score(a_, image, caption, true, pools_.image, pools_.caption);
        } else {
          gather(product_ + at, image.n, caption, c_);
          score = coefficients_.score(a_, c_, image, caption);
          if (coefficients_.poor) score = formed(i, t);
        }
        write(call_.score, call_.image.dtype, i * call_.T + t, 1, &score, T(1));
      }
  }

 private:
  void multiply(const T* left, const T* right, int64_t D, const Captions<T>& captions, T* out) {
    for (int64_t j = 0; j < captions.columns; j += TILE_COLUMNS<T>)
      gemm<T>(rows_, TILE_COLUMNS<T>, D, Left<T>{left, 0},
              Right<T>{right + j * D, TILE_COLUMNS<T>,
                       right + least(j + TILE_COLUMNS<T>, captions.columns - TILE_COLUMNS<T>) * D},
              [](int64_t, int64_t) { return Vec<T>{}; },
              [&](int64_t i, int64_t jj, Vec<T> v) { store(out + i * ld_ + j + jj, v); });
  }

  // Copies the columns of a caption's words, n rows of them, to [n][caption.ld], with zeros beyond the words.
  void gather(const T* from, int64_t n, const Item<T>& caption, T* to) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < caption.ld; j += LANES<T>)
        store(to + i * caption.ld + j, select<T>(inside<T>(j, 0, caption.n), load(from + i * ld_ + j), Vec<T>{}));
  }

  // The pair's score from its vectors, which its coefficients cannot give.
  T formed(int64_t i, int64_t t) {
    const Modality images{call_.image, call_.image_key, call_.image_gate, 0};
    const Modality words{call_.words, call_.word_key, call_.word_gate, 1};
    const int64_t begin = call_.cu_seqlens[t];
    return explicit_.score(a_, item<T>(call_, images, i * call_.R, call_.regions(i), pools_, true),
                           item<T>(call_, words, begin, call_.cu_seqlens[t + 1] - begin, pools_, true), false,
                           pools_.image, pools_.caption);
  }

  const Call& call_;
  const Pools<T>& pools_;
  int64_t ld_, first_ = 0, rows_ = 0;
  Buffer<T> keys_, features_, affinity_, product_, a_, c_;
  Coefficients<T> coefficients_;
  Explicit<T> explicit_;
  std::vector<Item<T>> items_;
};

template <class T>
void scores(const Call& call) {
  if (!call.I || !call.T) return;
  const Pools<T> pools(call);
  // Images whose packed rows, keys and features, are 0.6 MB; with vector gates one, for its rows fill the second cache.
  const int64_t fitting = BLOCK_BYTES / int64_t(sizeof(T)) / std::max<int64_t>(1, call.R * (call.D + call.P));
  const int64_t images = call.vector() ? 1 : std::max<int64_t>(1, fitting), blocks = (call.I + images - 1) / images;
  const int64_t each = int64_t(sizeof(T)) * (call.P + (call.vector() ? 3 : 1) * call.D);  // bytes of a word in a window
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
    std::vector<std::unique_ptr<Captions<T>>> window(static_cast<size_t>(count));
    parallel(count, call.threads, [&] {
      return [&](int64_t c) { window[size_t(c)] = std::make_unique<Captions<T>>(call, all[begin + size_t(c)], pools); };
    });
    parallel(blocks * groups, call.threads, [&] {
      return [&, worker = Worker<T>(call, pools, images * call.R, columns, longest)](int64_t part) mutable {
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

// Writes score [I, T] in the dtype of the tensors; shapes and who owns what: calls.h. Backward: the `torch` backend.
extern "C" const char* hierarchical_alignment_score(const itm_fast::HierarchicalAlignmentScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) scores<double>(Call(call));
    else scores<float>(Call(call));
  });
}
