// The backward pass of graph reasoning for one image with one chunk of captions: (4) to (6) of
// itm_fast/ops/similarity_graph.py.
//
// The forward steps are computed again, and the nodes X, the queries Y = M^T X + u (both with nodes as rows) and the
// softmax weights of each step are kept; then the steps are gone through in reverse. Products over the nodes of a
// caption or of the chunk take them as rows, products over features as columns; a matrix that both need is transposed
// by squares, which costs a twentieth of a product. What one product reads stays in the second cache; the sums of the
// weights' gradients come from the third, prefetched a tile ahead.
//
// E is what the products of whole chunks multiply: T, or pairs of bfloat16 values with sums in float32.
#pragma once
#include "calls/similarity_graph.h"
#include "calls/similarity_graph_head.h"
#include "graph.h"
#include "write.h"

namespace itm_fast {

// A call's arguments; shapes: similarity_graph_backward.cpp.
struct GraphGradient {
  Source nodes, query_weight, query_bias, key_weight, value_weight, value_bias, grad;
  int64_t I, M, S, steps, T;
  const int64_t* cu_seqlens;
  void* d_nodes;
  void *d_query_weight, *d_query_bias, *d_key_weight, *d_value_weight, *d_value_bias;  // in the work dtype
  int64_t threads;
  // Of similarity_graph_head, where grad is that of the score, (4) of itm_fast/ops/similarity_score.py; else null.
  Source score_weight{}, score_bias{};
  Output output = Output::LOGIT;
  void *d_score_weight = nullptr, *d_score_bias = nullptr;
  // [I, M]: the nodes are y / (|y| + eps), these are 1 / (|y| + eps), and d_nodes is the gradient of y; else null.
  const double* inverse = nullptr;

  explicit GraphGradient(const SimilarityGraphHeadCall& c) : GraphGradient(c, c.nodes) {
    score_weight = {c.score_weight, c.dtype};
    score_bias = {c.score_bias, c.dtype};
    output = c.output;
    d_score_weight = c.d_score_weight;
    d_score_bias = c.d_score_bias;
    inverse = static_cast<const double*>(c.inverse);
  }
  explicit GraphGradient(const SimilarityGraphCall& c) : GraphGradient(c, c.nodes) {}

 private:
  template <class Call>
  GraphGradient(const Call& c, const void* nodes)
      : nodes{nodes, c.dtype}, query_weight{c.query_weight, c.dtype}, query_bias{c.query_bias, c.dtype},
        key_weight{c.key_weight, c.dtype}, value_weight{c.value_weight, c.dtype}, value_bias{c.value_bias, c.dtype},
        grad{c.grad, c.dtype}, I(c.I), M(c.M), S(c.S), steps(c.K), T(c.T), cu_seqlens(c.cu_seqlens),
        d_nodes(c.d_nodes), d_query_weight(c.d_query_weight), d_query_bias(c.d_query_bias),
        d_key_weight(c.d_key_weight), d_value_weight(c.d_value_weight), d_value_bias(c.d_value_bias),
        threads(c.threads) {}
};

// The begin and end functions of a product of gemm.h: nothing() starts from zeros, there() from c, put() stores into c.
template <class T>
constexpr auto nothing = [](int64_t, int64_t) { return Vec<T>{}; };

template <class T>
auto put(T* c, int64_t ld) {
  return [=](int64_t i, int64_t j, Vec<T> v) { store(c + i * ld + j, v); };
}

template <class T>
auto there(const T* c, int64_t ld) {
  return [=](int64_t i, int64_t j) { return load(c + i * ld + j); };
}

// As there(), for a sum in a farther cache: the next tile's rows are prefetched while this one is computed.
template <class T>
auto fetched(const T* c, int64_t ld) {
  return [=](int64_t i, int64_t j) {
    __builtin_prefetch(c + (i + TILE_ROWS) * ld + j, 1);
    return load(c + i * ld + j);
  };
}

// The weights as the backward products read them, with features along the lanes: made once per call, shared by all
// threads.
template <class T, class E>
struct Turned {
  GraphWeights<T, E> forward;
  Buffer<T> M;                     // [steps][S][ld] M^T
  Buffer<T> value;                 // [steps][S][ld] Wr
  Buffer<E> M_pairs, value_pairs;  // of the rows of both, when E is Pair
  Buffer<T> score_weight;          // [ld], where there is one
  T score_bias = 0;

