// The gradient of one tile of vector similarities: (4) to (7) of itm_fast/ops/cross_attention_similarity.py.
//
// The forward tile is computed again, without the product with W where the similarity vectors are known. From then on
// features lie along the lanes, WIDE of them at a time, and queries are rows: the difference u - q is computed again in
// that layout, in which all four products that follow can read their operands as they are, and only dy and du must be
// transposed. With u = sum of a x, du reaches the attention through g_x = x . du alone:
//
//     t = sum of a g,   c = t (p + eps) / p,   d logit_x = a_x (g_x - c (G a)_x - t' (p + eps))
//     t' = sum of a (g - c G a),   d x = a du^T - (a c a^T) x + d A q^T,   d q = -du + d A^T x
//
// E is what all products but those of a set's contexts with each other multiply: T, or pairs of bfloat16 values. A set
// in which the terms of some |P| nearly cancel has its affinities, u and g made in T: rounding a term would turn P, and
// du and c have 1 / p as a factor.
//
// Caches: dy in both layouts (2 x 240 KB) stays in L2 with three panels of 28 KB; the gradients of W and of q, 1 MB
// each, pass by once a tile, and what the affinities give q once for all contexts held.
#pragma once
#include "feature_panels.h"
#include "held_contexts.h"
#include "shuffle.h"

namespace itm_fast {

// Which gradients are wanted; and the gradients of W and b, to which every tile of one slot adds.
template <class T>
struct SimilaritySums {
  bool needs_context, needs_query, needs_weight, needs_bias;
  FeaturePanels<T> weight;  // [S] rows of D features
  Buffer<T> bias;           // [S], whole vectors
};

// One thread's scratch for the gradients of one chunk of queries with the contexts held, and the functions that fill
// it.
template <class T, class E = T>
struct SimilarityGradient {
  static constexpr int64_t WIDE = TILE_COLUMNS<T>, BLOCK = round_up(FEATURES, WIDE);
  SimilarityTile<T> tile;  // with the affinities of all contexts held, later their gradients
  int64_t S, ld, ldn, ldx, lds;
  Buffer<T> s_rows, d_y, d_y_rows;                 // [WIDE][lds], [S][ld], [columns][lds]
  Buffer<T> weight_rows, scaled_rows, mixed;       // [columns][ldn] a, -c a; [rows][ldn] a c a^T of every set
  Buffer<T> affinity_rows;                         // [columns][ldx] d A of all sets
  Buffer<T> g, gram_weight, d_logit, along;        // [n][ld] three times, c
  Buffer<T> d_u_columns;                           // [BLOCK][ld], or [depth of BLOCK][ld] pairs
  FeaturePanels<T> difference, d_u;                // one panel each; d_u for pairs only where `exact`
  FeaturePanels<E> squares;
  // When E is Pair: of d_y, d_y_rows, tile.weight, weight_rows, tile.affinity, affinity_rows and of a panel of queries;
  // d_u by pairs of rows and by pairs of features.
  Buffer<E> d_y_pairs, d_y_rows_pairs, weight_pairs, weight_rows_pairs, affinity_pairs, affinity_rows_pairs,
      query_pairs, d_u_pairs, d_u_halves;

  // For sets of at most `most` contexts, together at most `rows`.
  SimilarityGradient(int64_t rows, int64_t most, int64_t columns, int64_t D, int64_t S)
      : tile(rows, columns, D, S), S(S), ld(tile.ld), ldn(padded<T>(most)), ldx(padded<T>(rows)), lds(padded<T>(S)),
        s_rows(WIDE * lds), d_y(S * ld), d_y_rows(columns * lds), weight_rows(columns * ldn),
        scaled_rows(columns * ldn), mixed(rows * ldn), affinity_rows(columns * ldx), g(most * ld),
        gram_weight(most * ld), d_logit(most * ld), along(ld), d_u_columns(BLOCK * ld),
        difference(WIDE, columns), d_u(WIDE, columns), squares(WIDE, depth<E>(columns)), d_y_pairs(pairs(S, ld)),
        d_y_rows_pairs(pairs(columns, lds)), weight_pairs(pairs(most, ld)), weight_rows_pairs(pairs(columns, ldn)),
        affinity_pairs(IS_PAIR<E> ? rows * ld : 0), affinity_rows_pairs(pairs(columns, ldx)),
        query_pairs(pairs(std::max(D, columns), WIDE)), d_u_pairs(pairs(columns, WIDE)),
        d_u_halves(pairs(WIDE, columns)) {}

