// Forward of similarity_graph: (1) to (3) of itm_fast/ops/similarity_graph.py.
//
// A part is one image with one chunk of captions: its nodes are turned into columns, and the tile of graph.h does the
// rest in the second cache. Scratch: the weights (4 MiB at S 256 and 3 steps) and a tile per thread (1.5 MiB).
#include "graph.h"
#include "write.h"

namespace itm_fast {
namespace {

struct Problem {
  Source nodes;
  int64_t I, M, S, steps, T;
  const int64_t* cu_seqlens;
  void* result;
  int64_t threads;
};

template <class T, class E = T>
void forward(const Problem& p, const Source (&parameter)[5]) {
  const GraphWeights<T, E> weights(p.S, p.steps, parameter[0], parameter[1], parameter[2], parameter[3], parameter[4]);
  const std::vector<Chunk> pieces = chunks(p.cu_seqlens, p.T, GRAPH_NODES);
  int64_t most = 0, longest = 0, captions = 0;
  for (const Chunk& c : pieces) most = std::max(most, c.rows), captions = std::max(captions, c.last - c.first);
  for (int64_t t = 0; t < p.T; ++t) longest = std::max(longest, p.cu_seqlens[t + 1] - p.cu_seqlens[t]);
  const int64_t count = int64_t(pieces.size());
  parallel(p.I * count, p.threads, [&] {
    return [&, graph = Graph<T, E>(weights, most, longest), room = Buffer<T>(most * p.S),
            z = Buffer<T>(captions * p.S)](int64_t part) mutable {
      const int64_t i = part / count;
      const Chunk& c = pieces[part % count];
      const T* rows = read<T>(p.nodes, (i * p.M + c.begin) * p.S, c.rows * p.S, room);
      transpose_by_squares<T>(rows, p.S, c.rows, p.S, graph.nodes(), graph.stride());
      graph.run(p.cu_seqlens, c.first, c.last, z, p.S);
      write<T>(p.result, p.nodes.dtype, (i * p.T + c.first) * p.S, (c.last - c.first) * p.S, z, T(1));
    };
  });
}

}  // namespace
}  // namespace itm_fast

// Tensors of one dtype: nodes [I, M, S], weights [K, S, S], biases [K, S]; result [I, T, S]. bfloat16: products
// of bfloat16 values may be used, where the processor has them.
extern "C" const char* similarity_graph(const void* nodes, const void* query_weight, const void* query_bias,
                                        const void* key_weight, const void* value_weight, const void* value_bias,
                                        int64_t dtype, int64_t I, int64_t M, int64_t S, int64_t K, int64_t T,
                                        const int64_t* cu_seqlens, [[maybe_unused]] int64_t bfloat16, void* result,
                                        int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const auto source = [&](const void* data) { return Source{data, dtype}; };
    const Problem p{source(nodes), I, M, S, K, T, cu_seqlens, result, threads};
    const Source parameter[5] = {source(query_weight), source(query_bias), source(key_weight), source(value_weight),
                                 source(value_bias)};
    if (dtype == FLOAT64) return forward<double>(p, parameter);
#if defined(__AVX512BF16__)
    if (bfloat16) return forward<float, Pair>(p, parameter);
#endif
    forward<float>(p, parameter);
  });
}