  explicit Turned(const GraphGradient& p)
      : forward(p.S, p.steps, p.query_weight, p.query_bias, p.key_weight, p.value_weight, p.value_bias),
        M(p.steps * p.S * forward.ld), value(p.steps * p.S * forward.ld),
        M_pairs(IS_PAIR<E> ? p.steps * depth<E>(p.S) * forward.ld : 0),
        value_pairs(IS_PAIR<E> ? p.steps * depth<E>(p.S) * forward.ld : 0), score_weight(forward.ld) {
    const int64_t S = p.S, ld = forward.ld;
    if (p.score_weight.data) {
      Buffer<T> room(S);
      std::copy_n(read<T>(p.score_weight, 0, S, room), S, score_weight + 0);
      score_bias = *read<T>(p.score_bias, 0, 1, room);
    }
    for (int64_t step = 0; step < p.steps; ++step) {
      const int64_t at = step * S * ld;
      transpose_by_squares<T>(forward.M + at, ld, S, S, M + at, ld);
      transpose_by_squares<T>(forward.value + at, ld, S, S, value + at, ld);
      if constexpr (IS_PAIR<E>) {
        pair_rows(S, S, M + at, ld, M_pairs + step * depth<E>(S) * ld);
        pair_rows(S, S, value + at, ld, value_pairs + step * depth<E>(S) * ld);
      }
    }
  }

  Right<E> asking(int64_t step) const { return {either<E>(M, M_pairs) + at(step), forward.ld}; }
  Right<E> valued(int64_t step) const { return {either<E>(value, value_pairs) + at(step), forward.ld}; }

 private:
  int64_t at(int64_t step) const { return step * depth<E>(forward.S) * forward.ld; }
};

// The gradients of M, Wr, u, br, w_e and b_e, summed over the parts of one group.
template <class T>
struct Sums {
  Buffer<T> M, value, shift, bias;  // [steps][S][ld] twice, with rows for tiles that pass the last; [steps][ld] twice
  Buffer<double> score_weight;      // [S]
  double score_bias = 0;

  Sums(int64_t steps, int64_t S, int64_t ld)
      : M((steps * S + 3) * ld), value((steps * S + 3) * ld), shift(steps * ld), bias(steps * ld), score_weight(S) {}

  // Adds n values of a row of M and of Wr, `first` being the first.
  void add_row(const Sums& other, int64_t first, int64_t n) {
    for (int64_t k = first; k < first + n; ++k) M[k] += other.M[k], value[k] += other.value[k];
  }
  // Adds the n values of u and br, and the gradients of w_e [S] and b_e.
  void add_rest(const Sums& other, int64_t n, int64_t S) {
    for (int64_t k = 0; k < n; ++k) shift[k] += other.shift[k], bias[k] += other.bias[k];
    for (int64_t s = 0; s < S; ++s) score_weight[s] += other.score_weight[s];
    score_bias += other.score_bias;
  }
};

// One thread's scratch for one part, and the way forth and back through its steps.
template <class T, class E>
class Walk {
 public:
  Walk(const GraphGradient& p, const Turned<T, E>& turned, int64_t nodes, int64_t longest)
      : p(p), w(turned.forward), turned(turned), S(p.S), ldS(w.ld), longest(longest), rows(nodes + ROW_STEP - 1),
        ld(padded<T>(nodes)), lde(padded<T>(longest)), x_rows(p.steps * rows * ldS), y_rows(p.steps * rows * ldS),
        e(p.steps * longest * ld), x(S * ld), y(S * ld), d_x(rows * ldS), one(rows * ldS), two(rows * ldS),
        three(rows * ldS), d_e(longest * lde), across(longest * lde), total(lde), room(nodes * S),
        left(IS_PAIR<E> ? std::max(depth<E>(S) * ld, depth<E>(nodes) * ldS) : 0),
        right(IS_PAIR<E> ? depth<E>(nodes) * ldS : 0) {}

  // Writes d nodes of an image and a chunk, unless null, and adds to the sums, unless null.
  void run(int64_t image, const Chunk& c, Sums<T>* sums) {
    chunk = &c;
    const T* from = read<T>(p.nodes, (image * p.M + c.begin) * S, c.rows * S, room);
    for (int64_t j = 0; j < c.rows; ++j) std::copy_n(from + j * S, S, x_rows + j * ldS);
    for (int64_t step = 0; step + 1 < p.steps; ++step) reason(step);
    read_out(image, sums);
    for (int64_t step = p.steps - 1; step-- > 0;) back(step, sums);
    for (int64_t j = 0; p.d_nodes && j < c.rows; ++j) {
      const int64_t row = image * p.M + c.begin + j;
      if (p.inverse) backward_of_norm<T>(d_x + j * ldS, S, x_rows + j * ldS, T(p.inverse[row]));
      write<T>(p.d_nodes, p.nodes.dtype, row * S, S, d_x + j * ldS, T(1));
    }
  }

