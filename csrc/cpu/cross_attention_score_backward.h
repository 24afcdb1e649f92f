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

// Rows as the right side of a product over K rows: [panel of features][K][TILE_COLUMNS], zeros beyond D.
template <class T>
void feature_panels(const T* const* row, int64_t count, int64_t D, T* out, int64_t K) {
  for (int64_t k = 0; k < D; k += TILE_COLUMNS<T>)
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(static_cast<void*>(out + k * K + r * TILE_COLUMNS<T>), row[r] + k,
                  size_t(least(TILE_COLUMNS<T>, D - k)) * sizeof(T));
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
  // Adds A B to `rows` rows from `first` on, features `from` to `to`; B's panels of features are `step` values apart.
  void add(int64_t first, int64_t rows, int64_t K, Left<T> a, const T* panels, int64_t step, int64_t from,
           int64_t to) const {
    for (int64_t k = from; k < to; k += TILE_COLUMNS<T>) {
      const T* const panel = panels + k / TILE_COLUMNS<T> * step;
      gemm<T>(rows, least(TILE_COLUMNS<T>, D - k), K, a,
              Right<T>{panel, TILE_COLUMNS<T>, k + TILE_COLUMNS<T> < to ? panel + step : nullptr},
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

// A window's queries once more, as the right side of products over columns.
template <class T>
struct Queries {
  std::vector<Span> spans;
  std::vector<int64_t> span_of;  // of each chunk
  std::vector<Buffer<T>> features;
  int64_t columns = 0;

  Queries(const Window<T>& window, bool wanted, int64_t threads) {
    const RowSets& sets = window.sets;
    for (int64_t c = 0; c < int64_t(window.chunks.size()); ++c) {
      const int64_t more = window.chunks[size_t(c)].rows;
      if (spans.empty() || spans.back().columns + more > SPAN_BYTES / int64_t(sizeof(T)))
        spans.push_back({c, c, columns, 0});
      spans.back().last = c + 1;
      spans.back().columns += more;
      span_of.push_back(int64_t(spans.size()) - 1);
      columns += more;
    }
    if (!wanted) return;
    for (const Span& span : spans) features.emplace_back(round_up(sets.D, TILE_COLUMNS<T>) * span.columns);
    parallel(int64_t(window.chunks.size()), threads, [&] {
      return [&, rows = Rows<T>(sets, Block<T>::most_rows(window.chunks))](int64_t c) mutable {
        const Chunk& chunk = window.chunks[size_t(c)];
        const Span& span = spans[size_t(span_of[size_t(c)])];
        rows.take(chunk);
        feature_panels(rows + 0, chunk.rows, sets.D,
                       features[size_t(span_of[size_t(c)])] + at(window, c) * TILE_COLUMNS<T>, span.columns);
      };
    });
  }
  // Where a chunk's columns begin in its span.
  int64_t at(const Window<T>& window, int64_t c) const {
    const Span& span = spans[size_t(span_of[size_t(c)])];
    return window.chunks[size_t(c)].begin - window.chunks[size_t(span.first)].begin;
  }
};

// Blocks of contexts that are in memory together, and what the chunks of queries leave for them.
template <class T>
struct Contexts {
  int64_t begin, rows;  // of the contexts
  std::deque<Block<T>> block;
  std::vector<int64_t> row{0}, gram{0};  // where a block begins among padded rows, and its Gram matrices
  Buffer<T> features, d_affinity;
  std::vector<Buffer<T>> d_gram;             // of each chunk
  std::vector<std::vector<Exact<T>>> exact;  // of each chunk and block

  Contexts(const Problem& problem, const Chunk* first, const Chunk* last, const Queries<T>& queries, int64_t threads)
      : begin(first->begin), rows(last[-1].begin + last[-1].rows - begin),
        features(round_up(problem.context.D, TILE_COLUMNS<T>) * rows),
        d_affinity((rows + (last - first) * (ROW_STEP - 1)) * queries.columns),
        exact(queries.span_of.size() * size_t(last - first)) {
    const RowSets& sets = problem.context;
    for (const Chunk* run = first; run < last; ++run) {
      block.emplace_back(problem, std::vector<Chunk>{*run});
      row.push_back(row.back() + round_up(run->rows, ROW_STEP));
      gram.push_back(gram.back() + (problem.lengths() ? Block<T>::most_gram(sets, {*run}) : 0));
    }
    for (size_t c = 0; c < queries.span_of.size(); ++c) d_gram.emplace_back(gram.back());
    parallel(int64_t(block.size()), threads, [&] {
      return [&](int64_t b) {
        block[size_t(b)].take(first[b]);
        feature_panels(block[size_t(b)].rows + 0, first[b].rows, sets.D,
                       features + (first[b].begin - begin) * TILE_COLUMNS<T>, rows);
      };
    });
  }
  // Affinity gradients of a block and a span, as a left side whose rows are contexts.
  T* left(int64_t b, const Span& span) const {
    return d_affinity + row.back() * span.begin + row[size_t(b)] * span.columns;
  }
  std::vector<Exact<T>>& exact_of(int64_t b, int64_t c) { return exact[size_t(c) * block.size() + size_t(b)]; }
};

}  // namespace itm_fast
