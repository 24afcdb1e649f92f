// The two sides of cross_attention_score: the sets of rows on either side, blocks of contexts, windows of queries.
//
// Both directions run the same code. A context set (t2i: an image's regions, i2t: a caption's words) gives the rows of
// the affinities, query sets (t2i: captions, i2t: images) their columns.
#pragma once
#include "attention.h"
#include "calls/cross_attention_score.h"
#include "sets.h"
#include "shuffle.h"

namespace itm_fast {

// Sizes that keep a block of contexts (<= 0.6 MB) and the affinities of a chunk (<= 0.3 MB) in a core's second cache.
constexpr int64_t BLOCK_BYTES = 144 * 4096, BLOCK_ROWS = 144, CHUNK_BYTES = 448 * 4, PARTS = 48;

// A call's options.
struct Options {
  Norm norm;
  Pool pool;
  Weights weights;
  Similarity similarity;
  double scale, pool_scale, threshold;

  explicit Options(const CrossAttentionScoreCall& call)
      : norm(call.affinity_norm), pool(call.pool), weights(call.weights), similarity(call.similarity),
        scale(call.scale), pool_scale(call.pool_scale), threshold(call.threshold) {}

  // Whether |P| is needed, and so the contexts' Gram matrices.
  bool lengths() const { return similarity != Similarity::PRODUCT || norm == Norm::COSINE; }
  // Whether r is the largest affinity, for which no attention is computed.
  bool maxima() const {
    return weights == Weights::HARD && similarity == Similarity::PRODUCT && norm != Norm::COSINE && !over_queries(norm);
  }
};

// A call's arguments. score[c * context_step + q * query_step] belongs to context set c and query set q.
struct Problem : Options {
  RowSets context, query;
  int64_t context_step, query_step;

  explicit Problem(const CrossAttentionScoreCall& call)
      : Problem(call, regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths),
                captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens)) {}

  // The same options for some context sets and some query sets, where one of both is a single set: the pairs' scores
  // lie one after the other.
  Problem(const Problem& whole, const RowSets& contexts, const RowSets& queries) : Problem(whole) {
    context = contexts;
    query = queries;
    context_step = query_step = 1;
  }

 private:
  Problem(const CrossAttentionScoreCall& call, const RowSets& images, const RowSets& captions)
      : Options(call), context(call.direction == Direction::T2I ? images : captions),
        query(call.direction == Direction::T2I ? captions : images),
        context_step(call.direction == Direction::T2I ? call.T : 1),
        query_step(call.direction == Direction::T2I ? 1 : call.T) {}
};

// The rows of a run of sets as T: the tensor's own memory where its dtype is T, else a widened copy.
template <class T>
class Rows {
 public:
  Rows(const RowSets& sets, int64_t most)
      : sets_(sets), room_(sets.source.dtype == DTYPE<T> ? 0 : most * sets.D) {}

  void take(const Chunk& run) {
    rows_.clear();
    for (int64_t s = run.first; s < run.last; ++s)
      for (int64_t r = 0, n = sets_.length(s); r < n; ++r)
        rows_.push_back(read<T>(sets_.source, (sets_.first[s] + r) * sets_.D, sets_.D,
                                room_ + int64_t(rows_.size()) * sets_.D));
  }
  const T* const* operator+(int64_t row) const { return rows_.data() + row; }
  const T* operator[](int64_t row) const { return rows_[size_t(row)]; }

 private:
  const RowSets& sets_;
  Buffer<T> room_;
  std::vector<const T*> rows_;
};

// The first n lanes from p, n >= 1, zeros beyond them.
template <class T>
inline Vec<T> head(const T* p, int64_t n) {
  if (n >= LANES<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, size_t(n) * sizeof(T));
  return v;
}

#if defined(__AVX512BF16__)
// n values as pairs, which have the size of floats, a zero beyond an odd n. `out` has room for n in whole vectors,
// halved.
inline const float* paired(const float* x, int64_t n, float* out) {
  for (int64_t k = 0; k < n; k += LANES<float>) store_rounded(out + k / 2, head(x + k, n - k));
  return out;
}
#endif

