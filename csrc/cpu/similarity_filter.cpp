// similarity_filter, forward and backward: (1) to (10) of itm_fast/ops/similarity_filter.py.
//
// Everything is bound by memory, so a pair's nodes are read as they lie, features along the lanes, and stay in the
// first cache (13 KB at S 256) while all that is made of them is made. In evaluation one such pass does it. In
// training a thread owns a caption: one pass over its nodes of all images for the statistics, one for z, and in
// backward one more, for what the statistics take part in; the caption's nodes (1.7 MB at 128 images) come from L3.
//
// Scratch: per thread two values a node of the longest caption (in training, times the images) and its nodes once
// where they must be widened; in backward at most 64 groups' sums of the parameters' gradients, in double, which are
// added in order.
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

// The nodes of one pair and what is made of them. Vectors of S features are zero up to a whole number of lanes.
template <class T>
class Nodes {
 public:
  Nodes(const Problem& p, int64_t longest)
      : p(p), S(p.S), ld(round_up(p.S, LANES<T>)),
        direct(ld == S && p.nodes.dtype == (sizeof(T) == 4 ? FLOAT32 : FLOAT64)), own(direct ? 0 : longest * ld),
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
void backward(const Problem& p, void* d_nodes, double* d_parameters) {
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
          pair.finish(i, t, a, d_h, T(0), T(0), d_nodes, total);
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
          pair.finish(i, unit, statistics.a + i * n, d_h + i * n, mean, mean_slope, d_nodes, total);
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
  std::copy(sums[0].weight.begin(), sums[0].weight.end(), d_parameters);
  d_parameters[p.S] = sums[0].bias;
  d_parameters[p.S + 1] = sums[0].scale;
  d_parameters[p.S + 2] = sums[0].shift;
}

}  // namespace
}  // namespace itm_fast

// nodes [I, M, S], weight [S], bias, norm_weight and norm_bias [1] of one dtype, running_mean and
// running_var [1] of float64; result [I, T, S] as nodes; in training batch_mean and batch_var [T], float64 where nodes
// are, else float32.
extern "C" const char* similarity_filter(const void* nodes, const void* weight, const void* bias,
                                         const void* norm_weight, const void* norm_bias, const void* running_mean,
                                         const void* running_var, int64_t dtype, int64_t I, int64_t M,
                                         int64_t S, int64_t T, const int64_t* cu_seqlens, int64_t training, double eps,
                                         void* result, void* batch_mean, void* batch_var, int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const auto s = [&](const void* data) { return Source{data, dtype}; };
    const Problem p{s(nodes), s(weight), s(bias), s(norm_weight), s(norm_bias), {running_mean, FLOAT64},
                    {running_var, FLOAT64}, I, M, S, T, cu_seqlens, training != 0, eps, {nullptr, dtype}, threads};
    const auto run = [&]<class Work>(Work*) {
      forward<Work>(p, result, static_cast<Work*>(batch_mean), static_cast<Work*>(batch_var));
    };
    if (dtype == FLOAT64) run(static_cast<double*>(nullptr));
    else run(static_cast<float*>(nullptr));
  });
}

// grad [I, T, S] and d_nodes [I, M, S], which may be null, of the same dtype; d_parameters [S + 3] float64: of weight,
// bias, norm_weight and norm_bias.
extern "C" const char* similarity_filter_backward(
    const void* nodes, const void* weight, const void* bias, const void* norm_weight, const void* norm_bias,
    const void* running_mean, const void* running_var, int64_t dtype, int64_t I, int64_t M, int64_t S, int64_t T,
    const int64_t* cu_seqlens, int64_t training, double eps, const void* grad, void* d_nodes, double* d_parameters,
    int64_t threads) {
  using namespace itm_fast;
  return guarded([&] {
    const auto s = [&](const void* data) { return Source{data, dtype}; };
    const Problem p{s(nodes), s(weight), s(bias), s(norm_weight), s(norm_bias), {running_mean, FLOAT64},
                    {running_var, FLOAT64}, I, M, S, T, cu_seqlens, training != 0, eps, s(grad), threads};
    if (dtype == FLOAT64) backward<double>(p, d_nodes, d_parameters);
    else backward<float>(p, d_nodes, d_parameters);
  });
}