 private:
  T* nodes(int64_t step) { return x_rows + step * rows * ldS; }
  T* asking(int64_t step) { return y_rows + step * rows * ldS; }
  T* weights(int64_t step) { return e + step * longest * ld; }

  template <class Body>
  void captions(Body body) const {
    for (int64_t t = chunk->first; t < chunk->last; ++t)
      body(p.cu_seqlens[t] - chunk->begin, p.cu_seqlens[t + 1] - p.cu_seqlens[t]);
  }

  // Forward: from nodes(step) to asking(step), weights(step) and nodes(step + 1).
  void reason(int64_t step) {
    const int64_t columns = chunk->rows;
    const T *u = w.shift + step * ldS, *br = w.bias + step * ldS;
    T *const h = one, *const share = weights(step), *const next = nodes(step + 1);
    transpose_by_squares<T>(nodes(step), ldS, columns, S, x, ld);
    const E* const factor = factors<E>(S, columns, x, ld, left);
    gemm(S, columns, depth<E>(S), Left<E>{w.ask + step * packed_size(S, depth<E>(S)), 0}, Right<E>{factor, ld},
         [&](int64_t i, int64_t) { return splat(u[i]); }, put<T>(y, ld));
    transpose_by_squares<T>(y, ld, S, columns, asking(step), ldS);
    gemm(columns, S, depth<E>(S), Left<E>{factor, ld}, w.values(step), nothing<T>, put<T>(h, ldS));
    captions([&](int64_t at, int64_t n) {
      T* const own = share + at;  // the last vector of a row passes into the next caption, whose turn is later
      gemm(n, n, S, Left<T>{x + at, ld}, Right<T>{y + at, ld}, nothing<T>, put<T>(own, ld));
      exponentials<T>(n, n, own, ld, total);
      for (int64_t i = 0; i < n; i += LANES<T>)
        for (int64_t j = 0; j < n; ++j) store(own + j * ld + i, load(own + j * ld + i) / load(total + i));
      gemm(n, S, n, Left<T>{own, ld}, Right<T>{h + at * ldS, ldS}, nothing<T>, [&](int64_t i, int64_t j, Vec<T> c) {
        c += load(br + j);
        store(next + (at + i) * ldS + j, c < 0 ? Vec<T>{} : c);
      });
    });
  }

