// IMRAM's gate, (3) and (4) of itm_fast/models/imram.py: queries and what they attend to become the queries of the next
// step, in one pass over memory. A thread owns some rows of the result at a time; a row's bits depend on neither the
// others nor the threads.
#include "calls/gated_rows.h"
#include "cross_attention_rows.h"
#include "shared_rows.h"
#include "write.h"

namespace itm_fast {
namespace {

template <class T>
void refine(const GatedRowsCall& call) {
  const int64_t D = call.D;
  for_shared_rows(call, [&] {
    return [&, room = Buffer<T>(5 * D), out = Buffer<T>(round_up(D, LANES<T>))](int64_t row, int64_t own) {
      const T* const query = read<T>({call.queries, call.dtype}, own * D, D, room);
      const T* const product = read<T>({call.products, call.dtype}, own * 2 * D, 2 * D, room + D);
      const T* const attended = read<T>({call.attended, call.dtype}, (row + 1) * call.P - 2 * D, 2 * D, room + 3 * D);
      Vec<T> square{};
      for (int64_t d = 0; d < D; d += LANES<T>) {
        const auto at = [&](const T* x) { return head(x + d, D - d); };
        const Vec<T> g = sigmoid<T>(at(product + D) + at(attended + D));
        const Vec<T> refined = g * at(query) + (T(1) - g) * tanh<T>(at(product) + at(attended));
        store(out + d, refined);
        square += refined * refined;
      }
      const T factor = call.unit ? T(1) / (std::sqrt(sum<T>(square)) + T(EPS)) : T(1);
      write<T>(call.refined, call.dtype, row * D, D, out, factor);
    };
  });
}

}  // namespace
}  // namespace itm_fast

// Writes refined [B, C, Q, D] in the dtype of the tensors. products are [B, Q, 2 D], of the candidate and of the gate,
// as are the last 2 D values of each row of attended.
extern "C" const char* gated_rows(const itm_fast::GatedRowsCall& call) {
  using namespace itm_fast;
  return guarded([&] { call.dtype == Dtype::FLOAT64 ? refine<double>(call) : refine<float>(call); });
}
