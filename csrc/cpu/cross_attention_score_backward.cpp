// Gradients of cross_attention_score: (8) to (11) of itm_fast/ops/cross_attention_score.py.
//
// Queries and contexts are both passed through in windows. Each pair of windows takes two rounds. In the first a thread
// owns one chunk of queries: it computes the affinities and weights with all blocks of contexts again as the forward
// pass does, turns the affinities into their gradients in place, adds the gradient of its queries, and stores the
// transposed affinity gradients and each set's Gram matrix gradient. In the second a thread owns one block of contexts
// and some of the features: it adds the gradient of these contexts from what all chunks stored, chunk by chunk in
// order. So every sum has one owner and one order, whatever the number of threads.
//
// Scratch beyond inputs and gradients: 48 MiB and 2 MiB a thread, more only where one set alone is larger.
#include <deque>

#include "cross_attention_score.h"

namespace itm_fast {
namespace {

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

template <class T>
struct Backward {
  const Problem& problem;
  const T* grad;
  T *d_context, *d_query;
  int64_t threads;

  // A thread's arrays for one chunk of queries.
  struct Work : Cosines<T> {
    Buffer<T> slope, d_r, direct, twice, rest, d_length;
    Buffer<T> turned;  // affinity gradients as a left side whose rows are queries
    Work(const Problem& problem, int64_t rows, int64_t set_rows, int64_t columns, int64_t all_rows)
        : Cosines<T>(problem, rows, set_rows, columns), slope(round_up(set_rows, ROW_STEP) * this->ld), d_r(this->ld),
          direct(this->ld), twice(this->ld), rest(this->ld), d_length(this->ld),
          turned(packed_size(columns, all_rows)) {}
  };

  // (4): d r of the columns begin .. begin + n of a set of queries, given d score.
  void pool_backward(Work& work, int64_t begin, int64_t n, const T* smooth, T g) const {
    const T *r = work.r + begin, scale = T(problem.pool_scale);
    T* d_r = work.d_r + begin;
    if (problem.pool == Pool::NEGATIVE || problem.pool == Pool::SMOOTHED_NEGATIVE) {
      for (int64_t j = 0; j < n; j += LANES<T>)
        store(d_r + j, select<T>(work.unmatched(r, j, n, smooth), splat(g / T(n)), Vec<T>{}));
      return;
    }
    const T score = problem.pool == Pool::LSE || problem.pool == Pool::MAX ? work.pooled(begin, n, smooth) : T(0);
    for (int64_t j = 0; j < n; j += LANES<T>) {
      if (problem.pool == Pool::LSE) store(d_r + j, exp<T>((load(r + j) - score) * scale) * g);
      else store(d_r + j, splat(problem.pool == Pool::MAX ? T(0) : problem.pool == Pool::SUM ? g : g / T(n)));
    }
    if (problem.pool == Pool::MAX) d_r[std::find(r, r + n - 1, score) - r] = g;
  }

  // (8): what a column's weights, affinities and |q| get, from d r.
  void column_gradients(Work& work, const T* length, int64_t columns) const {
    constexpr T tiny = std::numeric_limits<T>::min();
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      const Vec<T> inverse = T(1) / load(work.total + j), square = load(work.square + j);
      const Vec<T> q = work.query_length(length + j);
      const Vec<T> p = root(max<T>(square, splat(tiny))), both = p * q;
      const Vec<T> d_dot = load(work.d_r + j) / max<T>(both, splat(T(EPS)));
      const Vec<T> d_both = both >= T(EPS) ? -d_dot * load(work.r + j) : Vec<T>{};
      const Vec<T> d_square = square >= tiny ? d_both * q / p : Vec<T>{};  // twice that of |P|^2
      if (problem.similarity == Similarity::COSINE) store(work.d_length + j, load(work.d_length + j) + d_both * p);
      store(work.direct + j, d_dot * inverse);
      store(work.twice + j, d_square * inverse * inverse);
      store(work.rest + j, (d_dot * load(work.dot + j) * inverse + d_square * square) * inverse);
    }
  }

