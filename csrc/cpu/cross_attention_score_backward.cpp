// Gradients of cross_attention_score: (8) to (11) of itm_fast/ops/cross_attention_score.py.
//
// Queries and contexts are both passed through in windows. Each pair of windows takes two rounds. In the first a thread
// owns one chunk of queries: with all blocks of contexts it computes the weights again as the forward pass does, and
// the affinities too unless that has kept them, turns the affinities into their gradients in place, adds the gradient
// of its queries, and stores the transposed affinity gradients and each set's Gram matrix gradient. In the second a
// thread owns one block of contexts and some of the features: it adds the gradient of these contexts from what all
// chunks stored, chunk by chunk in order. So every sum has one owner and one order, whatever the number of threads.
//
// Where the forward pass multiplied bfloat16 values, so do the three large products: of the features for affinities,
// and of the affinity gradients with the queries and with the contexts. All else is computed in float.
//
// Where few pairs have a gradient, only these are taken: see few_backward.
//
// Scratch beyond inputs and gradients: 48 MiB and 2 MiB a thread, more only where one set alone is larger.
#include "cross_attention_score_backward.h"

namespace itm_fast {
namespace {

// `window_bytes` of each thread with few pairs; with affinities that the forward pass has kept.
constexpr int64_t FEW_BYTES = 2 << 20, KNOWN_BYTES = 12 << 20;

// E as for Block: the affinities and the products with their gradients multiply it.
template <class T, class E>
struct Backward {
  const Problem& problem;
  const T* grad;
  T *d_context, *d_query;
  int64_t threads;
  int64_t window_bytes;         // of a window of contexts, and of one of queries, which has QUERY_BYTES at most
  const T* affinity = nullptr;  // [contexts, queries] from the forward pass; null: they are computed again

  // A thread's arrays for one chunk of queries.
  struct Work : Cosines<T> {
    Buffer<T> slope, d_r, direct, twice, rest, d_length;
    Buffer<T> room;    // of pack_left
    Buffer<E> turned;  // affinity gradients as a left side whose rows are queries
    Work(const Problem& problem, int64_t rows, int64_t set_rows, int64_t columns, int64_t all_rows)
        : Cosines<T>(problem, rows, set_rows, columns), slope(round_up(set_rows, ROW_STEP) * this->ld), d_r(this->ld),
          direct(this->ld), twice(this->ld), rest(this->ld), d_length(this->ld),
          room(IS_PAIR<E> ? TILE_ROWS * this->ld : 0), turned(packed_size(columns, depth<E>(all_rows))) {}
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
  void set_backward(Work& work, ContextRows<T, E>& contexts, int64_t b, int64_t set, const Window<T, E>& window,
                    int64_t c) const {
    const Block<T, E>& block = contexts.block[size_t(b)];
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
    if (!product)
      gram_matrix<T>([&](int64_t x) { return weight + x * ld; }, n, chunk.rows, work.twice, d_gram, gram_ld);
    for (int64_t x = 0; cosine && x < n; ++x) d_gram[x * gram_ld + x] += work.factor[x];
  }