// Values of a row of D values as pairs in whole vectors.
template <class T>
constexpr int64_t paired_size(int64_t D) {
  return round_up(D, LANES<T>) / 2;
}

// `count` rows of D values, TILE_COLUMNS at most, as a panel of a product's side: value k of row r, or pair k, becomes
// out[k * wide + r]. For pairs, `room` holds `count` rows of paired_size(D) values.
template <class T, class E>
void pack_panel(const T* const* row, int64_t count, int64_t D, E* out, int64_t wide, [[maybe_unused]] T* room) {
#if defined(__AVX512BF16__)
  if constexpr (IS_PAIR<E>) {
    const T* pairs[TILE_COLUMNS<T>];
    for (int64_t r = 0; r < count; ++r) pairs[r] = paired(row[r], D, room + r * paired_size<T>(D));
    interleave(pairs, count, depth<E>(D), reinterpret_cast<T*>(out), wide);  // moves them only
    return;
  }
#endif
  if constexpr (!IS_PAIR<E>) interleave(row, count, D, out, wide);
}

// gram[x][y] = sum over k of weight[k] row(x)[k] row(y)[k], with weights 1 where there are none; gram's rows lie ld
// apart. Sixteen products at a time, each in lanes along K.
template <class T, class Row>
inline void gram_matrix(Row row, int64_t n, int64_t K, const T* weight, T* gram, int64_t ld) {
  constexpr int64_t SIDE = 4;
  for (int64_t x = 0; x < n; x += SIDE)
    for (int64_t y = x; y < n; y += SIDE) {
      Vec<T> c[SIDE][SIDE]{};
      const T *left[SIDE], *right[SIDE];
      for (int64_t i = 0; i < SIDE; ++i) {
        left[i] = row(least(x + i, n - 1));
        right[i] = row(least(y + i, n - 1));
      }
      const auto add = [&](int64_t k, auto read) {
        Vec<T> a[SIDE], b[SIDE];
#pragma GCC unroll 4
        for (int64_t i = 0; i < SIDE; ++i) {
          a[i] = read(left[i] + k);
          b[i] = read(right[i] + k);
          if (weight) b[i] *= read(weight + k);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < SIDE; ++i)
#pragma GCC unroll 4
          for (int64_t j = 0; j < SIDE; ++j) c[i][j] += a[i] * b[j];
      };
      int64_t k = 0;
      for (; k + LANES<T> <= K; k += LANES<T>) add(k, [](const T* p) { return load(p); });
      if (k < K) add(k, [&](const T* p) { return head(p, K - k); });
      for (int64_t i = 0; i < SIDE && x + i < n; ++i)
        for (int64_t j = 0; j < SIDE && y + j < n; ++j)
          gram[(x + i) * ld + y + j] = gram[(y + j) * ld + x + i] = sum<T>(c[i][j]);
    }
}

// P = sum of weight(x) * row x, the features from `first` to `last` of D, into out; returns their |P|^2.
template <class T, class Weight>
inline T attend(const T* const* row, int64_t n, Weight weight, int64_t first, int64_t last, int64_t D, T* out) {
  Vec<T> square{};
  for (int64_t k = first; k < last; k += LANES<T>) {
    Vec<T> p{};
    for (int64_t x = 0; x < n; ++x) p += head(row[x] + k, D - k) * weight(x);
    store(out + k, p);
    square += p * p;
  }
  return sum<T>(square);
}

// A block of contexts as the left side of the affinities, unless these are known, with each set's Gram matrix where |P|
// is needed. Owned by one thread. E is what the affinities multiply: T, or pairs of bfloat16 values.
template <class T, class E = T>
struct Block {
  const RowSets& sets;
  const bool lengths, known;  // whether it has Gram matrices; whether the affinities are known
  Rows<T> rows;
  Buffer<E> packed;
  Buffer<T> grams, room;
  Chunk run{};
  std::vector<int64_t> gram_at;
  std::vector<T> highest;  // of each Gram matrix's diagonal

