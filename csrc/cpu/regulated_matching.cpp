// The pair score of RCAR, without gradients: (1) to (4) of itm_fast/models/rcar.py. What dropout kept is given as bits.
//
// A window of chunks of queries is packed once for all threads; then a thread owns one set of contexts with some of the
// window's chunks at a time, as in cross_attention_similarity.cpp. All that belongs to the queries of a chunk are
// columns: similarity vectors and hidden layers [features][columns], channel weights and weighed queries in panels.
// Sums over a pair's queries start at its own first column, so that its score does not depend on the pairs beside it.
// Scratch: the window, 16 MiB, the weights, and 5 MiB a thread at D 1024 and S 256.
#include "calls/regulated_matching.h"
#include "layers.h"
#include "windows.h"
#include "write.h"

namespace itm_fast {
namespace {

// The weights as the steps read them; layer k of each kind belongs to step k.
template <class T>
struct Weights {
  std::vector<Projection<T>> align;
  std::vector<Layer<T>> key, ask, matrix_in, matrix_out, smooth_in, smooth_out;
  Buffer<T> share, score;  // [steps][S], [S]
  T score_bias;

  explicit Weights(const RegulatedMatchingCall& c) : share(c.P * c.S), score(c.S) {
    const auto layers = [&](std::vector<Layer<T>>& to, int64_t count, const void* w, const void* b, int64_t S,
                            int64_t K) {
      for (int64_t k = 0; k < count; ++k)
        to.emplace_back(after({w, c.dtype}, k * S * K), after({b, c.dtype}, k * S), S, K);
    };
    for (int64_t k = 0; k < c.M; ++k)
      align.emplace_back(after({c.align_weight, c.dtype}, k * c.S * c.D), after({c.align_bias, c.dtype}, k * c.S), c.S,
                         c.D);
    layers(key, c.P, c.key_weight, c.key_bias, c.S, c.S);
    layers(ask, c.P, c.ask_weight, c.ask_bias, c.S, c.S);
    layers(matrix_in, c.K, c.matrix_in_weight, c.matrix_in_bias, c.B, c.S);
    layers(matrix_out, c.K, c.matrix_out_weight, c.matrix_out_bias, c.D, c.B);
    layers(smooth_in, c.K, c.smooth_in_weight, c.smooth_in_bias, c.C, c.S);
    layers(smooth_out, c.K, c.smooth_out_weight, c.smooth_out_bias, 1, c.C);
    Buffer<T> room(std::max(c.P, int64_t(1)) * c.S);
    std::copy_n(read<T>({c.share_weight, c.dtype}, 0, c.P * c.S, room), c.P * c.S, share + 0);
    std::copy_n(read<T>({c.score_weight, c.dtype}, 0, c.S, room), c.S, score + 0);
    score_bias = *read<T>({c.score_bias, c.dtype}, 0, 1, room);
  }
};

// One thread's scratch for a set of at most `most` contexts with at most `columns` queries, and the score.
template <class T>
class RegulatedTile {
 public:
  RegulatedTile(const RegulatedMatchingCall& call, const Weights<T>& weights, int64_t most, int64_t columns)
      : call(call), weights(weights), S(call.S), rcr(call.regulator == Regulator::ONLY_RCR), ld(padded<T>(columns)),
        tile(most, columns, call.D, S), own(call.K ? columns : 0, call.D), matrix(call.K ? columns : 0, call.D),
        first(rcr ? most * ld : 0), similar(S * ld), hidden(std::max(S, call.K ? call.B : 0) * ld), smooth(ld),
        share(ld), overall(S * ld), asked(S * ld), factor(S) {}

  // score(k, s) gets the score s of the queries' set k, for sets with bounds edge[0 .. sets]; bits(step, k) points to
  // what dropout kept of set k's queries and, behind them, of its `overall`.
  template <class Bits, class Score>
  void run(const Contexts<T>& x, const int64_t* edge, int64_t sets, const Panels<T>& query, Bits bits, Score score) {
    const int64_t columns = edge[sets] - edge[0], steps = rcr ? call.K : call.P;
    if (call.K) {
      std::fill_n(smooth + 0, ld, T(call.scale));
      std::fill_n(matrix.data + 0, (columns + WIDE - 1) / WIDE * matrix.size, T(1));
    }
    for (int64_t k = 0; k < steps; ++k) {
      if (k == 0 || call.regulator != Regulator::ONLY_RAR) {
        attend(x, k, edge, sets, query);
        tile.project(x, weights.align[size_t(k)], columns, query);
        tile.place(edge, sets, S, similar, ld, [&](int64_t set) { return edge[set] - edge[0]; });
      }
      if (k == 0 && !rcr) {
        for (int64_t set = 0; set < sets; ++set) {
          const int64_t n = edge[set + 1] - edge[set];
          for (int64_t j = 0; j < n; j += LANES<T>) store(share + j, splat(T(1) / T(n)));
          mix(edge[set] - edge[0], n, set);
        }
      }
      if (rcr || (call.regulator == Regulator::COOP_RCAR && k + 1 < steps)) regulate(size_t(k), columns, query);
      if (!rcr) aggregate(size_t(k), edge, sets, bits);
    }
    if (rcr) return cosines(x, edge, sets, query, score);
    for (int64_t set = 0; set < sets; ++set) {
      T logit = weights.score_bias;
      for (int64_t s = 0; s < S; ++s) logit += weights.score[s] * overall[s * ld + set];
      score(set, 1 / (1 + std::exp(-logit)));
    }
  }

