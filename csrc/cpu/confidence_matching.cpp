// The pair score of CMCAN, without gradients: (3) to (7) of itm_fast/models/cmcan.py.
//
// S = sigmoid of a logit of the words' graph plus one of the regions' graph. The words' side is what similarity_score.h
// does for SGR, with ReLUs; here a thread owns one caption as the contexts, with some of a window's chunks of images,
// whose regions are the queries: their similarity vectors, their confidences by a second projection of the partial
// vectors against the caption's global vector, nodes, graph. Scratch: two windows, 16 MiB each, the weights, and two
// tiles and a graph per thread, 5 MiB at D 1024 and S 256.
#include "calls/confidence_matching.h"
#include "similarity_score.h"

namespace itm_fast {
namespace {

constexpr double SMOOTH = 9;  // the attention's inverse temperature
constexpr double NORM_EPS = 1e-5;  // of (5)'s LayerNorm

// The weights that the regions' side reads, shared by all threads.
template <class T>
struct Weights {
  Projection<T> global, region, part;
  GraphWeights<T> graph;
  Buffer<T> common, norm_weight, norm_bias, score;
  T common_bias;

  explicit Weights(const ConfidenceMatchingCall& c)
      : global({c.global_weight, c.dtype}, {c.global_bias, c.dtype}, c.S, c.D),
        region({c.region_weight, c.dtype}, {c.region_bias, c.dtype}, c.S, c.D),
        part({c.part_weight, c.dtype}, {c.part_bias, c.dtype}, c.S, c.D),
        graph(c.S, c.K, {c.region_query_weight, c.dtype}, {c.region_query_bias, c.dtype},
              {c.region_key_weight, c.dtype}, {c.region_value_weight, c.dtype}, {c.region_value_bias, c.dtype}),
        common(c.S), norm_weight(c.R), norm_bias(c.R), score(round_up(c.S, LANES<T>)) {
    Buffer<T> room(std::max(c.B, c.R));
    const auto take = [&](const void* from, int64_t first, int64_t n, T* to) {
      std::copy_n(read<T>({from, c.dtype}, first, n, room), n, to);
    };
    take(c.common_weight, 0, c.S, common);
    take(c.norm_weight, 0, c.R, norm_weight);
    take(c.norm_bias, 0, c.R, norm_bias);
    take(c.score_weight, c.S, c.S, score);
    take(c.common_bias, 0, 1, &common_bias);
  }
};

// The arguments of the words' side, whose logits go to `logit`, numbers of type T.
template <class T>
PairScore words_side(const ConfidenceMatchingCall& c, T* logit) {
  const auto of = [&](const void* data) { return Source{data, c.dtype}; };
  return {of(c.image), of(c.image_global), of(c.words), of(c.caption_global), of(c.word_weight), of(c.word_bias),
          of(c.global_weight), of(c.global_bias), of(c.score_weight), of(c.score_bias), c.cu_seqlens, c.region_lengths,
          logit, DTYPE<T>, c.I, c.R, c.T, c.D, c.S, SMOOTH, Output::LOGIT, true, c.threads};
}

// One thread's scratch for the regions of a chunk of images with one caption.
template <class T>
class RegionTile {
 public:
  RegionTile(const ConfidenceMatchingCall& call, const Weights<T>& weights, int64_t words, int64_t columns,
             int64_t sets, int64_t most)
      : call(call), weights(weights), S(call.S), ld(padded<T>(columns)), x(words, call.D), summary(1, call.D),
        local(words, columns, call.D, S), partial(1, columns, call.D, S), overall(1, sets, call.D, S),
        graph(weights.graph, columns + sets, most + 1), similar(S * ld), gate(ld), global(S), factor(S),
        z(sets * padded<T>(S)) {
    std::fill_n(partial.weight + 0, partial.ld, T(1));
    std::fill_n(overall.weight + 0, overall.ld, T(1));
  }

  void read(const RowSets& captions, int64_t t) {
    x.read(captions.source, captions.first[t], captions.length(t));
    summary.read({call.caption_global, call.dtype}, t, 1);
  }

  // logit(k, v) gets the regions' part v of the logit of image k, for images with regions edge[0 .. sets]; regions,
  // parts and globals: their rows as columns.
  template <class Logit>
  void run(const int64_t* edge, int64_t sets, const Panels<T>& regions, const Panels<T>& parts,
           const Panels<T>& globals, Logit logit) {
    const int64_t columns = edge[sets] - edge[0], ldz = padded<T>(S);
    const auto begin = [=](int64_t k) { return edge[k] - edge[0]; };
    overall.project(summary, weights.global, sets, globals, true);
    partial.project(summary, weights.part, columns, parts, true);
    partial.place(edge, sets, S, similar, ld, begin);
    local.attend(x, Norm::CLIPPED_L2NORM, T(SMOOTH), edge, sets, regions);
    local.project(x, weights.region, columns, regions, true);
    node_edge.assign(1, 0);
    for (int64_t k = 0; k < sets; ++k) {
      const T* const y = overall.similar.at(0, k) + k % TILE_COLUMNS<T>;
      for (int64_t s = 0; s < S; ++s) global[s] = y[s * TILE_COLUMNS<T>] * overall.inverse[k];
      confidence(begin(k), begin(k + 1) - begin(k));
      node_edge.push_back(begin(k + 1) + k + 1);
    }
    for (int64_t j = 0; j < columns; ++j) local.inverse[j] *= gate[j];
    local.place(edge, sets, S, graph.nodes(), graph.stride(), [&](int64_t k) { return node_edge[size_t(k)] + 1; });
    // What place() writes beyond a set's end is the next one's global node.
    for (int64_t k = 0; k < sets; ++k) {
      const T* const y = overall.similar.at(0, k) + k % TILE_COLUMNS<T>;
      for (int64_t s = 0; s < S; ++s)
        graph.nodes()[s * graph.stride() + node_edge[size_t(k)]] = y[s * TILE_COLUMNS<T>] * overall.inverse[k];
    }
    graph.run(node_edge.data(), 0, sets, z, ldz);
    for (int64_t k = 0; k < sets; ++k) {
      Vec<T> dot{};
      for (int64_t s = 0; s < S; s += LANES<T>)
        dot += select<T>(inside<T>(s, 0, S), load(z + k * ldz + s), Vec<T>{}) * load(weights.score + s);
      logit(k, sum<T>(dot));
    }
  }

