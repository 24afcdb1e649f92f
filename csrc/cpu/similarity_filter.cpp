// similarity_filter, forward and backward: (1) to (10) of itm_fast/ops/similarity_filter.py.
//
// The op is bound by memory, so a pair's nodes are read as they lie, features along the lanes, and stay in the first
// cache (13 KB at S 256) until all that depends on them is done. In evaluation one such pass over the nodes is enough,
// and a thread owns one image with one chunk of captions at a time (backward: a group of consecutive pairs). In
// training BatchNorm's statistics are taken over each caption's nodes in all images, so a thread owns a caption: one
// pass over these nodes for the statistics, one for z, and in backward one more for the gradient through the
// statistics; the nodes (1.7 MB at 128 images) come from the third cache.
//
// Scratch: per thread two values for each node of the longest caption (in training, times the images), and the nodes
// themselves where they must be widened; in backward the sums of the parameters' gradients, in double, of at most 64
// groups, which are added in order so that the number of threads changes no bit.
#include "calls/similarity_filter.h"
#include "filter.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t GROUPS = 64;

struct Problem {
  Source nodes, weight, bias, norm_weight, norm_bias, mean, var;
  int64_t I, M, S, T;
  const int64_t* cu_seqlens;
  bool training;
  double eps;
  Source grad;
  int64_t threads;

  explicit Problem(const SimilarityFilterCall& c)
      : nodes{c.nodes, c.dtype}, weight{c.weight, c.dtype}, bias{c.bias, c.dtype}, norm_weight{c.norm_weight, c.dtype},
        norm_bias{c.norm_bias, c.dtype}, mean{c.running_mean, Dtype::FLOAT64}, var{c.running_var, Dtype::FLOAT64},
        I(c.I), M(c.M), S(c.S), T(c.T), cu_seqlens(c.cu_seqlens), training(c.training != 0), eps(c.eps),
        grad{c.grad, c.dtype}, threads(c.threads) {}

  int64_t length(int64_t t) const { return cu_seqlens[t + 1] - cu_seqlens[t]; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t t = 0; t < T; ++t) most = std::max(most, length(t));
    return most;
  }
};

// Gradients of weight [S], bias, norm_weight and norm_bias.
struct Sums {
  std::vector<double> weight;
  double bias = 0, scale = 0, shift = 0;

  explicit Sums(int64_t S) : weight(size_t(S)) {}
};

double value(Source s) {
  double room;
  return *read<double>(s, 0, 1, &room);
}

// One thread's scratch for one pair: its nodes and what is computed from them. Vectors of S features are zero up to
// whole vectors.
template <class T>
class Nodes {
 public:
  Nodes(const Problem& p, int64_t longest)
      : p(p), S(p.S), ld(round_up(p.S, LANES<T>)),
        direct(ld == S && p.nodes.dtype == DTYPE<T>), own(direct ? 0 : longest * ld),
        room(direct ? S : longest * S), weight(ld), m(ld), d_m(ld), d_weight(ld), row(ld), gate(longest),
        gamma(T(value(p.norm_weight))), delta(T(value(p.norm_bias))) {
    std::copy_n(read<T>(p.weight, 0, S, room), S, weight + 0);
    if (!p.training) statistics(value(p.mean) - value(p.bias), value(p.var));
  }

  // What the projections without their bias are centred at and scaled by.
  void statistics(double mean, double var) {
    centre = T(mean);
    inverse = T(1 / std::sqrt(var + p.eps));
  }

  void take(int64_t image, int64_t t) {
    n = p.length(t);
    const T* from = read<T>(p.nodes, (image * p.M + p.cu_seqlens[t]) * S, n * S, room);
    x = direct ? from : own;
    if (!direct)
      for (int64_t j = 0; j < n; ++j) std::copy_n(from + j * S, S, own + j * ld);
  }

  // (1) without the bias.
  void project(T* a) const {
    for (int64_t j = 0; j < n; ++j) a[j] = dot(x + j * ld, weight);
  }

  // (2) to (4): beta and m; the result is what m is multiplied by to be z.
  T filter(const T* a) {
    Vec<T> all{};
    for (int64_t j = 0; j < n; j += LANES<T>) {
      const Vec<T> g = sigmoid<T>((load(a + j) - centre) * inverse * gamma + delta);
      store(gate + j, g);
      all += select<T>(inside<T>(j, 0, n), g, Vec<T>{});
    }
    share = 1 / (sum<T>(all) + T(EPS));
    mix([&](int64_t j) { return gate[j] * share; });
    length = std::sqrt(dot(m, m));
    return 1 / (length + T(EPS));
  }

  const T* mixed() const { return m; }