  // Adds the gradients of a chunk's tiles to `sums`, to d_q [columns] and to d_x [x.n]. W is given as w [S], its
  // features along the lanes, and as `projection`; the queries as `query` and as `query_rows`. upstream(k, j, room)
  // writes S values: the gradient of the similarity vector of set k and column j; or that of its y, where `projection`
  // is null.
  template <class Upstream>
  void run(const HeldContexts<T, E>& x, Norm norm, T scale, const int64_t* edge, int64_t sets,
           const Projection<T>* projection, const FeaturePanels<E>& w, const Panels<T>& query,
           const FeaturePanels<T>& query_rows, Upstream upstream, SimilaritySums<T>& sums, FeaturePanels<T>& d_q,
           FeaturePanels<T>& d_x) {
    const int64_t columns = edge[sets] - edge[0];
    const bool attends = sums.needs_context || sums.needs_query;
    for (int64_t p = 0; p < columns; p += WIDE)
      gemm<E>(x.n, least(WIDE, columns - p), depth<E>(x.D), {x.column_factors(), x.ld},
              {factors<E>(x.D, WIDE, query.at(0, p), WIDE, query_pairs), WIDE}, fresh(), to(tile.affinity + p, ld));
    for (int64_t k = 0; k < int64_t(x.sets.size()); ++k) {
      const HeldSet<T, E>& set = x.sets[k];
      T* affinity = tile.affinity + set.first * ld;
      tile.weigh(set, affinity, norm, scale, edge, sets);
      // Of the whole chunk: one caption with a NaN makes it exact, so that the bits of a caption beside it
      // may change by the rounding of products to bfloat16.
      exact = IS_PAIR<E> && tile.cancels(set, 0, columns);
      if (exact) {
        for (int64_t p = 0; p < columns; p += WIDE)
          gemm<T>(set.n, least(WIDE, columns - p), x.D, {set.column, x.ld}, {query.at(0, p), WIDE}, fresh(),
                  to(affinity + p, ld));
        tile.weigh(set, affinity, norm, scale, edge, sets);
      }
      if (projection) tile.project(set, *projection, columns, query);
      for (int64_t j = 0; j < columns; ++j) {
        T* const d = cleared(j);
        upstream(k, j, d);
        if (!projection) continue;
        const int64_t in = j % WIDE;
        if (in == 0) transpose_by_squares<T>(tile.similar.at(0, j), WIDE, S, least(WIDE, columns - j), s_rows, lds);
        T* s_j = s_rows + in * lds;
        for (int64_t s = 0; s < S; ++s) s_j[s] *= tile.inverse[j];
        backward_of_norm<T>(d, S, s_j, tile.inverse[j]);
      }
      products(x, set, columns, w, query_rows, sums, d_q, d_x);
      if (attends) attention(set, norm, scale, edge, sets, affinity, sums.needs_context);
    }
    if (attends) through_affinities(x, columns, query_rows, sums, d_q, d_x);
  }

  // The same, from gradients of y on, for similarity vectors of every context held with every query, which nothing
  // weighs: u is the context. As many contexts at a time as make at most `columns` pairs.
  template <class Upstream>
  void run_unweighted(const FeaturePanels<T>& x, int64_t count, int64_t queries, int64_t columns,
                      const FeaturePanels<E>& w, const FeaturePanels<T>& query_rows, Upstream upstream,
                      SimilaritySums<T>& sums, FeaturePanels<T>& d_q, FeaturePanels<T>& d_x) {
    const int64_t step = std::max<int64_t>(1, columns / queries);
    for (int64_t first = 0; first < count; first += step) {
      const int64_t some = least(step, count - first), pairs = some * queries;
      for (int64_t k = 0; k < some; ++k)
        for (int64_t j = 0; j < queries; ++j) upstream(first + k, j, cleared(k * queries + j));
      sum_bias(pairs, S, sums);
      transpose_by_squares<T>(d_y_rows, lds, pairs, S, d_y, ld);
      for (int64_t p = 0; p < w.D; p += WIDE) {
        const auto each = [&](auto visit) {  // of a pair's vectors in this panel
          for (int64_t k = 0; k < some; ++k)
            for (int64_t j = 0; j < queries; ++j)
              for (int64_t v = 0; v < WIDE; v += LANES<T>)
                visit((k * queries + j) * WIDE + v, (first + k) * WIDE + v, j * WIDE + v);
        };
        const T *context = x.at(0, p), *query = query_rows.at(0, p);
        each([&](int64_t pair, int64_t of_x, int64_t of_q) {
          const Vec<T> u = load(context + of_x) - load(query + of_q);
          store(difference.data + pair, u);
          store(squares.data + pair, u * u);
        });
        const int64_t wide = least(WIDE, w.D - p);
        weight_gradient(p, wide, pairs, sums);
        if (!sums.needs_context && !sums.needs_query) continue;
        difference_gradient(p, wide, pairs, w, fresh(), [](int64_t, int64_t, Vec<T>) {});
        T *dx = d_x.at(0, p), *dq = d_q.at(0, p);
        each([&](int64_t pair, int64_t of_x, int64_t of_q) {
          const Vec<T> du = load(d_u.data + pair);
          store(dx + of_x, load(dx + of_x) + du);
          store(dq + of_q, load(dq + of_q) - du);
        });
      }
    }
  }

