// What the two rounds of the backward pass of cross_attention_score hand on: windows of queries and of contexts as the
// right sides of products, and the gradients that each owner adds to.
#pragma once
#include <deque>

#include "cross_attention_score.h"

namespace itm_fast {

// Bytes of a window of queries, once for the affinities and once more as rows; bytes of a window of contexts, of both
// kinds of rows and the affinity gradients. Columns of a chunk, and of the chunks that a product over columns takes
// together; panels of features of a part.
constexpr int64_t QUERY_BYTES = 12 << 20, CONTEXT_BYTES = 20 << 20, COLUMN_BYTES = 224 * 4, SPAN_BYTES = 1024 * 4;
constexpr int64_t FEATURE_PANELS = 8;

// With a gradient of at most one pair in so many, only such pairs are taken: FEW of itm_fast/ops/_recompute.py.
constexpr int64_t FEW = 8;

// Rows that a product over rows takes together: two of bfloat16 values.
template <class E>
constexpr int64_t PER_ROW = IS_PAIR<E> ? 2 : 1;

// Rows as the right side of a product over K rows: [panel of features][K][TILE_COLUMNS], zeros beyond D; of pairs,
// [K / 2]: an even row and the one after it, zeros after the last one if `count` is odd.
template <class T, class E>
void feature_panels(const T* const* row, int64_t count, int64_t D, E* out, int64_t K) {
  for (int64_t k = 0; k < D; k += TILE_COLUMNS<T>)
#if defined(__AVX512BF16__)
    if constexpr (IS_PAIR<E>) {
      for (int64_t r = 0; r < count; r += 2)
        for (int64_t j = k; j < least(k + TILE_COLUMNS<T>, D); j += LANES<T>) {
          const Vec<T> odd = r + 1 < count ? head(row[r + 1] + j, D - j) : Vec<T>{};
          const Vec<T> both = in_pairs(head(row[r] + j, D - j), odd);
          std::memcpy(static_cast<void*>(out + (k * K + r * TILE_COLUMNS<T>) / 2 + j - k), &both, sizeof both);
        }
    } else
#endif
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(static_cast<void*>(out + k * K + r * TILE_COLUMNS<T>), row[r] + k,
                  size_t(least(TILE_COLUMNS<T>, D - k)) * sizeof(T));
}

// The first n values of each row of s, ld apart, as part of a left side: its rows are those of s, `out` is where the
// first one's panel begins, and the values come at `at` of its depth. `room` holds TILE_ROWS rows of pairs where
// E is Pair.
template <class T, class E>
void pack_left(const T* s, int64_t ld, int64_t rows, int64_t n, E* out, int64_t depth_of_all, int64_t at, T* room) {
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    const T* row[TILE_ROWS];
    const int64_t count = least(TILE_ROWS, rows - i), wide = least(TILE_ROWS, round_up(rows - i, ROW_STEP));
    for (int64_t r = 0; r < count; ++r) {
      row[r] = s + (i + r) * ld;
#if defined(__AVX512BF16__)
      if constexpr (IS_PAIR<E>) row[r] = paired(row[r], n, room + r * paired_size<T>(n));
#endif
    }
    // Pairs have the size of a float, and are only moved.
    interleave(row, count, depth<E>(n), reinterpret_cast<T*>(out + i * depth_of_all + at / PER_ROW<E> * wide), wide);
  }
}

// The rows of s, ld apart, as part of a left side whose depth is rows: `rows` of them, and zeros up to a multiple of
// ROW_STEP, from depth `first` on; n columns.
template <class T, class E>
void pack_turned(const T* s, int64_t ld, int64_t rows, int64_t n, E* out, int64_t depth_of_all, int64_t first) {
  for (int64_t x = 0; x < round_up(rows, ROW_STEP); x += PER_ROW<E>)
    for (int64_t j = 0; j < n; j += TILE_ROWS) {
      const int64_t wide = least(TILE_ROWS, round_up(n - j, ROW_STEP));
      E* const to = out + j * depth_of_all + (first + x) / PER_ROW<E> * wide;
#if defined(__AVX512BF16__)
      if constexpr (IS_PAIR<E>) {
        const auto at = [&](int64_t r) { return r < rows ? load(s + r * ld + j) : Vec<T>{}; };
        store_head(reinterpret_cast<T*>(to), in_pairs(at(x), at(x + 1)), wide);
        continue;
      }
#endif
      if (x < rows) std::memcpy(static_cast<void*>(to), s + x * ld + j, size_t(wide) * sizeof(T));
      else std::memset(static_cast<void*>(to), 0, size_t(wide) * sizeof(E));
    }
}

