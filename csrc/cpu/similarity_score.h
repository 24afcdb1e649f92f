// The pair scorers around a head (graph.h, filter.h), from encoded images and captions to the score: equations (1) to
// (3) of itm_fast/ops/similarity_score.py.
//
// A window of chunks of captions is packed once for all threads; a thread then owns one image at a time. It makes the
// global similarity vectors of all the window's captions at once, so that their product is as wide as the others, and
// goes through the chunks: local similarity vectors, nodes, head, score, all in the thread's own tiles (3 to 4 MiB at
// R 36, D 1024, S 256, of which what one product reads stays in L2). Scratch beside the tiles: the window (windows.h,
// 16 MiB), the weights, 4 MiB, and the window's global vectors, 2 MiB; so 64 MiB suffice for 10 threads.
#pragma once
#include "calls/similarity_graph_score.h"
#include "calls/similarity_graph_score_kept.h"
#include "filter.h"
#include "graph.h"
#include "windows.h"
#include "write.h"

namespace itm_fast {

// The arguments that the calls of both pair scorers have, and CMCAN's; shapes: calls/.
struct PairScore {
  Source image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, score_weight,
      score_bias;
  const int64_t *cu_seqlens, *region_lengths;
  void* score;
  Dtype score_dtype;
  int64_t I, R, T, D, S;
  double scale;
  Output output;
  bool relu;  // whether similarity vectors are those of max(y, 0)
  int64_t threads;
};

// Where the nodes of the first `images` images, [images, N + T, S], and their 1 / (|y| + eps) are kept for the backward
// pass; nowhere if there are none.
template <class T>
struct KeptNodes {
  T *nodes = nullptr, *inverse = nullptr;
  int64_t images = 0;
};

template <class Call>  // SimilarityGraphScoreCall or SimilarityFilterScoreCall
PairScore pair_score(const Call& c) {
  const auto of = [&](const void* data) { return Source{data, c.dtype}; };
  return {of(c.image), of(c.image_global), of(c.words), of(c.caption_global), of(c.local_weight), of(c.local_bias),
          of(c.global_weight), of(c.global_bias), of(c.score_weight), of(c.score_bias), c.cu_seqlens, c.region_lengths,
          c.score, c.dtype, c.I, c.R, c.T, c.D, c.S, c.scale, c.output, false, c.threads};
}

// Scores of all pairs. T is the type of sums, E what the large products multiply. head(nodes, longest) makes a thread's
// head, for chunks of at most `nodes` nodes and captions of at most `longest`: it has nodes(), the matrix [S][stride()]
// that this function fills with a chunk's similarity vectors, and run(edge, first, last, z, ldz), which turns them into
// one vector z [S] per caption. The score is sigmoid(score_weight . z + score_bias), the logit the
// argument of the sigmoid.
template <class T, class E, class MakeHead>
void score_pairs(const PairScore& p, KeptNodes<T> kept, MakeHead head) {
  const RowSets images = regions(p.image, p.I, p.R, p.D, p.region_lengths),
                words = captions(p.words, p.T, p.D, p.cu_seqlens);
  const Projection<T, E> local(p.local_weight, p.local_bias, p.S, p.D);
  const Projection<T> global(p.global_weight, p.global_bias, p.S, p.D);
  Buffer<T> room(p.S + 1), score_weight(round_up(p.S, LANES<T>));
  std::copy_n(read<T>(p.score_weight, 0, p.S, room), p.S, score_weight + 0);
  const T score_bias = *read<T>(p.score_bias, 0, 1, room);

  for_windows<T>(words, p.threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    // Few images: the window's chunks are shared out too.
    const int64_t groups = least(count, (4 * p.threads + p.I - 1) / std::max<int64_t>(1, p.I));
    const auto start = [&](int64_t g) { return count * g / groups; };
    const auto caption = [&](int64_t g) {
      return g < groups ? window.chunks[start(g)].first : window.chunks.back().last;
    };
    std::vector<Panels<T>> summaries;  // the groups' global vectors
    int64_t widest = 0, most = 0;
    for (int64_t g = 0; g < groups; ++g) {
      summaries.emplace_back(caption(g + 1) - caption(g), p.D);
      widest = std::max(widest, caption(g + 1) - caption(g));
    }
    std::vector<std::vector<int64_t>> edges;  // the chunks' bounds of the captions' nodes
    for (const Chunk& chunk : window.chunks) {
      std::vector<int64_t>& edge = edges.emplace_back();
      for (int64_t t = chunk.first; t <= chunk.last; ++t)
        edge.push_back(p.cu_seqlens[t] - chunk.begin + t - chunk.first);
      most = std::max(most, chunk.last - chunk.first);
    }
    parallel(groups, p.threads, [&] {
      return [&](int64_t g) { summaries[g].read(p.caption_global, caption(g), caption(g + 1) - caption(g), p.D, 0); };
    });
    parallel(p.I * groups, p.threads, [&] {
      Contexts<T, E> x(images.most, p.D);
      SimilarityTile<T, E> tile(images.most, window.widest, p.D, p.S);
      // In T whatever E is: as an image's only context its global vector would be a factor, and rounded.
      Contexts<T> summary(1, p.D);
      SimilarityTile<T> overall(1, widest, p.D, p.S);
      std::fill_n(overall.weight + 0, overall.ld, T(1));
      return [&, x = std::move(x), summary = std::move(summary), tile = std::move(tile), overall = std::move(overall),
              reason = head(window.widest + most, words.most + 1), z = Buffer<T>(most * padded<T>(p.S)),
              held = int64_t(-1)](int64_t part) mutable {
        const int64_t i = part / groups, g = part % groups;
        if (i != held) {
          x.read(images.source, images.first[i], images.length(i));
          summary.read(p.image_global, i, 1);
        }
        held = i;
        overall.project(summary, global, caption(g + 1) - caption(g), summaries[g], p.relu);
        for (int64_t c = start(g); c < start(g + 1); ++c) {
          const Chunk& chunk = window.chunks[c];
          const int64_t sets = chunk.last - chunk.first, ldz = padded<T>(p.S);
          const int64_t* edge = edges[c].data();
          tile.attend(x, Norm::CLIPPED_L2NORM, T(p.scale), &p.cu_seqlens[chunk.first], sets, window.panels[c]);
          tile.project(x, local, chunk.rows, window.panels[c], p.relu);
          T* const nodes = reason.nodes();
          tile.place(&p.cu_seqlens[chunk.first], sets, p.S, nodes, reason.stride(),
                     [&](int64_t k) { return edge[k] + 1; });
          for (int64_t k = 0; k < sets; ++k) {
            const int64_t column = chunk.first + k - caption(g);
            const T* y = overall.similar.at(0, column) + column % TILE_COLUMNS<T>;
            for (int64_t s = 0; s < p.S; ++s)
              nodes[s * reason.stride() + edge[k]] = y[s * TILE_COLUMNS<T>] * overall.inverse[column];
          }
          if (i < kept.images) {
            const int64_t row = i * (p.cu_seqlens[p.T] + p.T) + chunk.begin + chunk.first;
            transpose_by_squares<T>(nodes, reason.stride(), p.S, edge[sets], kept.nodes + row * p.S, p.S);
            for (int64_t k = 0; k < sets; ++k) {
              kept.inverse[row + edge[k]] = overall.inverse[chunk.first + k - caption(g)];
              std::copy_n(tile.inverse + edge[k] - k, edge[k + 1] - edge[k] - 1, kept.inverse + row + edge[k] + 1);
            }
          }
          reason.run(edge, 0, sets, z, ldz);
          for (int64_t k = 0; k < sets; ++k) {
            Vec<T> dot{};
            for (int64_t s = 0; s < p.S; s += LANES<T>)
              dot += select<T>(inside<T>(s, 0, p.S), load(z + k * ldz + s), Vec<T>{}) * load(score_weight + s);
            const T logit = sum<T>(dot) + score_bias;
            const T score = p.output == Output::LOGIT ? logit : 1 / (1 + std::exp(-logit));
            write(p.score, p.score_dtype, i * p.T + chunk.first + k, 1, &score, T(1));
          }
        }
      };
    });
  });
}

// Scores with graph reasoning as head. T and E: as of score_pairs().
template <class T, class E>
void graph_scores(const PairScore& p, const GraphWeights<T, E>& weights, KeptNodes<T> kept) {
  score_pairs<T, E>(p, kept, [&](int64_t nodes, int64_t longest) { return Graph<T, E>(weights, nodes, longest); });
}

// Scores of the call, with the head that it is of.
template <class T, class E>
void score(const SimilarityGraphScoreCall& call) {
  graph_scores<T, E>(pair_score(call), GraphWeights<T, E>(call), {});
}

template <class T, class E>
void score(const SimilarityGraphScoreKeptCall& call) {
  graph_scores<T, E>(pair_score(call), GraphWeights<T, E>(call),
                     {static_cast<T*>(call.nodes), static_cast<T*>(call.inverse), *call.kept});
}

template <class T, class E>
void score(const SimilarityFilterScoreCall& call) {
  const FilterWeights<T> weights(call);
  score_pairs<T, E>(pair_score(call), {}, [&](int64_t nodes, int64_t) { return Filter<T>(weights, nodes); });
}

}  // namespace itm_fast