 private:
  bool exact = false;  // of the set that is worked on: its affinities, u and g are made in T though E is Pair

  // How many pairs the rows of a matrix [K][ld] make, where products take pairs.
  static int64_t pairs(int64_t K, int64_t ld) { return IS_PAIR<E> ? depth<E>(K) * ld : 0; }

  static auto to(T* c, int64_t ld) {
    return [=](int64_t i, int64_t j, Vec<T> v) { store(c + i * ld + j, v); };
  }
  // Long sums over pairs: a tile's part is summed by itself first, which keeps its small digits.
  static auto add_to(T* c, int64_t ld) {
    return [=](int64_t i, int64_t j, Vec<T> v) { store(c + i * ld + j, load(c + i * ld + j) + v); };
  }
  static auto fresh() {
    return [](int64_t, int64_t) { return Vec<T>{}; };
  }
  // Sums that all tiles add to have left the caches: what the end of a tile needs is fetched at its beginning.
  static auto fetched(const T* c, int64_t ld) {
    return [=](int64_t i, int64_t j) {
      __builtin_prefetch(c + i * ld + j, 1);
      return Vec<T>{};
    };
  }

  // Row j of d_y_rows, with zeros from S to a whole vector.
  T* cleared(int64_t j) {
    T* const row = d_y_rows + j * lds;
    std::fill(row + S, row + round_up(S, LANES<T>), T(0));
    return row;
  }

  void sum_bias(int64_t columns, int64_t S, SimilaritySums<T>& sums) {
    if (!sums.needs_bias) return;
    for (int64_t s = 0; s < S; s += LANES<T>) {
      Vec<T> all{};
      for (int64_t j = 0; j < columns; ++j) all += load(d_y_rows + j * lds + s);
      store(sums.bias + s, load(sums.bias + s) + all);
    }
  }

  // d W += dy^T (u - q)^2 for `wide` features from p on.
  void weight_gradient(int64_t p, int64_t wide, int64_t columns, SimilaritySums<T>& sums) {
    if (!sums.needs_weight) return;
    T* to = sums.weight.at(0, p);
    gemm<E>(S, wide, depth<E>(columns), {either<E>(d_y_rows, d_y_rows_pairs), lds}, {squares.data, WIDE},
            fetched(to, WIDE), add_to(to, WIDE));
  }

