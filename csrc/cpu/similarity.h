// Vector similarities of one set of contexts (rows) with a chunk of query sets (columns): (1) to (3) of
// itm_fast/ops/cross_attention_similarity.py.
//
// What is long, queries and similarity vectors, lies in panels of TILE_COLUMNS columns, each contiguous, so that a
// product reads it as one stream; affinities and weights are [n][ld]. Everything but the affinity norm is done column
// by column, so a column's bits depend on its own set and on the contexts only. Caches, for float32, D 1024, S 256,
// 36 contexts and 224 columns: the vectors (224 KB), a block of squares (224 KB) and one of W (256 KB) stay in L2
// (1 MB) while they are multiplied; queries and contexts pass by twice.
//
// E is what the large products multiply: T, or pairs of bfloat16 values with sums in float32. |P| and the attention
// weights are made in T, and so are the affinities and u of a set of queries for which the terms of some |P| nearly
// cancel: rounding a term would turn P.
#pragma once
#include "attention.h"

namespace itm_fast {

constexpr int64_t FEATURES = 256;  // of one block: D is passed through in blocks of this many

// The projection y = W v + b, shared by all threads: W [S, D] is packed for the products with blocks of FEATURES
// features, block after block.
template <class T, class E = T>
struct Projection {
  int64_t S, D;
  Buffer<E> weight;
  Buffer<T> bias;

  Projection(Source w, Source b, int64_t S, int64_t D)
      : S(S), D(D), weight(packed_size(S, depth<E>(D))), bias(round_up(S, ROW_STEP)) {
    Buffer<T> room(std::max(S, S * D));
    const T* rows = read<T>(w, 0, S * D, room);
    for (int64_t d = 0; d < D; d += FEATURES)
      pack_rows(S, least(FEATURES, D - d), weight + packed_size(S, depth<E>(d)),
                [&](int64_t s, int64_t k) { return rows[s * D + d + k]; });
    std::copy_n(read<T>(b, 0, S, room), S, bias + 0);
  }

  Left<E> block(int64_t d) const { return {weight + packed_size(S, depth<E>(d)), 0}; }
};

// A set of contexts, as one thread holds it: its rows, its columns and its Gram matrix, each as the A of a product.
template <class T, class E = T>
struct Contexts {
  int64_t n = 0, D, row_ld, ld;
  Buffer<T> row, column, gram;  // [n][row_ld], [D][ld], [n][ld]
  Buffer<E> column_pairs, row_pairs;  // of the rows of both, when E is Pair
  T largest = 0;                // of the Gram matrix' diagonal

  Contexts(int64_t most, int64_t D)
      : D(D), row_ld(padded<T>(D)), ld(padded<T>(most)), row(most * row_ld), column(D * ld), gram(most * ld),
        column_pairs(IS_PAIR<E> ? depth<E>(D) * ld : 0), row_pairs(IS_PAIR<E> ? depth<E>(most) * row_ld : 0) {}

  void read(Source s, int64_t first, int64_t count) {
    n = count;
    read_both<T>(s, first, n, D, row, row_ld, column, ld);
    largest = multiply_with_each_other<T>(n, D, column, ld, gram, ld);
    if constexpr (IS_PAIR<E>) {
      pair_rows(D, n, column, ld, column_pairs);
      pair_rows(n, D, row, row_ld, row_pairs);
    }
  }

  Left<E> contexts() const { return {either<E>(column, column_pairs), ld}; }
  Left<E> features(int64_t d) const { return {either<E>(row, row_pairs) + d, row_ld}; }
};

// Queries as columns in panels [D rounded up to ROW_STEP][TILE_COLUMNS].
template <class T>
struct Panels {
  static constexpr int64_t WIDE = TILE_COLUMNS<T>;
  int64_t size;  // of a panel
  Buffer<T> data;

  Panels(int64_t columns, int64_t rows)
      : size(round_up(rows, ROW_STEP) * WIDE), data((columns + WIDE - 1) / WIDE * size) {}

  // Row d, from the panel that `column` is the first of.
  T* at(int64_t d, int64_t column) const { return data + column / WIDE * size + d * WIDE; }