  // The same for similarity "product", where r is alpha . s.
  void product_gradients(Work& work, int64_t columns) const {
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      const Vec<T> direct = load(work.d_r + j) / load(work.total + j);
      store(work.direct + j, direct);
      store(work.rest + j, direct * load(work.r + j));
    }
  }

  // The same as logits_backward for the norm by lengths. What the queries' lengths get goes to d_length; to factor,
  // what multiplies a context x in its own gradient: d|x| / |x|.
  template <class Add>
  void cosine_backward(Work& work, int64_t n, const T* gram, int64_t gram_ld, const T* length, int64_t columns, T* s,
                       Add add) const {
    const T scale = T(problem.scale);
    for (int64_t x = 0; x < n; ++x) {
      const T own = std::sqrt(gram[x * gram_ld + x]);
      Vec<T> all{};
      for (int64_t j = 0; j < columns; j += LANES<T>) {
        const Vec<T> q = load(length + j), both = q * own, bounded = max<T>(both, splat(T(EPS)));
        const Vec<T> a = load(s + x * work.ld + j), d_c = load(work.slope + x * work.ld + j) * scale;
        const Vec<Int<T>> real = inside<T>(j, 0, columns);
        const Vec<T> lost = select<T>(real & (both >= T(EPS)), d_c * a / bounded, Vec<T>{});
        store(s + x * work.ld + j, select<T>(real, d_c / bounded + add(x, j), a));
        store(work.d_length + j, load(work.d_length + j) - (q > 0 ? lost / q : Vec<T>{}));
        all += lost;
      }
      work.factor[x] = own > 0 ? -sum<T>(all) / (own * own) : T(0);
    }
  }

  // For one context set and the queries of chunk c: overwrites the affinities in `work.s` by their gradients, and
  // writes the chunk's part of the gradient of the set's Gram matrix to `contexts.d_gram`.
  void set_backward(Work& work, Contexts<T>& contexts, int64_t b, int64_t set, const Window<T>& window,
                    int64_t c) const {
    const Block<T>& block = contexts.block[size_t(b)];
    const Chunk& chunk = window.chunks[size_t(c)];
    const RowSets &context = problem.context, &query = problem.query;
    const int64_t ld = work.ld, at = context.edge[set] - block.run.begin;
    const int64_t n = context.length(set), gram_ld = round_up(n, ROW_STEP);
    const int64_t gram_at = block.gram_at[size_t(set - block.run.first)];
    T *s = work.s + at * ld, *weight = work.weight, *slope = work.slope;
    work.cosines(block, set, window, c, [&](int64_t x, int64_t j, Vec<T> v) { store(slope + x * ld + j, v); });
    for (int64_t q = chunk.first; q < chunk.last; ++q)
      pool_backward(work, query.edge[q] - chunk.begin, query.length(q), window.smooth_of(q),
                    grad[set * problem.context_step + q * problem.query_step]);
    const T *length = window.length + window.column[size_t(c)], *gram = block.grams + gram_at;
    const bool product = problem.similarity == Similarity::PRODUCT;
    if (product) product_gradients(work, chunk.rows);
    else column_gradients(work, length, chunk.rows);
    for (int64_t j = 0; j < chunk.rows; j += LANES<T>) {
      const Vec<T> direct = load(work.direct + j), twice = load(work.twice + j), rest = load(work.rest + j);
      for (int64_t x = 0; !product && x < n; ++x) {
        const int64_t i = x * ld + j;
        store(slope + i, load(weight + i) * (load(s + i) * direct + load(slope + i) * twice - rest));
      }
      for (int64_t x = 0; product && x < n; ++x) {
        const int64_t i = x * ld + j;
        store(slope + i, load(weight + i) * (load(s + i) * direct - rest));
      }
      for (int64_t x = 0; problem.weights == Weights::HARD && x < n; ++x)
        store(slope + x * ld + j, Vec<T>{});  // which contexts are the largest is a constant
    }
    const auto direct = [&](int64_t x, int64_t j) { return load(work.direct + j) * load(weight + x * ld + j); };
    const bool cosine = problem.norm == Norm::COSINE;
    if (cosine) cosine_backward(work, n, gram, gram_ld, length, chunk.rows, s, direct);
    else
      logits_backward<T>(problem.norm, T(problem.scale), n, query.edge.data() + chunk.first, chunk.last - chunk.first,
                         s, slope, ld, direct);
    if (!d_context || !problem.lengths()) return;
    for (const int64_t j : work.exact) {
      const T total = work.total[j];
      Exact<T> one{set, work.twice[j] * total * total, {}};
      for (int64_t x = 0; x < n; ++x) one.alpha.push_back(weight[x * ld + j] / total);
      contexts.exact_of(b, c).push_back(std::move(one));
      work.twice[j] = 0;
    }
    T* const d_gram = contexts.d_gram[size_t(c)] + contexts.gram[size_t(b)] + gram_at;
    if (!product) gram_matrix<T>([&](int64_t x) { return weight + x * ld; }, n, chunk.rows, work.twice, d_gram, gram_ld);
    for (int64_t x = 0; cosine && x < n; ++x) d_gram[x * gram_ld + x] += work.factor[x];
  }

