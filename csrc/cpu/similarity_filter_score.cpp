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
void forward(const PairScore& p, const Source& weight, const Source (&one)[5], double eps) {
  T room[5], value[5];
  for (int k = 0; k < 5; ++k) value[k] = *read<T>(one[k], 0, 1, room + k);
  const FilterWeights<T> weights(p.S, weight, value[0], value[1], value[2], value[3], value[4], T(eps));
  score_pairs<T, E>(p, [&](int64_t nodes, int64_t) { return Head<T>(weights, nodes); });
}

}  // namespace
}  // namespace itm_fast

// Tensors of one dtype, but the running statistics, float64: image [I, R, D], image_global [I, D], words [cu_seqlens[T], D], caption_global [T, D], weights
// [S, D], biases [S]; filter_weight [S], the five after it [1]; score_weight [S];
// score [I, T]. bfloat16: products of bfloat16 values may be used, where the processor has them.
extern "C" const char* similarity_filter_score(
    const void* image, const void* image_global, const void* words, const void* caption_global, const void* local_weight,
    const void* local_bias, const void* global_weight, const void* global_bias, const void* filter_weight,
    const void* filter_bias, const void* norm_weight, const void* norm_bias, const void* running_mean,
    const void* running_var, const void* score_weight, const void* score_bias, const int64_t* cu_seqlens,
    const int64_t* region_lengths, void* score, int64_t dtype, int64_t I, int64_t R, int64_t T, int64_t D, int64_t S,
    double scale, double eps, [[maybe_unused]] int64_t bfloat16, int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const auto s = [&](const void* data) { return Source{data, dtype}; };
    const PairScore p{s(image), s(image_global), s(words), s(caption_global), s(local_weight), s(local_bias),
                      s(global_weight), s(global_bias), s(score_weight), s(score_bias), cu_seqlens, region_lengths, score,
                      I, R, T, D, S, scale, threads};
    const Source one[5] = {s(filter_bias), s(norm_weight), s(norm_bias), {running_mean, FLOAT64}, {running_var, FLOAT64}};
    if (dtype == FLOAT64) return forward<double>(p, s(filter_weight), one, eps);
#if defined(__AVX512BF16__)
    if (bfloat16) return forward<float, Pair>(p, s(filter_weight), one, eps);
#endif
    forward<float>(p, s(filter_weight), one, eps);
  });
}