  Block(const Problem& problem, const std::vector<Chunk>& runs, bool known = false)
      : sets(problem.context), lengths(problem.lengths()), known(known), rows(sets, most_rows(runs)),
        packed(known ? 0 : packed_size(most_rows(runs), depth<E>(sets.D))),
        grams(lengths ? most_gram(sets, runs) : 0),
        room(IS_PAIR<E> && !known ? TILE_ROWS * paired_size<T>(sets.D) : 0) {}

  static int64_t most_rows(const std::vector<Chunk>& runs) {
    int64_t most = 0;
    for (const Chunk& run : runs) most = std::max(most, run.rows);
    return most;
  }
  static int64_t gram_size(int64_t n) { return n * round_up(n, ROW_STEP); }
  static int64_t most_gram(const RowSets& sets, const std::vector<Chunk>& runs) {
    int64_t most = 0;
    for (const Chunk& run : runs) {
      int64_t all = 0;
      for (int64_t s = run.first; s < run.last; ++s) all += gram_size(sets.length(s));
      most = std::max(most, all);
    }
    return most;
  }

  void pack() {
    for (int64_t i = 0; i < run.rows; i += TILE_ROWS)
      pack_panel(rows + i, least(TILE_ROWS, run.rows - i), sets.D, packed + i * depth<E>(sets.D),
                 least(TILE_ROWS, round_up(run.rows - i, ROW_STEP)), room + 0);
  }

  void take(const Chunk& wanted) {
    run = wanted;
    rows.take(run);
    if (!known) pack();
    gram_at.clear();
    highest.clear();
    for (int64_t s = run.first, at = 0; s < run.last; ++s) {
      const int64_t n = sets.length(s), ld = round_up(n, ROW_STEP);
      gram_at.push_back(at);
      if (!lengths) continue;
      const T* const* row = rows + (sets.edge[s] - run.begin);
      gram_matrix<T>([&](int64_t x) { return row[x]; }, n, sets.D, nullptr, grams + at, ld);
      T top = 0;
      for (int64_t x = 0; x < n; ++x) top = std::max(top, grams[at + x * ld + x]);
      highest.push_back(top);
      at += gram_size(n);
    }
  }
};

// A window of query sets as the right side of the affinities, unless these are known, shared by the threads: the
// columns of a chunk lie in panels as wide as a tile, [panel][D][TILE_COLUMNS], which a product reads from end to end;
// of pairs, [D / 2].
template <class T, class E = T>
struct Window {
  const RowSets& sets;
  const bool known;  // whether the affinities are
  std::vector<Chunk> chunks;
  std::vector<int64_t> column;  // where a chunk's columns begin
  int64_t K;                    // rows of a panel
  Buffer<E> panels;
  Buffer<T> length;  // |q| of each column
  // For pool "smoothed_negative": of each set, from its place on, [n][ld] weights exp(lambda (q_j . q_k - largest)) of
  // query k (row) in the mean for query j (column).
  const double smoothing;            // lambda, or 0
  std::vector<int64_t> smooth_at{0};
  Buffer<T> smooth;

  Window(const Problem& problem, std::vector<Chunk> runs, bool known, int64_t threads)
      : sets(problem.query), known(known), chunks(std::move(runs)), column(begins(chunks)), K(depth<E>(sets.D)),
        panels(Buffer<E>::zeros(known ? 0 : column.back() * K, threads)), length(column.back()),
        smoothing(problem.pool == Pool::SMOOTHED_NEGATIVE ? problem.pool_scale : 0), smooth(places()) {}

  static int64_t smooth_ld(int64_t n) { return round_up(n, std::max<int64_t>(LANES<T>, ROW_STEP)); }
  int64_t places() {
    for (int64_t s = chunks.front().first; smoothing > 0 && s < chunks.back().last; ++s)
      smooth_at.push_back(smooth_at.back() + sets.length(s) * smooth_ld(sets.length(s)));
    return smooth_at.back();
  }
  T* smooth_of(int64_t set) const {
    return smoothing > 0 ? smooth + smooth_at[size_t(set - chunks.front().first)] : nullptr;
  }