  // The last step at node 0, forward and back: d_x becomes the gradient of nodes(steps - 1). Captions are rows.
  void read_out(int64_t image, Sums<T>* sums) {
    const int64_t count = chunk->last - chunk->first, step = p.steps - 1, at = step * S * ldS;
    const T *u = w.shift + step * ldS, *br = w.bias + step * ldS, *const keys = nodes(step);
    T *const asked = asking(step), *const share = weights(step);  // all captions' weights in one row
    T *const first = one, *const z = two, *const d_p = three, *const d_z = two, *const d_y = three;
    const auto begin = [&](int64_t t) { return p.cu_seqlens[chunk->first + t] - chunk->begin; };
    const auto turned_product = [&](const T* from, const T* weight, auto start, auto finish) {
      transpose_by_squares<T>(from, ldS, count, S, x, ld);
      gemm(count, S, S, Left<T>{x, ld}, Right<T>{weight, ldS}, start, finish);
    };
    for (int64_t t = 0; t < count; ++t) std::copy_n(keys + begin(t) * ldS, ldS, first + t * ldS);
    turned_product(first, w.M + at, [&](int64_t, int64_t j) { return load(u + j); }, put<T>(asked, ldS));
    for (int64_t t = 0; t < count; ++t) {
      const int64_t n = begin(t + 1) - begin(t);
      const T* const key = keys + begin(t) * ldS;
      T* const part = share + begin(t);
      T top = -INFINITY, all = 0;
      for (int64_t j = 0; j < n; ++j) top = std::max(top, part[j] = dot(key + j * ldS, asked + t * ldS));
      for (int64_t j = 0; j < n; j += LANES<T>) {
        const Vec<T> weight = select<T>(inside<T>(j, 0, n), exp<T>(load(part + j) - top), Vec<T>{});
        store(part + j, weight);
        all += sum<T>(weight);
      }
      std::fill_n(z + t * ldS, ldS, T(0));
      for (int64_t j = 0; j < n; ++j) add(part[j] /= all, key + j * ldS, z + t * ldS);
    }
    const auto added = [&](int64_t, int64_t j) { return load(br + j); };
    if (p.score_weight.data) {
      turned_product(z, w.value + at, added, put<T>(d_p, ldS));
      through_scores(image, d_p, sums);
    } else {
      const T* from = read<T>(p.grad, (image * p.T + chunk->first) * S, count * S, room);
      for (int64_t t = 0; t < count; ++t) std::copy_n(from + t * S, S, d_p + t * ldS);
      turned_product(z, w.value + at, added, [&](int64_t i, int64_t j, Vec<T> c) {
        T* const to = d_p + i * ldS + j;
        store(to, c > 0 ? load(to) : Vec<T>{});
      });
    }
    if (sums) {
      outer<T>(count, d_p, z, sums->value + at);
      add_rows(count, d_p, sums->bias + step * ldS);
    }
    turned_product(d_p, turned.value + at, nothing<T>, put<T>(d_z, ldS));
    for (int64_t t = 0; t < count; ++t) {
      const int64_t n = begin(t + 1) - begin(t);
      const T *const part = share + begin(t), *const key = keys + begin(t) * ldS;
      for (int64_t j = 0; j < n; ++j) d_e[j] = dot(key + j * ldS, d_z + t * ldS);
      Vec<T> shares{};
      for (int64_t j = 0; j < n; j += LANES<T>)
        shares += select<T>(inside<T>(j, 0, n), load(part + j) * load(d_e + j), Vec<T>{});
      const T mean = sum<T>(shares);
      std::fill_n(d_y + t * ldS, ldS, T(0));
      for (int64_t j = 0; j < n; ++j) {
        const T d_logit = part[j] * (d_e[j] - mean);
        T* const to = d_x + (begin(t) + j) * ldS;
        std::fill_n(to, ldS, T(0));
        add(d_logit, asked + t * ldS, to);
        add(part[j], d_z + t * ldS, to);
        add(d_logit, key + j * ldS, d_y + t * ldS);
      }
    }
    if (sums) {
      outer<T>(count, first, d_y, sums->M + at);
      add_rows(count, d_y, sums->shift + step * ldS);
    }
    turned_product(d_y, turned.M + at, nothing<T>, [&](int64_t i, int64_t j, Vec<T> c) {
      T* const to = d_x + begin(i) * ldS + j;
      store(to, load(to) + c);
    });
  }

  // (3) and (4) of similarity_score.py: `result` [captions][ldS], the last step's results before their relu, become
  // their gradients.
  void through_scores(int64_t image, T* result, Sums<T>* sums) {
    const int64_t count = chunk->last - chunk->first;
    const T *const weight = turned.score_weight, *const grad = read<T>(p.grad, image * p.T + chunk->first, count, room);
    for (int64_t t = 0; t < count; ++t) {
      T *const at = result + t * ldS, d = grad[t];
      for (int64_t s = 0; s < S; s += LANES<T>) store(at + s, load(at + s) < 0 ? Vec<T>{} : load(at + s));
      if (p.output == Output::SCORE) {
        const T score = 1 / (1 + std::exp(-(dot(at, weight) + turned.score_bias)));
        d *= score * (1 - score);
      }
      for (int64_t s = 0; sums && s < S; ++s) sums->score_weight[s] += double(d) * double(at[s]);
      if (sums) sums->score_bias += double(d);
      for (int64_t s = 0; s < S; s += LANES<T>)
        store(at + s, load(at + s) > 0 ? load(weight + s) * d : Vec<T>{});
    }
  }

