// Sums over rows of cross_attention_rows.h for the tests: see white_box.h. Apart from white_box_attention.cpp, as
// windows.h and cross_attention_rows.h each have a CHUNK_BYTES of their own.
#include "white_box.h"

#include "cross_attention_rows.h"

using namespace itm_fast;

namespace white_box {

template <class T>
void gram_matrix(Matrix<T> rows, const T* weight, Matrix<T> gram) {
  itm_fast::gram_matrix<T>([&](int64_t x) { return rows.row(x); }, rows.rows, rows.columns, weight, gram.data, gram.ld);
}

template <class T>
T weighted_sum(Matrix<T> rows, const T* weight, int64_t first, int64_t last, T* out) {
  std::vector<const T*> row;
  for (int64_t x = 0; x < rows.rows; ++x) row.push_back(rows.row(x));
  const auto share = [=](int64_t x) { return weight[x]; };
  return itm_fast::attend<T>(row.data(), rows.rows, share, first, last, rows.columns, out);
}

template void gram_matrix(Matrix<float>, const float*, Matrix<float>);
template void gram_matrix(Matrix<double>, const double*, Matrix<double>);
template float weighted_sum(Matrix<float>, const float*, int64_t, int64_t, float*);
template double weighted_sum(Matrix<double>, const double*, int64_t, int64_t, double*);

}  // namespace white_box