  static std::vector<int64_t> begins(const std::vector<Chunk>& chunks) {
    std::vector<int64_t> column{0};
    for (const Chunk& chunk : chunks) column.push_back(column.back() + round_up(chunk.rows, TILE_COLUMNS<T>));
    return column;
  }

  // The column where the panel begins that is read after the one at column j of chunk c; the last one comes again.
  int64_t after(int64_t c, int64_t j) const {
    return least(column[size_t(c)] + j + TILE_COLUMNS<T>, column.back() - TILE_COLUMNS<T>);
  }

  void fill(int64_t threads) {
    parallel(int64_t(chunks.size()), threads, [&] {
      return [&, rows = Rows<T>(sets, Block<T>::most_rows(chunks)),
              room = Buffer<T>(IS_PAIR<E> ? paired_size<T>(sets.D) * TILE_COLUMNS<T> : 0),
              total = Buffer<T>(smoothing > 0 ? smooth_ld(sets.most) : 0)](int64_t c) mutable {
        rows.take(chunks[c]);
        for (int64_t j = 0; !known && j < chunks[c].rows; j += TILE_COLUMNS<T>)
          pack_panel(rows + j, least(TILE_COLUMNS<T>, chunks[c].rows - j), sets.D, panels + (column[c] + j) * K,
                     TILE_COLUMNS<T>, room + 0);
        for (int64_t j = 0; j < chunks[c].rows; ++j) {
          const T* q = *(rows + j);
          Vec<T> square{};
          for (int64_t k = 0; k < sets.D; k += LANES<T>) {
            const Vec<T> a = head(q + k, sets.D - k);
            square += a * a;
          }
          length[column[c] + j] = std::sqrt(sum<T>(square));
        }
        for (int64_t s = chunks[c].first; smoothing > 0 && s < chunks[c].last; ++s) {
          const int64_t n = sets.length(s), ld = smooth_ld(n);
          const T* const* row = rows + (sets.edge[s] - chunks[c].begin);
          T* const near = smooth_of(s);
          gram_matrix<T>([&](int64_t x) { return row[x]; }, n, sets.D, nullptr, near, ld);
          for (int64_t i = 0; i < n * ld; i += LANES<T>) store(near + i, load(near + i) * T(smoothing));
          exponentials<T>(n, n, near, ld, total);
        }
      };
    });
  }
};

// Cuts the queries into windows of at most `bytes` of packed rows, one chunk at the least, and runs body on each.
template <class T, class E = T, class Body>
void for_windows(const Problem& problem, int64_t columns, int64_t bytes, int64_t threads, Body body,
                 bool known = false) {
  const RowSets& sets = problem.query;
  const std::vector<Chunk> all = chunks(sets.edge.data(), sets.count(), columns);
  for (size_t first = 0; first < all.size();) {
    size_t last = first;
    int64_t size = 0;
    do size += round_up(all[last++].rows, TILE_COLUMNS<T>) * sets.D * int64_t(sizeof(T));
    while (last < all.size() && size + all[last].rows * sets.D * int64_t(sizeof(T)) <= bytes);
    Window<T, E> window(problem, {all.begin() + int64_t(first), all.begin() + int64_t(last)}, known, threads);
    window.fill(threads);
    body(window);
    first = last;
  }
}

// Cuts context sets into blocks whose packed rows stay in the second cache; a block has one set at the least.
template <class T>
std::vector<Chunk> context_blocks(const RowSets& sets) {
  const int64_t rows = std::max<int64_t>(1, BLOCK_BYTES / (sets.D * int64_t(sizeof(T))));
  return chunks(sets.edge.data(), sets.count(), least(rows, BLOCK_ROWS));
}

}  // namespace itm_fast