  // (5): d m from the gradient of z, after filter().
  void back(int64_t image, int64_t t) {
    std::copy_n(read<T>(p.grad, (image * p.T + t) * S, S, room), S, d_m + 0);
    std::fill(d_m + S, d_m + round_up(S, LANES<T>), T(0));  // a NaN of the pair before may lie there
    const T outer = 1 / (length + T(EPS)), along = length > 0 ? dot(d_m, m) * outer * outer / length : T(0);
    for (int64_t s = 0; s < S; s += LANES<T>) store(d_m + s, load(d_m + s) * outer - load(m + s) * along);
  }

  // (5) and (6): d h of every node, after back(); its sums go into those of the norm's parameters (7).
  void slopes(const T* a, T* d_h, double& scale, double& shift) const {
    T common = 0;
    for (int64_t j = 0; j < n; ++j) common += gate[j] * share * (d_h[j] = dot(x + j * ld, d_m));
    for (int64_t j = 0; j < n; ++j) {
      d_h[j] = gate[j] * (1 - gate[j]) * (d_h[j] - common) * share;
      scale += double(d_h[j]) * double((a[j] - centre) * inverse);
      shift += double(d_h[j]);
    }
  }

  // (8) to (10), after back(), with the means of d h and a^ d h over the caption, which are 0 in evaluation.
  void finish(int64_t image, int64_t t, const T* a, const T* d_h, T mean, T slope, void* d_nodes, Sums& sums) {
    std::fill_n(d_weight + 0, ld, T(0));
    for (int64_t j = 0; j < n; ++j) {
      const T d_a = gamma * inverse * (d_h[j] - mean - (a[j] - centre) * inverse * slope), beta = gate[j] * share;
      for (int64_t s = 0; s < S; s += LANES<T>) {
        store(d_weight + s, load(d_weight + s) + load(x + j * ld + s) * d_a);
        store(row + s, load(d_m + s) * beta + load(weight + s) * d_a);
      }
      if (d_nodes) write<T>(d_nodes, p.nodes.dtype, (image * p.M + p.cu_seqlens[t] + j) * S, S, row, T(1));
      sums.bias += double(d_a);
    }
    for (int64_t s = 0; s < S; ++s) sums.weight[size_t(s)] += double(d_weight[s]);
  }

 private:
  T dot(const T* a, const T* b) const {
    Vec<T> sums[4] = {};
    int64_t s = 0;
    for (; s + 4 * LANES<T> <= ld; s += 4 * LANES<T>)
      for (int v = 0; v < 4; ++v) sums[v] += load(a + s + v * LANES<T>) * load(b + s + v * LANES<T>);
    for (; s < ld; s += LANES<T>) sums[0] += load(a + s) * load(b + s);
    return sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  template <class Weight>
  void mix(Weight beta) {
    const auto some = [&](auto vectors, int64_t s) {
      Vec<T> c[vectors.value] = {};
      for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < vectors.value; ++v) c[v] += load(x + j * ld + s + v * LANES<T>) * beta(j);
      for (int v = 0; v < vectors.value; ++v) store(m + s + v * LANES<T>, c[v]);
    };
    int64_t s = 0;
    for (; s + 4 * LANES<T> <= ld; s += 4 * LANES<T>) some(std::integral_constant<int, 4>(), s);
    for (; s < ld; s += LANES<T>) some(std::integral_constant<int, 1>(), s);
  }

  const Problem& p;
  const int64_t S, ld;
  const bool direct;  // the tensor's own rows can be read by whole vectors
  Buffer<T> own, room, weight, m, d_m, d_weight, row, gate;
  const T gamma, delta;
  T centre = 0, inverse = 0, share = 0, length = 0;
  const T* x = nullptr;
  int64_t n = 0;
};

// Projections of a caption's nodes in all images and their statistics, in two passes over the projections.
template <class T>
struct Statistics {
  Buffer<T> a;
  double mean = 0, var = 0;

  Statistics(const Problem& p, int64_t longest) : a(p.I * longest) {}

  void of(const Problem& p, Nodes<T>& pair, int64_t t) {
    const int64_t n = p.length(t), count = p.I * n;
    double all = 0, squares = 0;
    for (int64_t i = 0; i < p.I; ++i) {
      pair.take(i, t);
      pair.project(a + i * n);
    }
    for (int64_t k = 0; k < count; ++k) all += double(a[k]);
    mean = all / double(count);
    for (int64_t k = 0; k < count; ++k) squares += (double(a[k]) - mean) * (double(a[k]) - mean);
    var = squares / double(count);
    pair.statistics(mean, var);
  }
};

