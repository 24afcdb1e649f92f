// What white_box.cpp shares with white_box_attention.cpp and white_box_score.cpp: matrices in numpy's memory, and the
// latter two's functions, which are compiled apart so that only one file waits for pybind11.
#pragma once
#include <tuple>

#include "pack.h"

namespace white_box {

// Rows of `columns` values, `ld` values apart. What lies beyond the columns belongs to the matrix' padding.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, ld;

  T* row(int64_t i) const { return data + i * ld; }
};

// logits() of attention.h: affinities s [n, columns] of sets with column bounds `edge` into logit, of the same ld.
template <class T>
void logits(int64_t norm, double scale, const std::vector<int64_t>& edge, Matrix<T> s, Matrix<T> logit);

// logits_backward() of attention.h: s becomes its gradient, given that of the logits, plus `more`.
template <class T>
void logits_backward(int64_t norm, double scale, const std::vector<int64_t>& edge, Matrix<T> s, Matrix<T> d_logit,
                     Matrix<T> more);

// exponentials() of attention.h, in place; returns `total`.
template <class T>
std::vector<T> exponentials(Matrix<T> logit);

// What SimilarityTile makes of one set of contexts and the query sets with bounds `edge`.
template <class T>
struct Attended {
  std::vector<T> weight;        // [n, columns], already over total * (|P| + eps)
  std::vector<T> total, length; // [columns]
  std::vector<T> similar;       // [S, columns]: the similarity vectors, of length 1
};
template <class T>
Attended<T> attend(itm_fast::Source context, int64_t n, itm_fast::Source query, int64_t D, int64_t norm, double scale,
                   const std::vector<int64_t>& edge, itm_fast::Source weight, itm_fast::Source bias, int64_t S);

// The windows that for_windows() cuts: bounds of each chunk's sets, and its columns [D, rows] unpacked.
template <class T>
using Windows = std::vector<std::vector<std::tuple<int64_t, int64_t, std::vector<T>>>>;
template <class T>
Windows<T> windows(itm_fast::Source rows, int64_t D, const std::vector<int64_t>& edge, int64_t bytes, int64_t columns,
                   int64_t threads);

// gram_matrix() of cross_attention_rows.h: products of rows [n, K] with each other, each term times weight [K], unless
// that is null.
template <class T>
void gram_matrix(Matrix<T> rows, const T* weight, Matrix<T> gram);

// attend() of cross_attention_rows.h: out[first .. last] = sum over rows x of weight[x] times row x; returns the sum's
// squared length over these features.
template <class T>
T weighted_sum(Matrix<T> rows, const T* weight, int64_t first, int64_t last, T* out);

}  // namespace white_box