 private:
  static constexpr int64_t WIDE = TILE_COLUMNS<T>;

  // (1) as `tile` keeps it, of step k.
  void attend(const Contexts<T>& x, int64_t k, const int64_t* edge, int64_t sets, const Panels<T>& query) {
    if (k == 0) {
      tile.attend(x, Norm::CLIPPED_L2NORM, T(call.scale), edge, sets, query);
      if (rcr) std::copy_n(tile.affinity + 0, x.n * ld, first + 0);
      return;
    }
    tile.multiply(x, edge[sets] - edge[0], own);
    tile.weigh(x, tile.affinity, Norm::CLIPPED_L2NORM, T(1), edge, sets, smooth);
  }

  // (3): the channel weights, the queries times these, and the temperatures.
  void regulate(size_t k, int64_t columns, const Panels<T>& query) {
    const auto keep = [this](int64_t s, int64_t j, Vec<T> y) { store(hidden + s * ld + j, tanh<T>(y)); };
    weights.matrix_in[k].apply(similar, ld, columns, keep);
    weights.matrix_out[k].apply(hidden, ld, columns, [&](int64_t d, int64_t j, Vec<T> y) {
      T* const weight = matrix.at(d, j) + j % WIDE;
      Vec<T> m = tanh<T>(y) + load(weight);
      m = m > 1 ? splat(T(1)) : m < -1 ? splat(T(-1)) : m;
      store(weight, m);
      store(own.at(d, j) + j % WIDE, m * load(query.at(d, j) + j % WIDE));
    });
    weights.smooth_in[k].apply(similar, ld, columns, keep);
    weights.smooth_out[k].apply(hidden, ld, columns, [&](int64_t, int64_t j, Vec<T> y) {
      y += load(smooth + j);
      store(smooth + j, y < 0 ? Vec<T>{} : y);
    });
  }

  // (4): the sets' `overall`.
  template <class Bits>
  void aggregate(size_t k, const int64_t* edge, int64_t sets, Bits bits) {
    weights.key[k].apply(similar, ld, edge[sets] - edge[0],
                         [this](int64_t s, int64_t j, Vec<T> y) { store(hidden + s * ld + j, tanh<T>(y)); });
    weights.ask[k].apply(overall, ld, sets,
                         [this](int64_t s, int64_t j, Vec<T> y) { store(asked + s * ld + j, tanh<T>(y)); });
    if (call.kept)
      for (int64_t set = 0; set < sets; ++set) {
        const int64_t begin = edge[set] - edge[0], n = edge[set + 1] - edge[set];
        const int64_t* const row = bits(int64_t(k), set);
        drop(hidden + begin, n, row);
        drop(asked + set, 1, row + (call.direction == Direction::T2I ? n : call.R) * words());
      }
    const T* const v = weights.share + int64_t(k) * S;
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t begin = edge[set] - edge[0], n = edge[set + 1] - edge[set];
      for (int64_t s = 0; s < S; ++s) factor[s] = asked[s * ld + set] * v[s];
      Vec<T> top = splat(-INFINITY + T(0)), all{};
      for (int64_t j = 0; j < n; j += LANES<T>) {
        Vec<T> chain[4]{};
        for (int64_t s = 0; s < S; ++s) chain[s % 4] += load(hidden + s * ld + begin + j) * factor[s];
        const Vec<T> logit = (chain[0] + chain[1]) + (chain[2] + chain[3]);
        store(share + j, logit);
        top = max<T>(top, select<T>(inside<T>(j, 0, n), logit, top));
      }
      const T highest = max<T>(top);
      for (int64_t j = 0; j < n; j += LANES<T>) {
        const Vec<T> e = exp<T>(load(share + j) - highest);
        store(share + j, e);
        all += select<T>(inside<T>(j, 0, n), e, Vec<T>{});
      }
      const T inverse = T(1) / sum<T>(all);
      for (int64_t j = 0; j < n; j += LANES<T>) store(share + j, load(share + j) * inverse);
      mix(begin, n, set);
      T square = 0;
      for (int64_t s = 0; s < S; ++s) square += overall[s * ld + set] * overall[s * ld + set];
      const T divide = T(1) / (std::sqrt(square) + T(EPS));
      for (int64_t s = 0; s < S; ++s) overall[s * ld + set] *= divide;
    }
  }