template <class T>
void forward(const Problem& p, void* result, T* means, T* variances) {
  const int64_t longest = p.longest();
  const auto pass = [&](Nodes<T>& pair, int64_t image, int64_t t, const T* a) {
    const T factor = pair.filter(a);
    write<T>(result, p.nodes.dtype, (image * p.T + t) * p.S, p.S, pair.mixed(), factor);
  };
  if (p.training) {
    const double bias = value(p.bias);
    parallel(p.T, p.threads, [&] {
      return [&, pair = Nodes<T>(p, longest), statistics = Statistics<T>(p, longest)](int64_t t) mutable {
        statistics.of(p, pair, t);
        means[t] = T(statistics.mean + bias);
        variances[t] = T(statistics.var);
        for (int64_t i = 0; i < p.I; ++i) {
          pair.take(i, t);
          pass(pair, i, t, statistics.a + i * p.length(t));
        }
      };
    });
    return;
  }
  const std::vector<Chunk> pieces = chunks(p.cu_seqlens, p.T, 224);
  const int64_t count = int64_t(pieces.size());
  parallel(p.I * count, p.threads, [&] {
    return [&, pair = Nodes<T>(p, longest), a = Buffer<T>(longest)](int64_t part) mutable {
      const Chunk& c = pieces[size_t(part % count)];
      for (int64_t t = c.first; t < c.last; ++t) {
        pair.take(part / count, t);
        pair.project(a);
        pass(pair, part / count, t, a);
      }
    };
  });
}

template <class T>
void backward(const Problem& p, const SimilarityFilterCall& call) {
  const int64_t longest = p.longest(), units = p.training ? p.T : p.I * p.T, groups = least(units, GROUPS);
  std::vector<Sums> sums(size_t(std::max<int64_t>(1, groups)), Sums(p.S));
  parallel(groups, p.threads, [&] {
    return [&, pair = Nodes<T>(p, longest), statistics = Statistics<T>(p, p.training ? longest : 0),
            a = Buffer<T>(p.training ? 0 : longest),
            d_h = Buffer<T>((p.training ? p.I : 1) * longest)](int64_t g) mutable {
      Sums& total = sums[size_t(g)];
      const auto narrow = [&](int64_t i, int64_t t, const T* projected) {
        pair.take(i, t);
        pair.filter(projected);
        pair.back(i, t);
      };
      for (int64_t unit = units * g / groups; unit < units * (g + 1) / groups; ++unit) {
        if (!p.training) {
          const int64_t i = unit / p.T, t = unit % p.T;
          pair.take(i, t);
          pair.project(a);
          narrow(i, t, a);
          pair.slopes(a, d_h, total.scale, total.shift);
          pair.finish(i, t, a, d_h, T(0), T(0), call.d_nodes, total);
          continue;
        }
        const int64_t n = p.length(unit);
        double slope = 0, shift = 0;
        statistics.of(p, pair, unit);
        for (int64_t i = 0; i < p.I; ++i) {
          narrow(i, unit, statistics.a + i * n);
          pair.slopes(statistics.a + i * n, d_h + i * n, slope, shift);
        }
        total.scale += slope;
        total.shift += shift;
        const T mean = T(shift / double(p.I * n)), mean_slope = T(slope / double(p.I * n));
        for (int64_t i = 0; i < p.I; ++i) {
          narrow(i, unit, statistics.a + i * n);
          pair.finish(i, unit, statistics.a + i * n, d_h + i * n, mean, mean_slope, call.d_nodes, total);
        }
      }
    };
  });
  for (int64_t g = 1; g < groups; ++g) {
    for (int64_t s = 0; s < p.S; ++s) sums[0].weight[size_t(s)] += sums[size_t(g)].weight[size_t(s)];
    sums[0].bias += sums[size_t(g)].bias;
    sums[0].scale += sums[size_t(g)].scale;
    sums[0].shift += sums[size_t(g)].shift;
  }
  const auto put = [](void* to, const double* from, int64_t n) {
    if (to) std::copy_n(from, n, static_cast<double*>(to));
  };
  put(call.d_weight, sums[0].weight.data(), p.S);
  put(call.d_bias, &sums[0].bias, 1);
  put(call.d_norm_weight, &sums[0].scale, 1);
  put(call.d_norm_bias, &sums[0].shift, 1);
}

}  // namespace
}  // namespace itm_fast

// Writes z [I, T, S] in the dtype of the nodes and, in training, mean and var [T], float, or double if the nodes are
// double.
extern "C" const char* similarity_filter(const itm_fast::SimilarityFilterCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem p(call);
    if (call.dtype == Dtype::FLOAT64)
      forward(p, call.z, static_cast<double*>(call.mean), static_cast<double*>(call.var));
    else forward(p, call.z, static_cast<float*>(call.mean), static_cast<float*>(call.var));
  });
}

// Writes d_nodes [I, M, S] in the dtype of the nodes, and adds to d_weight [S], d_bias, d_norm_weight and d_norm_bias
// [1], which are double and hold zeros. grad has the shape and dtype of z.
extern "C" const char* similarity_filter_backward(const itm_fast::SimilarityFilterCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem p(call);
    if (call.dtype == Dtype::FLOAT64) backward<double>(p, call);
    else backward<float>(p, call);
  });
}
