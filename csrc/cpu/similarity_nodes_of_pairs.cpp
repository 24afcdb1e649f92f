// similarity_nodes of a list of pairs, forward: (1) and (2) of itm_fast/ops/similarity_nodes.py.
//
// A thread owns one image at a time. The captions that it is paired with are one tile (similarity.h), or several where
// they have many words. Scratch: W and W_g, 1 MiB each at D 1024 and S 256, and per thread a tile.
#include "similarity_pairs.h"

namespace itm_fast {
namespace {

template <class T, class E = T>
void forward(const SimilarityNodesOfPairsCall& call) {
  const SimilarityPairs pairs(call);
  const RowSets images = regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths),
                words = captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens);
  const Projection<T, E> local({call.local_weight, call.dtype}, {call.local_bias, call.dtype}, call.S, call.D);
  const Projection<T> global({call.global_weight, call.dtype}, {call.global_bias, call.dtype}, call.S, call.D);
  const Result result{call.nodes, call.inverse};
  parallel(int64_t(pairs.images.size()), call.threads, [&] {
    SimilarityTile<T> overall(1, pairs.most, call.D, call.S);
    std::fill_n(overall.weight + 0, overall.ld, T(1));
    return [&, overall = std::move(overall), x = Contexts<T, E>(images.most, call.D), global_x = Contexts<T>(1, call.D),
            tile = SimilarityTile<T, E>(images.most, pairs.widest, call.D, call.S),
            columns = RunColumns<T>(pairs, call.D), room = Buffer<T>(TILE_COLUMNS<T> * call.S)](int64_t part) mutable {
      const int64_t image = pairs.images[part].front().image;
      x.read(images.source, images.first[image], images.length(image));
      global_x.read({call.image_global, call.dtype}, image, 1);
      for (const Run& run : pairs.images[part]) {
        columns.read(pairs, run, words);
        for (int64_t k = 0; k < run.sets(); ++k)
          columns.captions.read({call.caption_global, call.dtype}, pairs.caption[run.first + k], 1, call.D, k);
        tile.attend(x, Norm::CLIPPED_L2NORM, T(call.scale), run.edge.data(), run.sets(), columns.words);
        tile.project(x, local, run.columns(), columns.words);
        const std::vector<int64_t> rows = pairs.rows(run);
        write_columns(tile, run.columns(), call.S, call.dtype, static_cast<T*>(room), result,
                      [&](int64_t j) { return rows[j]; });
        overall.project(global_x, global, run.sets(), columns.captions);
        write_columns(overall, run.sets(), call.S, call.dtype, static_cast<T*>(room), result,
                      [&](int64_t k) { return pairs.bounds[run.first + k]; });
      }
    };
  });
}

}  // namespace
}  // namespace itm_fast

// Writes nodes [pair_bounds[B], S] in the dtype of the tensors, and inverse [pair_bounds[B]] = 1 / (|y| + eps), float,
// or double if the tensors are double.
extern "C" const char* similarity_nodes_of_pairs(const itm_fast::SimilarityNodesOfPairsCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return forward<double>(call);
#if defined(__AVX512BF16__)
    if (call.bfloat16) return forward<float, Pair>(call);
#endif
    forward<float>(call);
  });
}
