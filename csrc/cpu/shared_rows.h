// Rows of tensors [B, C, Q, ...], C times the same Q of each of B sets in a tensor [B, Q, ...].
#pragma once
#include "threads.h"

namespace itm_fast {

// For each row of a call's [B, C, Q] calls take(row, own), `own` the row of [B, Q] that it shares; `make()` makes a
// thread's `take`. A thread takes some rows at a time.
template <class Call, class Make>
void for_shared_rows(const Call& call, Make make) {
  constexpr int64_t ROWS = 64;
  const int64_t each = call.C * call.Q, rows = call.B * each;
  parallel((rows + ROWS - 1) / ROWS, call.threads, [&] {
    return [&, take = make()](int64_t part) mutable {
      for (int64_t row = part * ROWS; row < least((part + 1) * ROWS, rows); ++row)
        take(row, row / each * call.Q + row % call.Q);
    };
  });
}

}  // namespace itm_fast