  // d_x: from the gradient of nodes(step + 1) to that of nodes(step).
  void back(int64_t step, Sums<T>* sums) {
    const int64_t n_all = chunk->rows, at = step * S * ldS, K = depth<E>(S);
    const T *const keys = nodes(step), *const next = nodes(step + 1), *const asked = asking(step);
    const T* const share = weights(step);
    T *const d_z = one, *const z = two, *const d_y = two, *const columns = y;
    for (int64_t k = 0; k < n_all * ldS; k += LANES<T>) store(d_x + k, load(next + k) > 0 ? load(d_x + k) : Vec<T>{});
    transpose_by_squares<T>(d_x, ldS, n_all, S, columns, ld);
    gemm(n_all, S, K, Left<E>{factors<E>(S, n_all, columns, ld, left), ld}, turned.valued(step), nothing<T>,
         put<T>(d_z, ldS));
    if (sums) {
      captions([&](int64_t o, int64_t n) {
        gemm(n, S, n, Left<T>{share + o, ld}, Right<T>{keys + o * ldS, ldS}, nothing<T>, put<T>(z + o * ldS, ldS));
      });
      outer<E>(n_all, d_x, z, sums->value + at);
      add_rows(n_all, d_x, sums->bias + step * ldS);
    }
    transpose_by_squares<T>(d_z, ldS, n_all, S, columns, ld);
    transpose_by_squares<T>(keys, ldS, n_all, S, x, ld);
    captions([&](int64_t o, int64_t n) {
      const T* const own = share + o;
      gemm(n, n, S, Left<T>{x + o, ld}, Right<T>{columns + o, ld}, nothing<T>, put<T>(d_e, lde));
      for (int64_t i = 0; i < n; i += LANES<T>) {
        // What all of a column's d E have in common must vanish: short sums, and divided by what E really sums to.
        Vec<T> mean{}, all{};
        for (int64_t j = 0; j < n;) {
          Vec<T> some{}, sums{};
          for (const int64_t stop = least(j + 16, n); j < stop; ++j) {
            some += load(own + j * ld + i) * load(d_e + j * lde + i);
            sums += load(own + j * ld + i);
          }
          mean += some;
          all += sums;
        }
        mean /= all;
        for (int64_t j = 0; j < n; ++j)
          store(d_e + j * lde + i, load(own + j * ld + i) * (load(d_e + j * lde + i) - mean));
      }
      gemm(n, S, n, Left<T>{d_e, lde}, Right<T>{keys + o * ldS, ldS}, nothing<T>, put<T>(d_y + o * ldS, ldS));
      T* const to = d_x + o * ldS;
      transpose<T>(own, ld, n, n, across, lde);
      gemm(n, S, n, Left<T>{across, lde}, Right<T>{d_z + o * ldS, ldS}, nothing<T>, put<T>(to, ldS));
      transpose<T>(d_e, lde, n, n, across, lde);
      gemm(n, S, n, Left<T>{across, lde}, Right<T>{asked + o * ldS, ldS}, there<T>(to, ldS), put<T>(to, ldS));
    });
    if (sums) {
      outer<E>(n_all, keys, d_y, sums->M + at);
      add_rows(n_all, d_y, sums->shift + step * ldS);
    }
    transpose_by_squares<T>(d_y, ldS, n_all, S, columns, ld);
    gemm(n_all, S, K, Left<E>{factors<E>(S, n_all, columns, ld, left), ld}, turned.asking(step), there<T>(d_x, ldS),
         put<T>(d_x, ldS));
  }

  // c [S][ldS] += sum over n rows of a^T b, by products of F.
  template <class F>
  void outer(int64_t n, const T* a, const T* b, T* c) const {
    const F *rows, *columns;
    if constexpr (std::is_same_v<E, F>) {
      rows = factors<E>(n, S, a, ldS, left);
      columns = factors<E>(n, S, b, ldS, right);
    } else {
      rows = a, columns = b;
    }
    gemm(S, S, depth<F>(n), Left<F>{rows, ldS}, Right<F>{columns, ldS}, fetched<T>(c, ldS), put<T>(c, ldS));
  }

  // Adds n rows to `to`: four vectors at a time stay in registers; what passes a row's end is dropped.
  void add_rows(int64_t n, const T* from, T* to) const {
    for (int64_t s = 0; s < S; s += 4 * LANES<T>) {
      Vec<T> c[4] = {};
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        if (s + v * LANES<T> < S) c[v] = load(to + s + v * LANES<T>);
      for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) c[v] += load(from + j * ldS + s + v * LANES<T>);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        if (s + v * LANES<T> < S) store(to + s + v * LANES<T>, c[v]);
    }
  }

  void add(T factor, const T* from, T* to) const {
    for (int64_t s = 0; s < S; s += LANES<T>) store(to + s, load(to + s) + load(from + s) * factor);
  }

  // Rows are zero from S to a whole vector.
  T dot(const T* a, const T* b) const {
    Vec<T> all{};
    for (int64_t s = 0; s < S; s += LANES<T>) all += load(a + s) * load(b + s);
    return sum<T>(all);
  }

  const GraphGradient& p;
  const GraphWeights<T, E>& w;
  const Turned<T, E>& turned;
  const Chunk* chunk = nullptr;
  const int64_t S, ldS, longest, rows, ld, lde;
  Buffer<T> x_rows, y_rows, e;             // of every step: [rows][ldS] twice, [longest][ld]
  Buffer<T> x, y;                          // [S][ld]
  Buffer<T> d_x, one, two, three;          // [rows][ldS]
  Buffer<T> d_e, across, total, room;      // [longest][lde] twice, of one caption
  Buffer<E> left, right;                   // factors of one product, when E is Pair
};

}  // namespace itm_fast
