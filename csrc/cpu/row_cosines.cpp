// Cosines of rows with the rows of another tensor that belong to them, in one pass over memory. A thread owns some rows
// of the result at a time; a row's bits depend on neither the others nor the threads.
#include "calls/row_cosines.h"
#include "cross_attention_rows.h"
#include "shared_rows.h"
#include "write.h"

namespace itm_fast {
namespace {

template <class T>
void cosines(const RowCosinesCall& call) {
  const int64_t D = call.D;
  for_shared_rows(call, [&] {
    return [&, room = Buffer<T>(2 * D)](int64_t row, int64_t own) {
      const T* const x = read<T>({call.queries, call.dtype}, own * D, D, room);
      const T* const y = read<T>({call.attended, call.dtype}, row * call.P, D, room + D);
      Vec<T> dot{}, of_x{}, of_y{};
      for (int64_t d = 0; d < D; d += LANES<T>) {
        const Vec<T> a = head(x + d, D - d), b = head(y + d, D - d);
        dot += a * b;
        of_x += a * a;
        of_y += b * b;
      }
      const T lengths = std::sqrt(sum<T>(of_x)) * std::sqrt(sum<T>(of_y));
      const T cosine = sum<T>(dot) / std::max(lengths, T(EPS));
      write<T>(call.cosine, call.dtype, row, 1, &cosine, T(1));
    };
  });
}

}  // namespace
}  // namespace itm_fast

// Writes cosine [B, C, Q] in the dtype of the tensors, of queries [B, Q, D] with the first D values of the rows of
// attended.
extern "C" const char* row_cosines(const itm_fast::RowCosinesCall& call) {
  using namespace itm_fast;
  return guarded([&] { call.dtype == Dtype::FLOAT64 ? cosines<double>(call) : cosines<float>(call); });
}