  // (9), and (11) for a chunk of queries, and what its columns leave for the contexts.
  void queries_backward(Work& work, ContextRows<T, E>& contexts, const Window<T, E>& window,
                        const Queries<T, E>& queries, int64_t c) const {
    const Chunk& chunk = window.chunks[size_t(c)];
    const Span& span = queries.spans[size_t(queries.span_of[size_t(c)])];
    const int64_t D = problem.query.D, ld = work.ld, K = depth<E>(contexts.row.back());
    std::fill_n(static_cast<T*>(work.d_length), ld, T(0));
    for (int64_t b = 0; b < int64_t(contexts.block.size()); ++b) {
      const Block<T, E>& block = contexts.block[size_t(b)];
      const int64_t rows = block.run.rows, first = contexts.row[size_t(b)];
      if (affinity) work.take_affinities(block, chunk, affinity);
      else work.affinities(block, window, c);
      for (int64_t set = block.run.first; set < block.run.last; ++set) set_backward(work, contexts, b, set, window, c);
      if (d_query) pack_turned<T, E>(work.s, ld, rows, chunk.rows, work.turned, K, first);
      if (d_context)
        pack_left<T, E>(work.s, ld, rows, chunk.rows, contexts.left(b, span), depth<E>(span.columns),
                        queries.at[size_t(c)], work.room);
    }
    if (!d_query) return;
    const Gradient<T> gradient(d_query, problem.query, chunk);
    gradient.template add<E>(0, chunk.rows, K, {work.turned, 0}, contexts.features, K * TILE_COLUMNS<T>, 0, D);
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
  void contexts_backward(T* P, ContextRows<T, E>& contexts, int64_t b, const Queries<T, E>& queries, int64_t first,
                         int64_t last) const {
    const Block<T, E>& block = contexts.block[size_t(b)];
    const RowSets& context = problem.context;
    const Gradient<T> gradient(d_context, context, block.run);
    for (size_t s = 0; s < queries.spans.size(); ++s) {
      const Span& span = queries.spans[s];
      const int64_t K = depth<E>(span.columns);
      gradient.template add<E>(0, block.run.rows, K, {contexts.left(b, span), 0}, queries.features[s] + first * K,
                               K * TILE_COLUMNS<T>, first, last);
    }
    for (int64_t set = block.run.first; problem.lengths() && set < block.run.last; ++set) {
      const int64_t n = context.length(set), at = context.edge[set] - block.run.begin;
      const int64_t gram_at = contexts.gram[size_t(b)] + block.gram_at[size_t(set - block.run.first)];
      Buffer<T> d_gram(Block<T>::gram_size(n));
      for (const Buffer<T>& one : contexts.d_gram)
        for (int64_t i = 0; i < Block<T>::gram_size(n); ++i) d_gram[i] += one[gram_at + i];
      gradient.template add<T>(at, n, n, {d_gram, round_up(n, ROW_STEP)},
                               contexts.features_of(b, at) + first * contexts.row.back(),
                               contexts.row.back() * TILE_COLUMNS<T>, first, last);
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
    const int64_t bytes = least(QUERY_BYTES, window_bytes);
    for_windows<T, E>(problem, COLUMN_BYTES / int64_t(sizeof(T)), bytes, threads, [&](const Window<T, E>& window) {
      const Queries<T, E> queries(window, d_context, threads);
      const int64_t most = window_bytes / int64_t(sizeof(T)) / (2 * D + queries.columns);
      for (size_t first = 0, last; first < blocks.size(); first = last) {
        int64_t rows = blocks[first].rows;
        for (last = first + 1; last < blocks.size() && rows + blocks[last].rows <= most; ++last)
          rows += blocks[last].rows;
        ContextRows<T, E> contexts(problem, blocks.data() + first, blocks.data() + last, queries, affinity != nullptr,
                                threads);
        parallel(int64_t(window.chunks.size()), threads, [&] {
          return [&, work = Work(problem, Block<T>::most_rows(blocks), context.most,
                                 Block<T>::most_rows(window.chunks), contexts.row.back())](int64_t c) mutable {
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
    }, affinity != nullptr);
  }
};

// The same gradients from the pairs alone whose score has one, as the hardest negatives give it to about three pairs of
// a row. A thread owns one context set with all query sets that have a gradient with it, and adds the gradient of its
// contexts; in a second round one query set with such context sets. So a pair is scored twice here.
template <class T, class E>
void few_backward(const Problem& problem, const T* grad, T* d_context, T* d_query, int64_t threads) {
  const auto at = [&](int64_t context, int64_t query) {
    return grad[context * problem.context_step + query * problem.query_step];
  };
  const auto round = [&](const RowSets& own, const RowSets& others, auto of, auto run) {
    parallel(own.count(), threads, [&] {
      return [&](int64_t set) {
        std::vector<int64_t> partners;
        std::vector<T> gradients;
        for (int64_t k = 0; k < others.count(); ++k) {
          if (of(set, k) == 0) continue;
          partners.push_back(k);
          gradients.push_back(of(set, k));
        }
        if (!partners.empty()) run(chosen(own, {set}), chosen(others, partners), gradients.data());
      };
    });
  };
  if (d_context)
    round(problem.context, problem.query, at, [&](const RowSets& contexts, const RowSets& queries, const T* gradients) {
      Backward<T, E>{Problem(problem, contexts, queries), gradients, d_context, nullptr, 1, FEW_BYTES}.run();
    });
  if (d_query)
    round(problem.query, problem.context, [&](int64_t query, int64_t context) { return at(context, query); },
          [&](const RowSets& queries, const RowSets& contexts, const T* gradients) {
            Backward<T, E>{Problem(problem, contexts, queries), gradients, nullptr, d_query, 1, FEW_BYTES}.run();
          });
}

}  // namespace
}  // namespace itm_fast

// Adds to d_image [I, R, D] and d_words [N, D], which hold zeros. grad [I, T] and both are float, or double if the
// tensors are double.
extern "C" const char* cross_attention_score_backward(const itm_fast::CrossAttentionScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem problem(call);
    const bool t2i = call.direction == Direction::T2I;
    const auto run = [&]<class F, class E>(const F* grad, const E*) {
      F *first = static_cast<F*>(t2i ? call.d_image : call.d_words),
        *second = static_cast<F*>(t2i ? call.d_words : call.d_image);
      const int64_t pairs = call.I * call.T, some = pairs - std::count(grad, grad + pairs, F(0));
      const F* const affinity = static_cast<const F*>(call.affinity);
      const int64_t bytes = affinity ? KNOWN_BYTES : CONTEXT_BYTES;
      if (some * FEW > pairs) Backward<F, E>{problem, grad, first, second, call.threads, bytes, affinity}.run();
      else few_backward<F, E>(problem, grad, first, second, call.threads);
    };
    const float* const single = static_cast<const float*>(call.grad);
    const double* const twofold = static_cast<const double*>(call.grad);
    if (call.dtype == Dtype::FLOAT64) return run(twofold, twofold);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return run(single, static_cast<const Pair*>(nullptr));
#endif
    run(single, single);
  });
}
