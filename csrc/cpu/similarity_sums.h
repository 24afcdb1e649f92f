// What the backward passes of vector similarities share: which gradients go where, and the sums of one slot.
#pragma once
#include <optional>

#include "similarity_backward.h"

namespace itm_fast {

// Where the gradients go, in T; null where none is wanted.
struct Gradients {
  void *context, *query, *weight, *bias;
  bool any() const { return context || query || weight || bias; }
};

// The similarity vectors of the forward pass and their 1 / (|y| + eps), if they were saved; else rows is null.
struct Known {
  Source rows;
  const void* inverse;
};

// Adds rows row, row + 1, ... of `from` to a set's rows of a gradient with the shape of the sets' tensor.
template <class T>
void add_rows(const RowSets& sets, int64_t set, void* to, const FeaturePanels<T>& from, int64_t row) {
  for (int64_t r = 0; r < sets.length(set); ++r)
    from.add_row_to(static_cast<T*>(to) + (sets.first[set] + r) * from.D, row + r);
}

// A slot's sums of the gradients of one projection.
template <class T>
SimilaritySums<T> sums_of(const Gradients& wanted, int64_t D, int64_t S) {
  return {wanted.context != nullptr, wanted.query != nullptr, wanted.weight != nullptr, wanted.bias != nullptr,
          FeaturePanels<T>(D, S), Buffer<T>(round_up(S, LANES<T>))};
}

// The sums of all slots: each is made by the thread that takes the slot first, so that the threads share the zeros.
template <class T>
using SlotSums = std::vector<std::optional<SimilaritySums<T>>>;

// Adds the slots' sums, in their order, to the gradients of weight and bias. Threads share out the S rows.
template <class T>
void add_sums(const SlotSums<T>& sums, const Gradients& wanted, int64_t D, int64_t S, int64_t threads) {
  parallel(S, threads, [&] {
    return [&](int64_t s) {
      for (const std::optional<SimilaritySums<T>>& one : sums) {
        if (wanted.weight) one->weight.add_row_to(static_cast<T*>(wanted.weight) + s * D, s);
        if (wanted.bias) static_cast<T*>(wanted.bias)[s] += one->bias[s];
      }
    };
  });
}

}  // namespace itm_fast