// The rows of a gradient that a run of sets owns.
template <class T>
struct Gradient {
  T* data;
  int64_t D;
  std::vector<int64_t> row;

  Gradient(T* data, const RowSets& sets, const Chunk& run) : data(data), D(sets.D) {
    for (int64_t s = run.first; s < run.last; ++s)
      for (int64_t r = 0; r < sets.length(s); ++r) row.push_back(sets.first[s] + r);
    while (row.size() % ROW_STEP) row.push_back(row.back());  // which a product starts from, but does not store
  }
  Vec<T> get(int64_t i, int64_t k) const { return head(data + row[size_t(i)] * D + k, D - k); }
  void put(int64_t i, int64_t k, Vec<T> v) const {
    std::memcpy(static_cast<void*>(data + row[size_t(i)] * D + k), &v, size_t(least(LANES<T>, D - k)) * sizeof(T));
  }
  // Adds A B to `rows` rows from `first` on, features `from` to `to`, whose panels, `step` values apart, B is.
  template <class E>
  void add(int64_t first, int64_t rows, int64_t K, Left<E> a, const E* panels, int64_t step, int64_t from,
           int64_t to) const {
    for (int64_t k = from; k < to; k += TILE_COLUMNS<T>) {
      const E* const panel = panels + (k - from) / TILE_COLUMNS<T> * step;
      gemm<E>(rows, least(TILE_COLUMNS<T>, D - k), K, a,
              Right<E>{panel, TILE_COLUMNS<T>, k + TILE_COLUMNS<T> < to ? panel + step : nullptr},
              [&](int64_t i, int64_t j) { return get(least(first + i, int64_t(row.size()) - 1), k + j); },
              [&](int64_t i, int64_t j, Vec<T> v) { put(first + i, k + j, v); });
    }
  }
};

// A column whose |P|^2 came from P itself: its part of d x is weight * alpha P^T, which dG x would lose by the same
// cancellation. (G alpha in (9) loses no more than x . P does: both are exact to a rounding of |x|^2.)
template <class T>
struct Exact {
  int64_t set;
  T weight;
  std::vector<T> alpha;
};

// Chunks whose columns one product takes together.
struct Span {
  int64_t first, last;     // chunks
  int64_t begin, columns;  // of the window's
};

// A window's queries once more, as the right side of products over columns. E as for Block.
template <class T, class E>
struct Queries {
  std::vector<Span> spans;
  std::vector<int64_t> span_of, at;  // of each chunk; where its columns begin there
  std::vector<Buffer<E>> features;
  int64_t columns = 0;

  Queries(const Window<T, E>& window, bool wanted, int64_t threads) {
    const RowSets& sets = window.sets;
    for (int64_t c = 0; c < int64_t(window.chunks.size()); ++c) {
      const int64_t more = round_up(window.chunks[size_t(c)].rows, PER_ROW<E>);
      if (spans.empty() || spans.back().columns + more > SPAN_BYTES / int64_t(sizeof(T)))
        spans.push_back({c, c, columns, 0});
      spans.back().last = c + 1;
      at.push_back(spans.back().columns);
      spans.back().columns += more;
      span_of.push_back(int64_t(spans.size()) - 1);
      columns += more;
    }
    if (!wanted) return;
    for (const Span& span : spans)
      features.push_back(Buffer<E>::zeros(round_up(sets.D, TILE_COLUMNS<T>) * depth<E>(span.columns), threads));
    parallel(int64_t(window.chunks.size()), threads, [&] {
      return [&, rows = Rows<T>(sets, Block<T>::most_rows(window.chunks))](int64_t c) mutable {
        const Chunk& chunk = window.chunks[size_t(c)];
        const Span& span = spans[size_t(span_of[size_t(c)])];
        rows.take(chunk);
        feature_panels(rows + 0, chunk.rows, sets.D,
                       features[size_t(span_of[size_t(c)])] + at[size_t(c)] / PER_ROW<E> * TILE_COLUMNS<T>,
                       span.columns);
      };
    });
  }
};

