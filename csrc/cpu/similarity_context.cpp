// similarity_context, forward and backward: (1) to (4) of itm_fast/ops/similarity_context.py.
//
// The op is bound by memory, so a pair's nodes are read as they lie, features along the lanes, and stay in the first
// caches (36 KB for 36 nodes at S 256) until all that depends on them is done. Context nodes are computed four at a
// time, so that every node is loaded once for the four. Forward, a thread owns one image with one chunk of captions at
// a time; backward, it owns a group of consecutive pairs.
//
// Scratch: per thread a few values for each node of the longest caption and each context node, and the nodes themselves
// where they must be widened; in backward also their gradients, and the sums of the assignment's gradient, in double,
// of at most 64 groups, which are added in order so that the number of threads changes no bit.
#include "calls/similarity_context.h"
#include "pack.h"
#include "write.h"

namespace itm_fast {
namespace {

constexpr int64_t GROUPS = 64, AT_ONCE = 4, NODES = 224;

struct Problem {
  Source overall, local, assignment;
  int64_t I, N, S, C, T;
  const int64_t *cu_seqlens, *sizes;  // sizes: of the levels, C altogether
  int64_t threads;

  explicit Problem(const SimilarityContextCall& c)
      : overall{c.overall, c.dtype}, local{c.local, c.dtype}, assignment{c.assignment, c.dtype}, I(c.I), N(c.N),
        S(c.S), C(c.C), T(c.T), cu_seqlens(c.cu_seqlens), sizes(c.sizes), threads(c.threads) {}

  int64_t ld(int64_t lanes) const { return round_up(S, lanes); }
  int64_t element() const { return local.dtype == Dtype::FLOAT64 ? 8 : local.dtype == Dtype::FLOAT32 ? 4 : 2; }
  int64_t length(int64_t t) const { return cu_seqlens[t + 1] - cu_seqlens[t]; }
  // The row of the result that a pair's nodes begin with.
  int64_t place(int64_t image, int64_t t) const { return image * (N + T * (1 + C)) + cu_seqlens[t] + t * (1 + C); }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t t = 0; t < T; ++t) most = std::max(most, length(t));
    return most;
  }
  // Rows as they are, whatever their dtype.
  void copy(void* to, int64_t to_row, const void* from, int64_t from_row, int64_t rows) const {
    const int64_t row = S * element();
    std::memcpy(static_cast<char*>(to) + to_row * row, static_cast<const char*>(from) + from_row * row,
                size_t(rows * row));
  }
};

// One thread's scratch for one pair: its nodes, its context nodes and, in backward, their gradients. Rows of S features
// are zero up to whole vectors.
template <class T>
class Context {
 public:
  Context(const Problem& p, int64_t longest, bool slopes)
      : p(p), S(p.S), ld(p.ld(LANES<T>)), wide(round_up(std::max(longest, p.C), LANES<T>)),
        direct(ld == S && p.local.dtype == DTYPE<T>), own(direct ? 0 : longest * ld),
        room(direct ? p.C * S : std::max(longest + p.C + 1, p.C) * S), weight((p.C + AT_ONCE) * ld),
        context(p.C * ld), share((p.C + AT_ONCE) * wide), slope(slopes ? (p.C + AT_ONCE) * wide : 0),
        d_context(slopes ? (p.C + AT_ONCE) * ld : 0), d_local(slopes ? longest * ld : 0) {
    const T* from = read<T>(p.assignment, 0, p.C * S, room);
    for (int64_t c = 0; c < p.C; ++c) std::copy_n(from + c * S, S, weight + c * ld);
  }

  // (1): reads the nodes of a pair and computes its context nodes, level by level.
  void take(int64_t image, int64_t t) {
    n = p.length(t);
    const T* from = read<T>(p.local, (image * p.N + p.cu_seqlens[t]) * S, n * S, room);
    x = direct ? from : own;
    if (!direct) spread(from, n, own);
    for (int64_t c = 0, level = 0; c < p.C; c += p.sizes[level++]) {
      const T* rows = nodes(c, level);
      const int64_t count = nodes_of(level);
      for (int64_t k = c; k < c + p.sizes[level]; k += AT_ONCE) {
        const int64_t these = least(AT_ONCE, c + p.sizes[level] - k);
        T* a = share + k * wide;
        dots(rows, count, weight + k * ld, these, a);
        for (int64_t q = 0; q < these; ++q) softmax(a + q * wide, count);
        mix(rows, count, a, these, context + k * ld);
      }
    }
  }