  // d_u = 2 (u - q) (dy W), of which also(i, j, v) sees every vector. Half of S at a time: with all of it a panel of W
  // and the rows of dy that meet it push each other out of the first cache.
  template <class Begin, class Also>
  void difference_gradient(int64_t p, int64_t wide, int64_t columns, const FeaturePanels<E>& w, Begin begin,
                           Also also) {
    T *u = difference.data, *du = d_u.data;
    [[maybe_unused]] Vec<T> even[TILE_VECTORS];
    const auto finish = [&, u, du, columns](int64_t i, int64_t j, Vec<T> v) {
      v *= T(2) * load(u + i * WIDE + j);
#if defined(__AVX512BF16__)
      if constexpr (IS_PAIR<E>) {
        put_factor<E>(columns, i, j, v, even, d_u_pairs, WIDE);
        const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(static_cast<void*>(d_u_halves + (i * WIDE + j) / 2), &half, sizeof half);
      }
#endif
      if (!IS_PAIR<E> || exact) store(du + i * WIDE + j, v);
      also(i, j, v);
    };
    if constexpr (IS_PAIR<E>) {
      gemm<E>(columns, wide, depth<E>(S), {d_y_pairs, ld}, {w.at(0, p), WIDE}, begin, finish);
    } else {
      const int64_t half = S / 2;
      gemm<T>(columns, wide, half, {d_y, ld}, {w.at(0, p), WIDE}, begin, to(du, WIDE));
      gemm<T>(columns, wide, S - half, {d_y + half * ld, ld}, {w.at(half, p), WIDE},
              [=](int64_t i, int64_t j) { return load(du + i * WIDE + j); }, finish);
    }
  }

  // (5), and g.
  void products(const HeldContexts<T, E>& all, const HeldSet<T, E>& x, int64_t columns, const FeaturePanels<E>& w,
                const FeaturePanels<T>& query_rows, SimilaritySums<T>& sums, FeaturePanels<T>& d_q,
                FeaturePanels<T>& d_x) {
    const int64_t n = x.n, D = x.D;
    sum_bias(columns, S, sums);
    const bool attends = sums.needs_context || sums.needs_query;
    factors<E>(columns, lds, d_y_rows, lds, d_y_rows_pairs);
    if (attends) {
      transpose_by_squares<T>(d_y_rows, lds, columns, S, d_y, ld);
      factors<E>(S, columns, d_y, ld, d_y_pairs);
      transpose_by_squares<T>(tile.weight, ld, n, columns, weight_rows, ldn);
      factors<E>(columns, n, weight_rows, ldn, weight_rows_pairs);
      std::fill_n(g + 0, n * ld, T(0));
    }
    const E* const shares = factors<E>(n, columns, tile.weight, ld, weight_pairs);
    for (int64_t d = 0; d < D; d += BLOCK) {
      const int64_t end = least(D, d + BLOCK);
      for (int64_t p = d; p < end; p += WIDE)
        panel(all, x, shares, p, least(WIDE, D - p), columns, d, w, query_rows, sums, d_q, d_x);
      if (!attends) continue;
      if (exact)
        gemm<T>(n, columns, end - d, {x.column + d * all.ld, all.ld}, {d_u_columns, ld}, fresh(), add_to(g, ld));
      else
        gemm<E>(n, columns, depth<E>(end - d), {all.column_factors() + depth<E>(d) * all.ld + x.first, all.ld},
                {reinterpret_cast<const E*>(d_u_columns + 0), ld}, fresh(), add_to(g, ld));
    }
  }

  // (5) for `wide` features from p on, of the block that begins with d.
  void panel(const HeldContexts<T, E>& all, const HeldSet<T, E>& x, const E* shares, int64_t p, int64_t wide,
             int64_t columns, int64_t d, const FeaturePanels<E>& w, const FeaturePanels<T>& query_rows,
             SimilaritySums<T>& sums, FeaturePanels<T>& d_q, FeaturePanels<T>& d_x) {
    T* const u = difference.data;
    E* const square = squares.data;
    const T* q = query_rows.at(0, p);
    Vec<T> even[TILE_VECTORS];
    const auto begin = [=](int64_t i, int64_t j) {
      __builtin_prefetch(q + (i + TILE_ROWS) * WIDE + j);
      return -load(q + i * WIDE + j);
    };
    const auto finish = [&, columns](int64_t i, int64_t j, Vec<T> v) {
      store(u + i * WIDE + j, v);
      put_factor<E>(columns, i, j, v * v, even, square, WIDE);
    };
    if (exact) gemm<T>(columns, wide, x.n, {tile.weight, ld}, {x.row + p, x.row_ld}, begin, finish);
    else
      gemm<E>(columns, wide, depth<E>(x.n), {shares, ld}, {all.row_factors() + x.first_factor * x.row_ld + p, x.row_ld},
              begin, finish);
    weight_gradient(p, wide, columns, sums);
    if (!sums.needs_context && !sums.needs_query) return;
    T* dq = d_q.at(0, p);
    difference_gradient(p, wide, columns, w, fetched(dq, WIDE), [=](int64_t i, int64_t j, Vec<T> v) {
      store(dq + i * WIDE + j, load(dq + i * WIDE + j) - v);
    });
    if (exact) transpose_by_squares<T>(d_u.data, WIDE, columns, wide, d_u_columns + (p - d) * ld, ld);
    else  // pairs have the size of a float, and are only moved
      transpose_by_squares<T>(reinterpret_cast<const T*>(either<E>(d_u.data, d_u_halves)), depth<E>(WIDE), columns,
                              depth<E>(wide), d_u_columns + depth<E>(p - d) * ld, ld);
    if (sums.needs_context)
      gemm<E>(x.n, wide, depth<E>(columns), {either<E>(weight_rows, weight_rows_pairs), ldn},
              {either<E>(d_u.data, d_u_pairs), WIDE}, fresh(), add_to(d_x.at(x.first, p), WIDE));
  }

