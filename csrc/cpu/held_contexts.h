// Context sets of the backward pass, some of them in memory at a time: one product multiplies all of them with a chunk
// of queries. E is what these products multiply: T, or pairs of bfloat16 values, which are then held beside the rows.
#pragma once
#include "pack.h"

namespace itm_fast {

// One of the sets held: its n rows, its columns and its Gram matrix, which point into HeldContexts. It has the members
// that SimilarityTile's weigh() and project() ask for.
template <class T, class E>
struct HeldSet {
  const T *row, *column, *gram;
  int64_t first, n, D, row_ld, ld;  // `first` of all rows held; ld is the Gram matrix'
  T largest;
  int64_t first_factor;  // of all rows of factors, which are those of pairs when E is Pair

  Left<T> features(int64_t d) const { return {row + d, row_ld}; }
};

// Some sets, one under the other in three arrays. Use: clear(), add() for every set, then read_set() for each, and when
// all are read multiply_set() for each; threads may share out the sets k of either step.
template <class T, class E = T>
struct HeldContexts {
  int64_t n = 0, factors = 0, D, row_ld, ld, gram_ld;
  Buffer<T> row, column, gram;        // [n][row_ld], [D][ld], [n][gram_ld]
  Buffer<E> row_pairs, column_pairs;  // of the rows of each set's `row`, and of those of `column`, when E is Pair
  std::vector<HeldSet<T, E>> sets;

  // Room for `rows` rows of all sets together, and for sets of at most `most` rows; clear() makes room again.
  HeldContexts(int64_t rows, int64_t most, int64_t D)
      : D(D), row_ld(padded<T>(D)), ld(padded<T>(rows)), gram_ld(padded<T>(most)), row(rows * row_ld), column(D * ld),
        gram(rows * gram_ld), row_pairs(IS_PAIR<E> ? rows * row_ld : 0),
        column_pairs(IS_PAIR<E> ? depth<E>(D) * ld : 0) {}

  void clear() {
    n = factors = 0;
    sets.clear();
  }
  // Gives the next set its place, `count` rows, which read_set() fills.
  void add(int64_t count) {
    sets.push_back({row + n * row_ld, column + n, gram + n * gram_ld, n, count, D, row_ld, gram_ld, T(0), factors});
    n += count;
    factors += depth<E>(count);
  }
  // Fills set k from the rows of a tensor that begin with row `first`.
  void read_set(int64_t k, Source s, int64_t first) {
    const HeldSet<T, E>& set = sets[k];
    read_both<T>(s, first, set.n, D, row + set.first * row_ld, row_ld, column + set.first, ld);
  }
  // Set k's Gram matrix and the largest |row|^2, its rows' pairs, and its share of the columns' pairs. All sets must be
  // read: a product reads some columns beyond a set's own.
  void multiply_set(int64_t k) {
    HeldSet<T, E>& set = sets[k];
    T* to = gram + set.first * gram_ld;
    set.largest = multiply_with_each_other<T>(set.n, D, set.column, ld, to, gram_ld);
    if constexpr (IS_PAIR<E>) {
      pair_rows(set.n, D, set.row, row_ld, row_pairs + set.first_factor * row_ld);
      const auto begin = [&](int64_t part) { return depth<E>(D) * part / int64_t(sets.size()); };
      const int64_t from = begin(k);
      pair_rows(least(2 * begin(k + 1), D) - 2 * from, n, column + 2 * from * ld, ld, column_pairs + from * ld);
    }
  }

  // All sets' rows, and their columns, as factors.
  const E* row_factors() const { return either<E>(row, row_pairs); }
  const E* column_factors() const { return either<E>(column, column_pairs); }
};

}  // namespace itm_fast