  // (2): writes the pair's rows of the result: the global node, the nodes as they came, the context nodes.
  void give(void* result, int64_t image, int64_t t) const {
    const int64_t at = p.place(image, t);
    p.copy(result, at, p.overall.data, image * p.T + t, 1);
    p.copy(result, at + 1, p.local.data, image * p.N + p.cu_seqlens[t], n);
    for (int64_t c = 0; c < p.C; ++c)
      write<T>(result, p.local.dtype, (at + 1 + n + c) * S, S, context + c * ld, T(1));
  }

  // (3) and (4), after take(), from the gradient of the pair's rows of the result: writes d_rows, unless null, and adds
  // to d_weight [C][S].
  void back(const void* grad, int64_t image, int64_t t, void* d_rows, double* d_weight) {
    const T* from = read<T>({grad, p.local.dtype}, (p.place(image, t) + 1) * S, (n + p.C) * S, room);
    spread(from, n, d_local);
    spread(from + n * S, p.C, d_context);
    int64_t level = 0, c = 0;
    for (; c + p.sizes[level] < p.C; ++level) c += p.sizes[level];
    for (;; c -= p.sizes[--level]) {
      const T* rows = nodes(c, level);
      const int64_t count = nodes_of(level);
      T* d_nodes = level == 0 ? d_local + 0 : d_context + (c - p.sizes[level - 1]) * ld;
      for (int64_t k = c; k < c + p.sizes[level]; ++k) {
        T *d_a = slope + k * wide, common = 0;
        const T *a = share + k * wide, *d_x = d_context + k * ld, *w = weight + k * ld;
        for (int64_t j = 0; j < count; ++j) common += a[j] * (d_a[j] = dot(rows + j * ld, d_x));
        for (int64_t j = 0; j < count; ++j) {
          const T d_z = a[j] * (d_a[j] - common);
          d_a[j] = d_z;
          T* to = d_nodes + j * ld;
          for (int64_t s = 0; s < S; s += LANES<T>)
            store(to + s, load(to + s) + load(d_x + s) * a[j] + load(w + s) * d_z);
        }
        for (int64_t s = 0; s < S; s += LANES<T>) {
          Vec<T> sums{};
          for (int64_t j = 0; j < count; ++j) sums += load(rows + j * ld + s) * d_a[j];
          for (int64_t lane = 0; lane < least(LANES<T>, S - s); ++lane)
            d_weight[k * S + s + lane] += double(sums[lane]);
        }
      }
      if (level == 0) break;
    }
    if (d_rows)
      for (int64_t j = 0; j < n; ++j)
        write<T>(d_rows, p.local.dtype, (image * p.N + p.cu_seqlens[t] + j) * S, S, d_local + j * ld, T(1));
  }

 private:
  // The nodes of the level below `level`, whose own first context node is c.
  const T* nodes(int64_t c, int64_t level) const { return level == 0 ? x : context + (c - p.sizes[level - 1]) * ld; }
  int64_t nodes_of(int64_t level) const { return level == 0 ? n : p.sizes[level - 1]; }

  void spread(const T* from, int64_t rows, T* to) const {
    for (int64_t j = 0; j < rows; ++j) {
      std::copy_n(from + j * S, S, to + j * ld);
      std::fill(to + j * ld + S, to + (j + 1) * ld, T(0));  // a NaN of the pair before may lie there
    }
  }

  T dot(const T* a, const T* b) const {
    Vec<T> sums{};
    for (int64_t s = 0; s < ld; s += LANES<T>) sums += load(a + s) * load(b + s);
    return sum<T>(sums);
  }

  // a[q][j] = w_q . x_j for the q < these; w_q beyond them belong to another level or are zeros, and are not stored.
  void dots(const T* rows, int64_t count, const T* w, int64_t these, T* a) const {
    for (int64_t j = 0; j < count; ++j) {
      Vec<T> sums[AT_ONCE] = {};
      for (int64_t s = 0; s < ld; s += LANES<T>) {
        const Vec<T> v = load(rows + j * ld + s);
        for (int q = 0; q < AT_ONCE; ++q) sums[q] += v * load(w + q * ld + s);
      }
      for (int64_t q = 0; q < these; ++q) a[q * wide + j] = sum<T>(sums[q]);
    }
  }

