// Matrices of features with the features along the lanes, for the backward pass of vector similarities.
#pragma once
#include "similarity.h"

namespace itm_fast {

// Rows of D features with the features along the lanes: panels [rows][WIDE], each of WIDE features.
template <class T>
struct FeaturePanels : Panels<T> {
  using Panels<T>::WIDE, Panels<T>::at;
  int64_t D, rows;
  FeaturePanels(int64_t D, int64_t rows) : Panels<T>(D, rows), D(D), rows(rows) {}

  // Row `first` and the following ones of a tensor become rows row, row + 1, ...
  void read_rows(Source s, int64_t first, int64_t count, int64_t row) {
    Buffer<T> room(D);
    for (int64_t r = 0; r < count; ++r) {
      const T* from = itm_fast::read<T>(s, (first + r) * D, D, room);
      for (int64_t d = 0; d < D; d += WIDE) std::copy_n(from + d, least(WIDE, D - d), at(row + r, d));
    }
  }

  void clear() { std::fill_n(this->data + 0, (D + WIDE - 1) / WIDE * this->size, T(0)); }

  void add_row_to(T* to, int64_t row) const {
    for (int64_t d = 0; d < D; d += WIDE) {
      const T* from = at(row, d);
      for (int64_t k = 0; k < least(WIDE, D - d); ++k) to[d + k] += from[k];
    }
  }
};

// W [S, D], its features along the lanes: S rows, or rows of pairs when E is Pair.
template <class T, class E>
FeaturePanels<E> feature_rows(Source w, int64_t S, int64_t D) {
  FeaturePanels<T> rows(D, S);
  rows.read_rows(w, 0, S, 0);
  if constexpr (IS_PAIR<E>) {
    FeaturePanels<E> pairs(D, depth<E>(S));
    for (int64_t d = 0; d < D; d += rows.WIDE) pair_rows(S, rows.WIDE, rows.at(0, d), rows.WIDE, pairs.at(0, d));
    return pairs;
  } else {
    return rows;
  }
}

}  // namespace itm_fast