// Blocks of contexts that are in memory together, and what the chunks of queries leave for them. The rows of a block
// begin at a multiple of ROW_STEP, zeros before it.
template <class T, class E>
struct ContextRows {
  std::deque<Block<T, E>> block;
  std::vector<int64_t> row{0}, gram{0};  // where a block begins among padded rows, and its Gram matrices
  Buffer<E> features, d_affinity;
  Buffer<T> exact_features;                  // the features themselves, where the others are of pairs
  std::vector<Buffer<T>> d_gram;             // of each chunk
  std::vector<std::vector<Exact<T>>> exact;  // of each chunk and block

  ContextRows(const Problem& problem, const Chunk* first, const Chunk* last, const Queries<T, E>& queries, bool known,
           int64_t threads)
      : row(begins(first, last)), features(Buffer<E>::zeros(wide(problem) * depth<E>(row.back()), threads)),
        d_affinity(Buffer<E>::zeros(row.back() * depth<E>(queries.columns), threads)),
        exact_features(
            Buffer<T>::zeros(IS_PAIR<E> && problem.lengths() ? wide(problem) * row.back() : 0, threads)),
        exact(queries.span_of.size() * size_t(last - first)) {
    const RowSets& sets = problem.context;
    for (const Chunk* run = first; run < last; ++run) {
      block.emplace_back(problem, std::vector<Chunk>{*run}, known);
      gram.push_back(gram.back() + (problem.lengths() ? Block<T>::most_gram(sets, {*run}) : 0));
    }
    for (size_t c = 0; c < queries.span_of.size(); ++c) d_gram.emplace_back(gram.back());
    parallel(int64_t(block.size()), threads, [&] {
      return [&](int64_t b) {
        block[size_t(b)].take(first[b]);
        const auto panels = [&](auto* out) {
          constexpr int64_t per = PER_ROW<std::decay_t<decltype(*out)>>;
          feature_panels(block[size_t(b)].rows + 0, first[b].rows, sets.D, out + row[size_t(b)] / per * TILE_COLUMNS<T>,
                         row.back());
        };
        panels(features + 0);
        if (IS_PAIR<E> && problem.lengths()) panels(exact_features + 0);
      };
    });
  }
  static std::vector<int64_t> begins(const Chunk* first, const Chunk* last) {
    std::vector<int64_t> row{0};
    for (const Chunk* run = first; run < last; ++run) row.push_back(row.back() + round_up(run->rows, ROW_STEP));
    return row;
  }
  static int64_t wide(const Problem& problem) { return round_up(problem.context.D, TILE_COLUMNS<T>); }
  // All rows' features from row r of block b on, in panels of row.back() rows.
  const T* features_of(int64_t b, int64_t r) const {
    const T* all;
    if constexpr (IS_PAIR<E>) all = exact_features;
    else all = features;
    return all + (row[size_t(b)] + r) * TILE_COLUMNS<T>;
  }
  // Affinity gradients of a block and a span, as a left side whose rows are contexts.
  E* left(int64_t b, const Span& span) const {
    return d_affinity + row.back() * depth<E>(span.begin) + row[size_t(b)] * depth<E>(span.columns);
  }
  std::vector<Exact<T>>& exact_of(int64_t b, int64_t c) { return exact[size_t(c) * block.size() + size_t(b)]; }
};

}  // namespace itm_fast