  void softmax(T* a, int64_t count) const {
    T most = a[0];
    for (int64_t j = 1; j < count; ++j) most = a[j] > most ? a[j] : most;
    Vec<T> all{};
    for (int64_t j = 0; j < count; j += LANES<T>) {
      const Vec<T> e = select<T>(inside<T>(j, 0, count), exp<T>(load(a + j) - most), Vec<T>{});
      store(a + j, e);
      all += e;
    }
    const T factor = 1 / sum<T>(all);
    for (int64_t j = 0; j < count; ++j) a[j] *= factor;
  }

  // to[q] = sum_j a[q][j] x_j
  void mix(const T* rows, int64_t count, const T* a, int64_t these, T* to) const {
    for (int64_t s = 0; s < ld; s += LANES<T>) {
      Vec<T> sums[AT_ONCE] = {};
      for (int64_t j = 0; j < count; ++j) {
        const Vec<T> v = load(rows + j * ld + s);
        for (int q = 0; q < AT_ONCE; ++q) sums[q] += v * a[q * wide + j];
      }
      for (int64_t q = 0; q < these; ++q) store(to + q * ld + s, sums[q]);
    }
  }

  const Problem& p;
  const int64_t S, ld, wide;
  const bool direct;  // the tensor's own rows can be read by whole vectors
  Buffer<T> own, room, weight, context, share, slope, d_context, d_local;
  const T* x = nullptr;
  int64_t n = 0;
};

template <class T>
void forward(const Problem& p, void* result) {
  const std::vector<Chunk> pieces = chunks(p.cu_seqlens, p.T, NODES);
  const int64_t count = int64_t(pieces.size()), longest = p.longest();
  parallel(p.I * count, p.threads, [&] {
    return [&, pair = Context<T>(p, longest, false)](int64_t part) mutable {
      const Chunk& c = pieces[size_t(part % count)];
      for (int64_t t = c.first; t < c.last; ++t) {
        pair.take(part / count, t);
        pair.give(result, part / count, t);
      }
    };
  });
}

template <class T>
void backward(const Problem& p, const void* grad, void* d_overall, void* d_local, double* d_assignment) {
  const int64_t longest = p.longest(), units = p.I * p.T, groups = least(units, GROUPS), size = p.C * p.S;
  std::vector<double> sums(size_t(groups * size));
  parallel(groups, p.threads, [&] {
    return [&, pair = Context<T>(p, longest, true)](int64_t g) mutable {
      for (int64_t unit = units * g / groups; unit < units * (g + 1) / groups; ++unit) {
        const int64_t i = unit / p.T, t = unit % p.T;
        if (d_overall) p.copy(d_overall, unit, grad, p.place(i, t), 1);
        pair.take(i, t);
        pair.back(grad, i, t, d_local, sums.data() + g * size);
      }
    };
  });
  for (int64_t k = 0; d_assignment && k < groups * size; ++k) d_assignment[k % size] += sums[size_t(k)];
}

}  // namespace
}  // namespace itm_fast

// Writes nodes [I, N + T (1 + C), S] in the dtype of the tensors, from overall [I, T, S], local [I, N, S], assignment
// [C, S] and `sizes`, whose count is the number of levels.
extern "C" const char* similarity_context(const itm_fast::SimilarityContextCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem p(call);
    if (call.dtype == Dtype::FLOAT64) forward<double>(p, call.nodes);
    else forward<float>(p, call.nodes);
  });
}

// Writes d_overall [I, T, S] and d_local [I, N, S], in the dtype of the tensors, and adds to d_assignment [C, S], which
// is double and holds zeros. grad has the shape and dtype of `nodes`.
extern "C" const char* similarity_context_backward(const itm_fast::SimilarityContextCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    const Problem p(call);
    const auto d_assignment = static_cast<double*>(call.d_assignment);
    if (call.dtype == Dtype::FLOAT64) backward<double>(p, call.grad, call.d_overall, call.d_local, d_assignment);
    else backward<float>(p, call.grad, call.d_overall, call.d_local, d_assignment);
  });
}