  // Dropout of n columns [S][ld], whose rows of bits lie side by side.
  void drop(T* column, int64_t n, const int64_t* bits) const {
    const T scale = call.dropped < 1 ? T(1) / T(1 - call.dropped) : T(0);  // of rate 1 nothing is kept
    for (int64_t s = 0; s < S; ++s)
      for (int64_t j = 0; j < n; ++j) column[s * ld + j] *= T(bits[j * words() + s / 64] >> s % 64 & 1) * scale;
  }
  int64_t words() const { return (S + 63) / 64; }  // of 64 bits, a query's

  // overall of a set = the sum of `share` times the similarity vectors of its n queries.
  void mix(int64_t begin, int64_t n, int64_t set) {
    for (int64_t s = 0; s < S; ++s) {
      Vec<T> all{};
      for (int64_t j = 0; j < n; j += LANES<T>)
        all += select<T>(inside<T>(j, 0, n), load(similar + s * ld + begin + j) * load(share + j), Vec<T>{});
      overall[s * ld + set] = sum<T>(all);
    }
  }

  // The mean of cos(q, u), with q . u from the first affinities.
  template <class Score>
  void cosines(const Contexts<T>& x, const int64_t* edge, int64_t sets, const Panels<T>& query, Score score) {
    const int64_t columns = edge[sets] - edge[0];
    attend(x, call.K, edge, sets, query);
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      Vec<T> dot{}, square{};
      for (int64_t i = 0; i < x.n; ++i) dot += load(tile.weight + i * ld + j) * load(first + i * ld + j);
      for (int64_t d = 0; d < call.D; ++d) {
        const Vec<T> q = load(query.at(d, j) + j % WIDE);
        square += q * q;
      }
      const Vec<T> length = load(tile.length + j), both = root(square) * (length / (length + T(EPS)));
      store(share + j, dot / max<T>(both, splat(T(EPS))));
    }
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t begin = edge[set] - edge[0], n = edge[set + 1] - edge[set];
      Vec<T> all{};
      for (int64_t j = 0; j < n; j += LANES<T>)
        all += select<T>(inside<T>(j, 0, n), load(share + begin + j), Vec<T>{});
      score(set, sum<T>(all) / T(n));
    }
  }

  const RegulatedMatchingCall& call;
  const Weights<T>& weights;
  const int64_t S;
  const bool rcr;
  const int64_t ld;
  SimilarityTile<T> tile;
  Panels<T> own, matrix;             // the queries times their channel weights, and these
  Buffer<T> first;                   // [n][ld] the affinities of the queries themselves
  Buffer<T> similar, hidden;         // [S][ld], [most of the hidden sizes][ld]
  Buffer<T> smooth, share;           // [ld] temperatures; of one set, the weights of its queries
  Buffer<T> overall, asked, factor;  // [S][ld] with a column for each set; [S]
};

template <class T>
void forward(const RegulatedMatchingCall& call) {
  const RowSets images = regions({call.image, call.dtype}, call.I, call.R, call.D, call.region_lengths),
                words = captions({call.words, call.dtype}, call.T, call.D, call.cu_seqlens);
  const bool t2i = call.direction == Direction::T2I;
  const RowSets &contexts = t2i ? images : words, &queries = t2i ? words : images;
  if (contexts.count() == 0) return;
  const Weights<T> weights(call);
  for_windows<T>(queries, call.threads, [&](const QueryWindow<T>& window) {
    const int64_t count = window.count();
    const int64_t groups = least(count, (8 * call.threads + contexts.count() - 1) / contexts.count());
    parallel(contexts.count() * groups, call.threads, [&] {
      return [&, groups, count, x = Contexts<T>(contexts.most, call.D), held = int64_t(-1),
              work = RegulatedTile<T>(call, weights, contexts.most, window.widest)](int64_t part) mutable {
        const int64_t context = part / groups, group = part % groups;
        if (context != held) x.read(contexts.source, contexts.first[context], contexts.length(context));
        held = context;
        for (int64_t c = count * group / groups; c < count * (group + 1) / groups; ++c) {
          const Chunk& chunk = window.chunks[c];
          const auto bits = [&](int64_t step, int64_t k) {
            const int64_t set = chunk.first + k, image = t2i ? context : set, caption = t2i ? set : context;
            const int64_t rows = t2i ? call.N + call.T : call.T * (call.R + 1);
            const int64_t first = t2i ? words.edge[caption] + caption : caption * (call.R + 1);
            return call.kept + ((image * call.P + step) * rows + first) * ((call.S + 63) / 64);
          };
          const auto put = [&](int64_t k, T score) {
            const int64_t set = chunk.first + k, at = t2i ? context * call.T + set : set * call.T + context;
            write<T>(call.score, call.dtype, at, 1, &score, T(1));
          };
          work.run(x, &queries.edge[chunk.first], chunk.last - chunk.first, window.panels[c], bits, put);
        }
      };
    });
  });
}

}  // namespace
}  // namespace itm_fast

// Writes score [I, T] in the dtype of the tensors.
extern "C" const char* regulated_matching(const itm_fast::RegulatedMatchingCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) forward<double>(call);
    else forward<float>(call);
  });
}
