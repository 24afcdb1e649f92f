// Attention and windows for the tests: see white_box.h. No pybind11 here.
#include "white_box.h"

#include "windows.h"

using namespace itm_fast;

namespace white_box {

template <class T>
void logits(int64_t norm, double scale, const std::vector<int64_t>& edge, Matrix<T> s, Matrix<T> logit) {
  Buffer<T> factor(round_up(s.rows, LANES<T>));
  itm_fast::logits<T>(Norm(norm), T(scale), s.rows, edge.data(), int64_t(edge.size()) - 1, s.data, logit.data, s.ld,
                      factor);
}

template <class T>
void logits_backward(int64_t norm, double scale, const std::vector<int64_t>& edge, Matrix<T> s, Matrix<T> d_logit,
                     Matrix<T> more) {
  itm_fast::logits_backward<T>(Norm(norm), T(scale), s.rows, edge.data(), int64_t(edge.size()) - 1, s.data,
                               d_logit.data, s.ld, [=](int64_t x, int64_t j) { return load(more.row(x) + j); });
}

template <class T>
std::vector<T> exponentials(Matrix<T> logit) {
  Buffer<T> total(padded<T>(logit.columns));
  itm_fast::exponentials<T>(logit.rows, logit.columns, logit.data, logit.ld, total);
  return {total + 0, total + logit.columns};
}

template <class T>
Attended<T> attend(Source context, int64_t n, Source query, int64_t D, int64_t norm, double scale,
                   const std::vector<int64_t>& edge, Source weight, Source bias, int64_t S) {
  const int64_t sets = int64_t(edge.size()) - 1, columns = edge.back() - edge.front(), ld = padded<T>(columns);
  Contexts<T> x(n, D);
  x.read(context, 0, n);
  Panels<T> panels(columns, D);
  panels.read(query, 0, columns, D, 0);
  const Projection<T> projection(weight, bias, S, D);
  SimilarityTile<T> tile(n, columns, D, S);
  tile.attend(x, Norm(norm), T(scale), edge.data(), sets, panels);
  tile.project(x, projection, columns, panels);
  Buffer<T> out(S * ld);
  tile.place(edge.data(), sets, S, out + 0, ld, [&](int64_t k) { return edge[size_t(k)] - edge.front(); });
  Attended<T> result{{}, {tile.total + 0, tile.total + columns}, {tile.length + 0, tile.length + columns}, {}};
  for (int64_t i = 0; i < n; ++i)
    result.weight.insert(result.weight.end(), tile.weight + i * tile.ld, tile.weight + i * tile.ld + columns);
  for (int64_t s = 0; s < S; ++s) result.similar.insert(result.similar.end(), out + s * ld, out + s * ld + columns);
  return result;
}

template <class T>
Windows<T> windows(Source rows, int64_t D, const std::vector<int64_t>& edge, int64_t bytes, int64_t columns,
                   int64_t threads) {
  Windows<T> result;
  const RowSets sets = captions(rows, int64_t(edge.size()) - 1, D, edge.data());
  for_windows<T>(sets, threads, [&](const QueryWindow<T>& window) {
    auto& found = result.emplace_back();
    for (int64_t c = 0; c < window.count(); ++c) {
      const Chunk& chunk = window.chunks[size_t(c)];
      std::vector<T> values;
      for (int64_t d = 0; d < D; ++d)
        for (int64_t j = 0; j < chunk.rows; ++j)
          values.push_back(window.panels[size_t(c)].at(d, j)[j % Panels<T>::WIDE]);
      found.emplace_back(chunk.first, chunk.last, std::move(values));
    }
  }, bytes, columns);
  return result;
}

#define FOR_DTYPE(T)                                                                                                   \
  template void logits(int64_t, double, const std::vector<int64_t>&, Matrix<T>, Matrix<T>);                            \
  template void logits_backward(int64_t, double, const std::vector<int64_t>&, Matrix<T>, Matrix<T>, Matrix<T>);        \
  template std::vector<T> exponentials(Matrix<T>);                                                                     \
  template Attended<T> attend(Source, int64_t, Source, int64_t, int64_t, double, const std::vector<int64_t>&, Source,  \
                              Source, int64_t);                                                                        \
  template Windows<T> windows(Source, int64_t, const std::vector<int64_t>&, int64_t, int64_t, int64_t);
FOR_DTYPE(float)
FOR_DTYPE(double)

}  // namespace white_box