  // (9), and (11) for a chunk of queries, and what its columns leave for the contexts.
  void queries_backward(Work& work, Contexts<T>& contexts, const Window<T>& window, const Queries<T>& queries,
                        int64_t c) const {
    const Chunk& chunk = window.chunks[size_t(c)];
    const Span& span = queries.spans[size_t(queries.span_of[size_t(c)])];
    const int64_t D = problem.query.D, ld = work.ld;
    std::fill_n(static_cast<T*>(work.d_length), ld, T(0));
    for (int64_t b = 0; b < int64_t(contexts.block.size()); ++b) {
      const Block<T>& block = contexts.block[size_t(b)];
      const int64_t rows = block.run.rows, first = block.run.begin - contexts.begin;
      work.affinities(block, window, c);
      for (int64_t set = block.run.first; set < block.run.last; ++set) set_backward(work, contexts, b, set, window, c);
      if (d_query)
        for (int64_t x = 0; x < rows; ++x)
          for (int64_t j = 0; j < chunk.rows; j += TILE_ROWS) {
            const int64_t wide = least(TILE_ROWS, round_up(chunk.rows - j, ROW_STEP));
            std::memcpy(static_cast<void*>(work.turned + j * contexts.rows + (first + x) * wide), work.s + x * ld + j,
                        size_t(wide) * sizeof(T));
          }
      if (d_context)
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
          const T* row[TILE_ROWS];
          const int64_t count = least(TILE_ROWS, rows - i), wide = least(TILE_ROWS, round_up(rows - i, ROW_STEP));
          for (int64_t r = 0; r < count; ++r) row[r] = work.s + (i + r) * ld;
          interleave(row, count, chunk.rows, contexts.left(b, span) + i * span.columns + queries.at(window, c) * wide,
                     wide);
        }
    }
    if (!d_query) return;
    const Gradient<T> gradient(d_query, problem.query, chunk);
    gradient.add(0, chunk.rows, contexts.rows, Left<T>{work.turned, 0}, contexts.features,
                 contexts.rows * TILE_COLUMNS<T>, 0, D);
    Rows<T> rows(problem.query, chunk.rows);
    rows.take(chunk);
    for (int64_t j = 0; j < chunk.rows; ++j) {
      const T length = window.length[window.column[size_t(c)] + j];
      if (!(length > 0)) continue;
      for (int64_t k = 0; k < D; k += LANES<T>)
        gradient.put(j, k, gradient.get(j, k) + head(*(rows + j) + k, D - k) * (work.d_length[j] / length));
    }
  }

  // (10) summed, and (11) for a block of contexts and the features from `first` to `last`.
  void contexts_backward(T* P, Contexts<T>& contexts, int64_t b, const Queries<T>& queries, int64_t first,
                         int64_t last) const {
    const Block<T>& block = contexts.block[size_t(b)];
    const RowSets& context = problem.context;
    const Gradient<T> gradient(d_context, context, block.run);
    for (size_t s = 0; s < queries.spans.size(); ++s) {
      const Span& span = queries.spans[s];
      gradient.add(0, block.run.rows, span.columns, Left<T>{contexts.left(b, span), 0}, queries.features[s],
                   span.columns * TILE_COLUMNS<T>, first, last);
    }
    for (int64_t set = block.run.first; problem.lengths() && set < block.run.last; ++set) {
      const int64_t n = context.length(set), at = context.edge[set] - block.run.begin;
      const int64_t gram_at = contexts.gram[size_t(b)] + block.gram_at[size_t(set - block.run.first)];
      Buffer<T> d_gram(Block<T>::gram_size(n));
      for (const Buffer<T>& one : contexts.d_gram)
        for (int64_t i = 0; i < Block<T>::gram_size(n); ++i) d_gram[i] += one[gram_at + i];
      gradient.add(at, n, n, Left<T>{d_gram, round_up(n, ROW_STEP)},
                   contexts.features + (context.edge[set] - contexts.begin) * TILE_COLUMNS<T>,
                   contexts.rows * TILE_COLUMNS<T>, first, last);
    }
    for (size_t c = 0; c < queries.span_of.size(); ++c)
      for (const Exact<T>& one : contexts.exact_of(b, int64_t(c))) {
        const int64_t at = context.edge[one.set] - block.run.begin;
        const int64_t n = int64_t(one.alpha.size());
        attend<T>(block.rows + at, n, [&](int64_t x) { return one.alpha[size_t(x)]; }, first, last, context.D, P);
        for (int64_t x = 0; x < n; ++x)
          for (int64_t k = first; k < last; k += LANES<T>)
            gradient.put(at + x, k, gradient.get(at + x, k) + load(P + k) * (one.weight * one.alpha[size_t(x)]));
      }
  }

  void run() const {
    const RowSets &context = problem.context, &query = problem.query;
    const int64_t D = context.D;
    const std::vector<Chunk> blocks = context_blocks<T>(context);
    for_windows<T>(problem, COLUMN_BYTES / int64_t(sizeof(T)), QUERY_BYTES, threads, [&](const Window<T>& window) {
      const Queries<T> queries(window, d_context, threads);
      const int64_t most = CONTEXT_BYTES / int64_t(sizeof(T)) / (2 * D + queries.columns);
      for (size_t first = 0, last; first < blocks.size(); first = last) {
        int64_t rows = blocks[first].rows;
        for (last = first + 1; last < blocks.size() && rows + blocks[last].rows <= most; ++last)
          rows += blocks[last].rows;
        Contexts<T> contexts(problem, blocks.data() + first, blocks.data() + last, queries, threads);
        parallel(int64_t(window.chunks.size()), threads, [&] {
          return [&, work = Work(problem, Block<T>::most_rows(blocks), context.most,
                                 Block<T>::most_rows(window.chunks), rows)](int64_t c) mutable {
            queries_backward(work, contexts, window, queries, c);
          };
        });
        if (!d_context) continue;
        const int64_t wide = FEATURE_PANELS * TILE_COLUMNS<T>, parts = (D + wide - 1) / wide;
        parallel(int64_t(contexts.block.size()) * parts, threads, [&] {
          return [&, P = Buffer<T>(D)](int64_t part) {
            const int64_t from = part % parts * wide;
            contexts_backward(P, contexts, part / parts, queries, from, least(from + wide, D));
          };
        });
      }
    });
  }
};

}  // namespace
}  // namespace itm_fast

// Adds to d_image [I, R, D] and d_words [N, D], which hold zeros. grad [I, T] and both are float, or double if the
// tensors are double.
extern "C" const char* cross_attention_score_backward(const itm_fast::CrossAttentionScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem problem(call);
    const bool t2i = call.direction == Direction::T2I;
    const auto run = [&]<class F>(const F* grad) {
      F *first = static_cast<F*>(t2i ? call.d_image : call.d_words),
        *second = static_cast<F*>(t2i ? call.d_words : call.d_image);
      Backward<F>{problem, grad, first, second, call.threads}.run();
    };
    if (call.dtype == Dtype::FLOAT64) run(static_cast<const double*>(call.grad));
    else run(static_cast<const float*>(call.grad));
  });
}
