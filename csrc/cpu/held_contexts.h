// Contexts of the backward pass: some sets at a time, whose products with all queries of a chunk are made together.
#pragma once
#include "pack.h"

namespace itm_fast {

// One set of contexts among those held: what weigh() and project() ask for.
template <class T>
struct HeldSet {
  const T *row, *column, *gram;
  int64_t first, n, D, row_ld, column_ld, ld;  // `first` of all rows held; ld is the Gram matrix'
  T largest;

  Left<T> features(int64_t d) const { return {row + d, row_ld}; }
};

// Some sets of contexts, one under the other, so that what all of them multiply passes by once.
template <class T>
struct HeldContexts {
  int64_t n = 0, D, row_ld, ld, gram_ld;
  Buffer<T> row, column, gram;  // [n][row_ld], [D][ld], [n][gram_ld]
  std::vector<HeldSet<T>> sets;

  // Room for `rows` rows, in sets of at most `most`.
  HeldContexts(int64_t rows, int64_t most, int64_t D)
      : D(D), row_ld(padded<T>(D)), ld(padded<T>(rows)), gram_ld(padded<T>(most)), row(rows * row_ld), column(D * ld),
        gram(rows * gram_ld) {}

  void clear() {
    n = 0;
    sets.clear();
  }
  // Makes place for a set of `count` rows, which read_set() then fills.
  void add(int64_t count) {
    sets.push_back({row + n * row_ld, column + n, gram + n * gram_ld, n, count, D, row_ld, ld, gram_ld, T(0)});
    n += count;
  }
  void read_set(int64_t k, Source s, int64_t first) {
    const HeldSet<T>& set = sets[k];
    read_both<T>(s, first, set.n, D, row + set.first * row_ld, row_ld, column + set.first, ld);
  }
  // Once all sets are read: their Gram matrices.
  void multiply_set(int64_t k) {
    HeldSet<T>& set = sets[k];
    T* to = gram + set.first * gram_ld;
    set.largest = multiply_with_each_other<T>(set.n, D, set.column, ld, to, gram_ld);
  }

  Left<T> contexts() const { return {column, ld}; }
};

}  // namespace itm_fast