  // (6) and (7) of one set, from g on: `affinity` becomes its own gradient.
  void attention(const HeldSet<T, E>& x, Norm norm, T scale, const int64_t* edge, int64_t sets, T* affinity,
                 bool needs_context) {
    const int64_t columns = edge[sets] - edge[0], n = x.n;
    gemm<T>(n, columns, n, {x.gram, x.ld}, {tile.weight, ld}, fresh(), to(gram_weight, ld));
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      const Vec<T> p = load(tile.length + j), whole = p + T(EPS);
      Vec<T> t{}, rest{};
      for (int64_t r = 0; r < n; ++r) t += load(tile.weight + r * ld + j) * load(g + r * ld + j);
      const Vec<T> c = p > 0 ? t * whole / p : Vec<T>{};
      for (int64_t r = 0; r < n; ++r) {
        const Vec<T> through = load(g + r * ld + j) - c * load(gram_weight + r * ld + j);
        store(d_logit + r * ld + j, through);
        rest += load(tile.weight + r * ld + j) * through;
      }
      rest *= whole;
      for (int64_t r = 0; r < n; ++r)
        store(d_logit + r * ld + j, load(tile.weight + r * ld + j) * (load(d_logit + r * ld + j) - rest));
      store(along + j, c);
    }
    logits_backward<T>(norm, scale, n, edge, sets, affinity, d_logit, ld, fresh());
    if (!needs_context) return;
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t r = 0; r < n; ++r) scaled_rows[j * ldn + r] = -along[j] * weight_rows[j * ldn + r];
    gemm<T>(n, n, columns, {weight_rows, ldn}, {scaled_rows, ldn}, fresh(), to(mixed + x.first * ldn, ldn));
  }

  // What remains of (7), for all sets at once: queries and their gradients pass by once.
  void through_affinities(const HeldContexts<T, E>& x, int64_t columns, const FeaturePanels<T>& query_rows,
                          SimilaritySums<T>& sums, FeaturePanels<T>& d_q, FeaturePanels<T>& d_x) {
    if (sums.needs_context) transpose_by_squares<T>(tile.affinity, ld, x.n, columns, affinity_rows, ldx);
    const E* const turned = factors<E>(columns, x.n, affinity_rows, ldx, affinity_rows_pairs);
    for (const HeldSet<T, E>& set : x.sets)
      factors<E>(set.n, columns, tile.affinity + set.first * ld, ld, affinity_pairs + set.first_factor * ld);
    for (int64_t p = 0; p < x.D; p += WIDE) {
      const int64_t wide = least(WIDE, x.D - p);
      T* dq = d_q.at(0, p);
      if (sums.needs_query)
        gemm<E>(columns, wide, x.factors, {either<E>(tile.affinity, affinity_pairs), ld},
                {x.row_factors() + p, x.row_ld}, fetched(dq, WIDE), add_to(dq, WIDE));
      if (!sums.needs_context) continue;
      T* dx = d_x.at(0, p);
      gemm<E>(x.n, wide, depth<E>(columns), {turned, ldx},
              {factors<E>(columns, WIDE, query_rows.at(0, p), WIDE, query_pairs), WIDE}, fresh(), add_to(dx, WIDE));
      for (const HeldSet<T, E>& set : x.sets)
        gemm<T>(set.n, wide, set.n, {mixed + set.first * ldn, ldn}, {set.row + p, x.row_ld}, fresh(),
                add_to(dx + set.first * WIDE, WIDE));
    }
  }
};

}  // namespace itm_fast
