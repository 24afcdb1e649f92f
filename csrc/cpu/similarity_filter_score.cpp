// similarity_filter_score: SAF's pair score in evaluation, (1) and (2) of itm_fast/ops/similarity_filter_score.py. Tiles
// and scratch: pair_score.h and filter.h.
#include "filter.h"
#include "pair_score.h"

namespace itm_fast {
namespace {

// The filter, with the room for the nodes that it reads.
template <class T>
class Head {
 public:
  Head(const FilterWeights<T>& weights, int64_t nodes)
      : filter(weights, nodes), ld(padded<T>(nodes)), x(weights.S * ld) {}
  T* nodes() { return x; }
  int64_t stride() const { return ld; }
  void run(const int64_t* edge, int64_t first, int64_t last, T* z, int64_t ldz) {
    filter.run(x, ld, edge, first, last, z, ldz);
  }

 private:
  Filter<T> filter;
  int64_t ld;
  Buffer<T> x;
};

template <class T, class E = T>
void forward(const SimilarityFilterScoreCall& call) {
  const auto one = [&](const void* data, Dtype dtype) {
    T room;
    return *read<T>({data, dtype}, 0, 1, &room);
  };
  const FilterWeights<T> weights(
      call.S, {call.filter_weight, call.dtype}, one(call.filter_bias, call.dtype), one(call.norm_weight, call.dtype),
      one(call.norm_bias, call.dtype), one(call.running_mean, Dtype::FLOAT64), one(call.running_var, Dtype::FLOAT64),
      T(call.eps));
  score_pairs<T, E>(PairScore(call), [&](int64_t nodes, int64_t) { return Head<T>(weights, nodes); });
}

}  // namespace
}  // namespace itm_fast

extern "C" const char* similarity_filter_score(const itm_fast::SimilarityFilterScoreCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return forward<double>(call);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return forward<float, Pair>(call);
#endif
    forward<float>(call);
  });
}