 private:
  // (5): the gates of an image's n regions, whose columns begin at `begin`, from `similar` and `global`.
  void confidence(int64_t begin, int64_t n) {
    T* const c = gate + begin;
    for (int64_t s = 0; s < S; ++s) factor[s] = global[s] * weights.common[s];
    for (int64_t j = 0; j < n; j += LANES<T>) {  // the last vector may pass the image's end: the next is written later
      Vec<T> chain[4]{};
      for (int64_t s = 0; s < S; ++s) chain[s % 4] += load(similar + s * ld + begin + j) * factor[s];
      store(c + j, (chain[0] + chain[1]) + (chain[2] + chain[3]) + weights.common_bias);
    }
    T mean = 0, square = 0;
    for (int64_t j = 0; j < n; ++j) mean += c[j];
    mean /= T(n);
    for (int64_t j = 0; j < n; ++j) square += (c[j] - mean) * (c[j] - mean);
    const T divide = T(1) / std::sqrt(square / T(n) + T(NORM_EPS));
    for (int64_t j = 0; j < n; ++j) {
      const T logit = (c[j] - mean) * divide * weights.norm_weight[j] + weights.norm_bias[j];
      c[j] = T(1) / (T(1) + std::exp(-logit));
    }
  }

  const ConfidenceMatchingCall& call;
  const Weights<T>& weights;
  const int64_t S, ld;
  Contexts<T> x, summary;
  SimilarityTile<T> local, partial, overall;
  Graph<T> graph;
  Buffer<T> similar, gate, global, factor, z;  // similar: [S][ld] of the partial vectors
  std::vector<int64_t> node_edge;
};

template <class T>
void forward(const ConfidenceMatchingCall& call) {
  const RowSets images = regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths),
                words = captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens);
  if (images.count() == 0 || words.count() == 0) return;
  Buffer<T> found(call.I * call.T);  // logits
  {
    const GraphWeights<T> graph(call.S, call.K, {call.word_query_weight, call.dtype},
                                {call.word_query_bias, call.dtype}, {call.word_key_weight, call.dtype},
                                {call.word_value_weight, call.dtype}, {call.word_value_bias, call.dtype});
    graph_scores<T, T>(words_side<T>(call, found), graph, {});
  }
  const Weights<T> weights(call);
  for_windows<T>(images, call.threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    std::vector<Panels<T>> parts, globals;
    int64_t most = 0;
    for (const Chunk& chunk : window.chunks) {
      parts.emplace_back(chunk.rows, call.D);
      globals.emplace_back(chunk.last - chunk.first, call.D);
      most = std::max(most, chunk.last - chunk.first);
    }
    parallel(count, call.threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        globals[size_t(c)].read({call.image_global, call.dtype}, chunk.first, chunk.last - chunk.first, call.D, 0);
        for (int64_t i = chunk.first; i < chunk.last; ++i)
          parts[size_t(c)].read({call.part, call.dtype}, images.first[i], images.length(i), call.D,
                                images.edge[i] - chunk.begin);
      };
    });
    const int64_t groups = least(count, (8 * call.threads + words.count() - 1) / words.count());
    parallel(words.count() * groups, call.threads, [&] {
      return [&, groups, count, held = int64_t(-1),
              work = RegionTile<T>(call, weights, words.most, window.widest, most, images.most)](int64_t part) mutable {
        const int64_t t = part / groups, group = part % groups;
        if (t != held) work.read(words, t);
        held = t;
        for (int64_t c = count * group / groups; c < count * (group + 1) / groups; ++c) {
          const Chunk& chunk = window.chunks[c];
          work.run(&images.edge[chunk.first], chunk.last - chunk.first, window.panels[c], parts[size_t(c)],
                   globals[size_t(c)], [&](int64_t k, T logit) {
                     const int64_t at = (chunk.first + k) * call.T + t;
                     const T score = T(1) / (T(1) + std::exp(-(found[at] + logit)));
                     write<T>(call.score, call.dtype, at, 1, &score, T(1));
                   });
        }
      };
    });
  });
}

}  // namespace
}  // namespace itm_fast

// Writes score [I, T] in the dtype of the tensors.
extern "C" const char* confidence_matching(const itm_fast::ConfidenceMatchingCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) forward<double>(call);
    else forward<float>(call);
  });
}