  // Rows first .. first + count of a tensor with D columns become columns column .. column + count.
  void read(Source s, int64_t first, int64_t count, int64_t D, int64_t column) {
    for (int64_t done = 0; done < count;) {
      const int64_t place = (column + done) % WIDE, n = least(count - done, WIDE - place);
      pack_columns(s, first + done, n, D, at(0, column + done) + place, WIDE);
      done += n;
    }
  }
};

// One thread's scratch for a set of at most `most` contexts with at most `columns` queries, and the functions that fill
// it: attend() or multiply() and weigh(), then project(), then place().
template <class T, class E = T>
struct SimilarityTile {
  static constexpr int64_t WIDE = TILE_COLUMNS<T>;
  int64_t ld;
  Buffer<T> affinity, weight;                // [n][ld]: x.q, then weights a with u = sum of a x
  Buffer<T> total, length, inverse, factor;  // per column: sum of the exponentials, |P|, 1 / (|y| + eps)
  Panels<E> squares;                         // (u - q)^2 of a block of features
  Panels<T> similar;                         // y
  Buffer<E> query_pairs, weight_pairs;       // of a panel of queries and of `weight`, when E is Pair
  Buffer<T> exact;                           // per column: 1 where affinities and u are made in T though E is Pair
  bool some_exact = false;                   // whether there is such a column

  SimilarityTile(int64_t most, int64_t columns, int64_t D, int64_t S)
      : ld(padded<T>(columns)), affinity(most * ld), weight(most * ld), total(ld), length(ld), inverse(ld),
        factor(round_up(most, LANES<T>)), squares(columns, depth<E>(least(FEATURES, D))), similar(columns, S),
        query_pairs(IS_PAIR<E> ? depth<E>(D) * WIDE : 0), weight_pairs(IS_PAIR<E> ? depth<E>(most) * ld : 0),
        exact(IS_PAIR<E> ? ld : 0) {}

  // Attention of the queries of sets with bounds edge[0 .. sets]: affinity, total, length, and `weight`,
  // already divided by total and by |P| + eps.
  void attend(const Contexts<T, E>& x, Norm norm, T scale, const int64_t* edge, int64_t sets, const Panels<T>& query) {
    multiply(x, edge[sets] - edge[0], query);
    weigh(x, affinity, norm, scale, edge, sets);
    if constexpr (IS_PAIR<E>)
      if (mark_exact(x, edge, sets)) {
        multiply_exact(x, edge[sets] - edge[0], query);
        weigh(x, affinity, norm, scale, edge, sets);
      }
  }

  // Whether the terms of |P| nearly cancel in a column of begin .. end, so that rounded ones would not give P.
  template <class X>
  bool cancels(const X& x, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j)
      if (length[j] * length[j] < T(CANCELLED) * x.largest) return true;
    return false;
  }

  // The affinities of all rows of x, which may be several sets, with the queries.
  template <class X>
  void multiply(const X& x, int64_t columns, const Panels<T>& query) {
    for (int64_t p = 0; p < columns; p += WIDE)
      gemm<E>(x.n, least(WIDE, columns - p), depth<E>(x.D), x.contexts(),
              {factors<E>(x.D, WIDE, query.at(0, p), WIDE, query_pairs), WIDE}, zero,
              [&](int64_t i, int64_t j, Vec<T> c) { store(affinity + i * ld + p + j, c); });
  }

