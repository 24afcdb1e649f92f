// Forward of similarity_graph: (1) to (3) of itm_fast/ops/similarity_graph.py.
//
// A thread owns one image with one chunk of captions at a time: it transposes their nodes into columns, and its Graph
// (graph.h) does the rest in the second cache. Scratch: the weights (4 MiB at S 256 and 3 steps), shared, and a Graph
// per thread (1.5 MiB).
#include "calls/similarity_graph.h"
#include "graph.h"
#include "write.h"

namespace itm_fast {
namespace {

template <class T, class E = T>
void forward(const SimilarityGraphCall& p) {
  const GraphWeights<T, E> weights(p);
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
      const T* rows = read<T>({p.nodes, p.dtype}, (i * p.M + c.begin) * p.S, c.rows * p.S, room);
      transpose_by_squares<T>(rows, p.S, c.rows, p.S, graph.nodes(), graph.stride());
      graph.run(p.cu_seqlens, c.first, c.last, z, p.S);
      write<T>(p.z, p.dtype, (i * p.T + c.first) * p.S, (c.last - c.first) * p.S, z, T(1));
    };
  });
}

}  // namespace
}  // namespace itm_fast

// Writes z [I, T, S] in the dtype of the nodes; shapes: calls/, who owns what: calls.cpp.
extern "C" const char* similarity_graph(const itm_fast::SimilarityGraphCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return forward<double>(call);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return forward<float, Pair>(call);
#endif
    forward<float>(call);
  });
}