  // What attend() makes of the affinities [n][ld] of one set x; `scales`, unless null, are inverse temperatures of each
  // column in addition to `scale`.
  template <class X>
  void weigh(const X& x, const T* affinity, Norm norm, T scale, const int64_t* edge, int64_t sets,
             const T* scales = nullptr) {
    const int64_t columns = edge[sets] - edge[0], n = x.n;
    logits<T>(norm, scale, n, edge, sets, affinity, weight, ld, factor);
    for (int64_t i = 0; scales && i < n; ++i)
      for (int64_t j = 0; j < columns; j += LANES<T>)
        store(weight + i * ld + j, load(weight + i * ld + j) * load(scales + j));
    exponentials<T>(n, columns, weight, ld, total);
    for (int64_t j = 0; j < columns; j += LANES<T>) store(length + j, Vec<T>{});
    gemm<T>(n, columns, n, {x.gram, x.ld}, {weight, ld}, zero,
            [&](int64_t i, int64_t j, Vec<T> c) {
              store(length + j, load(length + j) + c * load(weight + i * ld + j));
            });
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      const Vec<T> all = load(total + j);
      Vec<T> square = load(length + j) / (all * all);
      const Vec<Int<T>> poor = square < T(CANCELLED) * x.largest;
      bool cancels = false;
      for (int l = 0; l < LANES<T>; ++l) cancels |= poor[l] != 0;
      if (cancels) square = select<T>(poor, summed(x, j) / (all * all), square);
      store(length + j, root(max<T>(square, Vec<T>{})));
      const Vec<T> divide = T(1) / (all * (load(length + j) + T(EPS)));
      for (int64_t i = 0; i < n; ++i) store(weight + i * ld + j, load(weight + i * ld + j) * divide);
    }
  }

  // y of the columns, block by block of features, and `inverse`; with `relu`, of max(y, 0).
  template <class X>
  void project(const X& x, const Projection<T, E>& w, int64_t columns, const Panels<T>& query, bool relu = false) {
    const E* const shares = factors<E>(x.n, columns, weight, ld, weight_pairs);
    for (int64_t d = 0; d < x.D; d += FEATURES) {
      const int64_t K = least(FEATURES, x.D - d);
      for (int64_t p = 0; p < columns; p += WIDE) {
        const T* q = query.at(d, p);
        E* square = squares.at(0, p);
        Vec<T> even[TILE_VECTORS];
        const auto begin = [=](int64_t i, int64_t j) { return -load(q + i * WIDE + j); };
        const int64_t wide = least(WIDE, columns - p);
        gemm<E>(K, wide, depth<E>(x.n), x.features(d), {shares + p, ld}, begin,
                [&, K](int64_t i, int64_t j, Vec<T> c) { put_factor(K, i, j, c * c, even, square, WIDE); });
        if constexpr (IS_PAIR<E>)
          if (some_exact)
            gemm<T>(K, wide, x.n, {x.row + d, x.row_ld}, {weight + p, ld}, begin,
                    [&, K](int64_t i, int64_t j, Vec<T> c) {
                      put_factor(K, i, j, c * c, even, square, WIDE, exact + p);
                    });
      }
      for (int64_t p = 0; p < columns; p += WIDE) {
        T* y = similar.at(0, p);
        const T* bias = w.bias;
        const auto product = [&](auto begin) {
          gemm<E>(w.S, least(WIDE, columns - p), depth<E>(K), w.block(d), {squares.at(0, p), WIDE}, begin,
                  [=](int64_t s, int64_t j, Vec<T> c) { store(y + s * WIDE + j, c); });
        };
        if (d == 0) product([=](int64_t s, int64_t) { return splat(bias[s]); });
        else product([=](int64_t s, int64_t j) { return load(y + s * WIDE + j); });
      }
    }
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      T* y = similar.at(0, j) + j % WIDE;
      Vec<T> square{};
      for (int64_t s = 0; relu && s < w.S; ++s) {
        const Vec<T> v = load(y + s * WIDE);
        store(y + s * WIDE, v < 0 ? Vec<T>{} : v);
      }
      for (int64_t s = 0; s < w.S; ++s) square += load(y + s * WIDE) * load(y + s * WIDE);
      store(inverse + j, T(1) / (root(square) + T(EPS)));
    }
  }

  // Set k's similarity vectors become columns of out [S][out_ld] from column(k) on. Sets must follow each other in
  // out: what is written for one may pass its end by a vector.
  template <class Column>
  void place(const int64_t* edge, int64_t sets, int64_t S, T* out, int64_t out_ld, Column column) const {
    for (int64_t k = 0; k < sets; ++k) {
      const int64_t end = edge[k + 1] - edge[0];
      for (int64_t j = edge[k] - edge[0], next; j < end; j = next) {
        next = least(least(j + LANES<T>, end), j / WIDE * WIDE + WIDE);  // in one panel
        const T* y = similar.at(0, j) + j % WIDE;
        const Vec<T> by = load(inverse + j);
        T* to = out + column(k) + j - (edge[k] - edge[0]);
        for (int64_t s = 0; s < S; ++s) store(to + s * out_ld, load(y + s * WIDE) * by);
      }
    }
  }

 private:
  static constexpr auto zero = [](int64_t, int64_t) { return Vec<T>{}; };

  // Fills `exact`, for all columns of a set of queries alike; returns some_exact.
  bool mark_exact(const Contexts<T, E>& x, const int64_t* edge, int64_t sets) {
    some_exact = false;
    for (int64_t k = 0; k < sets; ++k) {
      const int64_t begin = edge[k] - edge[0], end = edge[k + 1] - edge[0];
      const bool cancelled = cancels(x, begin, end);
      std::fill(exact + begin, exact + end, T(cancelled));
      some_exact |= cancelled;
    }
    return some_exact;
  }

  // The affinities of the columns marked in `exact`, by products of T.
  void multiply_exact(const Contexts<T, E>& x, int64_t columns, const Panels<T>& query) {
    for (int64_t p = 0; p < columns; p += WIDE)
      gemm<T>(x.n, least(WIDE, columns - p), x.D, {x.column, x.ld}, {query.at(0, p), WIDE}, zero,
              [&](int64_t i, int64_t j, Vec<T> c) {
                T* const to = affinity + i * ld + p + j;
                store(to, select<T>(load(exact + p + j) > 0, c, load(to)));
              });
  }

  // |sum of e x|^2 of one vector of columns, by the sum itself.
  template <class X>
  Vec<T> summed(const X& x, int64_t j) const {
    Vec<T> square{};
    gemm<T>(x.D, LANES<T>, x.n, {x.row, x.row_ld}, {weight + j, ld}, zero,
            [&](int64_t, int64_t, Vec<T> c) { square += c * c; });
    return square;
  }
};

}  // namespace itm_fast
